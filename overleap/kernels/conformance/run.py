"""Runs the cases against a backend: poisoned memory, unchanged inputs, error, time.

Not here: which cases (cases.py, sequences.py) and what is right (exact.py, compare.py).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from overleap.errors import BackendError
from overleap.kernels.conformance import cases, choosing, coarse, sequences
from overleap.kernels.conformance.cases import Case, Cases
from overleap.kernels.conformance.compare import Finding, wrong
from overleap.kernels.conformance.draw import Draw
from overleap.kernels.spec import Ops

CASES: dict[str, Cases] = {
    "matmul": cases.matmul,
    "grouped_matmul": cases.grouped_matmul,
    "rms_norm": cases.rms_norm,
    "norm_rope": cases.norm_rope,
    "rotate": cases.rotate,
    "hadamard": cases.hadamard,
    "quantize": cases.quantize,
    "window_write": sequences.window_write,
    "page_write": sequences.page_write,
    "compress": sequences.compress,
    "index_topk": sequences.index_topk,
    "attend": sequences.attend,
    "route": cases.route,
    "experts": cases.experts,
    "hc_pre": cases.hc_pre,
    "hc_head": cases.hc_head,
    "hc_post": cases.hc_post,
    "sample": choosing.sample,
    "orthogonalise": choosing.orthogonalise,
    "project": coarse.project,
    "project_back": coarse.project_back,
    "norm_rope_quantize": coarse.norm_rope_quantize,
    "compress_write": coarse.compress_write,
    "attend_write": coarse.attend_write,
    "mixture": coarse.mixture,
    "hc_pre_norm": coarse.hc_pre_norm,
}
REPEATS, ENOUGH_S = 15, 0.3  # of a timed case: the median of up to 15 runs within 0.3 s


@dataclass(frozen=True)
class Verdict:
    """One case of one op.

    error      largest |got - exact| / size over the results; inf where no number can say it
    tolerance  largest error allowed; 0 where every bit counts
    seconds    median of one call, for the cases meant for timing, if they were asked for and the
               op is right; a wrong op is not timed
    bytes      that a call must move, for GB/s; None where not timed
    reason     what is wrong beyond the error: shape, NaN, an exception, an input that changed
    """

    op: str
    case: str
    passed: bool
    error: float
    tolerance: float
    seconds: float | None = None
    bytes: int | None = None
    reason: str | None = None

    @property
    def gigabytes_per_second(self) -> float | None:
        """Bytes moved over time, in 10^9 bytes a second."""
        if self.seconds is None or self.bytes is None:
            return None
        return self.bytes / self.seconds / 1e9


def op_names() -> list[str]:
    """Every op that is tried, in the order of the contract."""
    return list(CASES)


def conform(
    ops: Ops,
    device: str | torch.device = "cpu",
    *,
    seed: int,
    only: list[str] | None = None,
    timed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Try every op of a backend on random and on awkward inputs.

    seed      draws the inputs; print it, so that a failure can be repeated
    only      names of ops; all by default
    timed     add large cases, and time them where the op passed everything
    progress  called with ops done and ops in all
    Raises BackendError for a name in `only` that is no op. A wrong op is a verdict, not an error.
    """
    wanted = list(CASES) if only is None else only
    for name in wanted:
        if name not in CASES:
            raise BackendError(f"no op is called {name!r}", f"ops are {', '.join(CASES)}")
    verdicts: list[Verdict] = []
    for done, name in enumerate(wanted):
        if progress:
            progress(done, len(wanted))
        # Each op has its own stream of numbers: `only` repeats a failure of the whole run.
        draw = Draw(seed + 1000 * list(CASES).index(name), torch.device(device))
        verdicts += _try(ops, name, draw, timed)
    if progress:
        progress(len(wanted), len(wanted))
    return verdicts


def _try(ops: Ops, name: str, draw: Draw, timed: bool) -> list[Verdict]:
    op = getattr(ops, name, None)
    verdicts, large = [], []
    for case in CASES[name](draw, timed):
        found = _judge(op, case)
        label = f"{case.name} {str(case.dtype).removeprefix('torch.')}"
        passed = found.error <= case.tolerance
        verdicts.append(
            Verdict(name, label, passed, found.error, case.tolerance, reason=found.reason)
        )
        if timed and case.moved:
            large.append((len(verdicts) - 1, case))
    if all(verdict.passed for verdict in verdicts):
        for index, case in large:
            verdicts[index] = _timed(op, case, verdicts[index], draw.device)
    return verdicts


def _judge(op: Callable[..., Any] | None, case: Case) -> Finding:
    """Call the op once, with memory it allocates full of NaN, and check all it did."""
    if op is None:
        return wrong("the backend has no such op")
    kept = [arg for number, arg in enumerate(case.args) if number != case.writes]
    before = [tensor.clone() for tensor in _tensors(kept)]
    try:
        with torch.inference_mode(), Poison():
            got = op(*case.args)
    except Exception as error:  # whatever a backend raises is its verdict
        return wrong(f"raised {type(error).__name__}: {error}")
    changed = sum(not _same(a, b) for a, b in zip(before, _tensors(kept), strict=True))
    if changed:
        return wrong(f"{changed} of its inputs changed")
    return case.check(got)


def _timed(
    op: Callable[..., Any] | None, case: Case, verdict: Verdict, device: torch.device
) -> Verdict:
    assert op is not None
    times: list[float] = []
    with torch.inference_mode():
        while len(times) < REPEATS and sum(times) < ENOUGH_S:
            began = time.perf_counter()
            op(*case.args)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            times.append(time.perf_counter() - began)
    return Verdict(
        verdict.op,
        verdict.case,
        verdict.passed,
        verdict.error,
        verdict.tolerance,
        statistics.median(times),
        case.moved,
    )


class Poison(TorchFunctionMode):
    """While it lasts, torch.empty and its kin return NaN: what an op does not write shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Pass on, and fill what came uninitialised."""
        out = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED and isinstance(out, Tensor) and out.numel():
            if out.dtype.itemsize == 1 and out.is_floating_point():
                out.view(torch.uint8).fill_(255)
            elif out.is_floating_point():
                out.fill_(torch.nan)
            elif out.dtype is not torch.bool:
                out.fill_(torch.iinfo(out.dtype).max)
        return out


_UNINITIALISED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.empty_permuted,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in an argument: in weights, pools, spans and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    flat = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return torch.equal(*flat)
