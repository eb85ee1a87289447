"""The definition of every op in plain torch: readable, and right on every torch device."""

from collections.abc import Callable, Mapping
from typing import Any

from overleap.kernels.torch import attention, compress, hyper, linear, moe, orthogonalise, sample


def ops(device: str) -> Mapping[str, Callable[..., Any]]:
    """Every fine op of the contract by name, whatever the type of device."""
    return {
        "matmul": linear.matmul,
        "grouped_matmul": linear.grouped_matmul,
        "rms_norm": linear.rms_norm,
        "norm_rope": linear.norm_rope,
        "rotate": linear.rotate,
        "hadamard": linear.hadamard,
        "quantize": linear.quantize,
        "window_write": attention.window_write,
        "page_write": attention.page_write,
        "compress": compress.compress,
        "index_topk": attention.index_topk,
        "attend": attention.attend,
        "route": moe.route,
        "experts": moe.experts,
        "hc_pre": hyper.hc_pre,
        "hc_head": hyper.hc_head,
        "hc_post": hyper.hc_post,
        "sample": sample.sample,
        "orthogonalise": orthogonalise.orthogonalise,
    }
