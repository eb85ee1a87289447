"""Kernels in Triton, for CUDA, ROCm and XPU devices, and for Triton's interpreter on a CPU.

Release weights and cache rows are decoded from their bytes by integer operations (formats.py), so
that a chip without FP8 runs them too. What writes rows and pages is torch's indexing, what samples
and orthogonalises is torch's own. No op of a decode step waits for the device, so that one
can be captured (kernels/graph.py). Not run on a card yet: tuning.toml says what was tried.
Read next: linear.py, attention.py.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from overleap.errors import BackendError


def ops(device: str) -> Mapping[str, Callable[..., Any]]:
    """The ops there are kernels for. BackendError without Triton or a device that it drives."""
    if find_spec("triton") is None:
        raise BackendError(
            "triton is not installed", "pip install 'overleap[cuda]', or a build for your device"
        )
    import triton

    if device == "cpu" and not triton.knobs.runtime.interpret:
        raise BackendError(
            "the triton kernels need a GPU", "TRITON_INTERPRET=1 runs them on a CPU, very slowly"
        )
    from overleap.kernels.triton import attention, compress, linear, rows, streams

    return {
        "matmul": linear.matmul,
        "grouped_matmul": linear.grouped_matmul,
        "route": linear.route,
        "experts": linear.experts,
        "rms_norm": rows.rms_norm,
        "norm_rope": rows.norm_rope,
        "rotate": rows.rotate,
        "hadamard": rows.hadamard,
        "quantize": rows.quantize,
        "compress": compress.compress,
        "index_topk": attention.index_topk,
        "attend": attention.attend,
        "hc_pre": streams.hc_pre,
        "hc_head": streams.hc_head,
        "hc_post": streams.hc_post,
    }
