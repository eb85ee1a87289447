"""Runs the cases against a backend: poisoned memory, unchanged inputs, error, time.

Not here: which cases (cases.py, sequences.py) and what is right (exact.py, compare.py).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from overleap import devices
from overleap.errors import BackendError
from overleap.kernels.conformance import cases, choosing, coarse, sequences
from overleap.kernels.conformance.cases import Case, Cases
from overleap.kernels.conformance.ceilings import Ceilings, last_cache_bytes
from overleap.kernels.conformance.compare import Finding, wrong
from overleap.kernels.conformance.draw import Draw
from overleap.kernels.conformance.edges import EDGES
from overleap.kernels.cost import Cost, cost
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
    "attention_inputs": coarse.attention_inputs,
    "project_back": coarse.project_back,
    "norm_rope_quantize": coarse.norm_rope_quantize,
    "compress_write": coarse.compress_write,
    "attend_write": coarse.attend_write,
    "mixture": coarse.mixture,
    "hc_pre_norm": coarse.hc_pre_norm,
}
REPEATS, ENOUGH_S = 15, 0.3  # of a timed case: the median of up to 15 runs within 0.3 s
RAISED = "raised "  # how the reason of a case begins whose op raised
COPIES_BYTES = 1 << 30  # at most, of the arguments of a timed case


@dataclass(frozen=True)
class Verdict:
    """One case of one op.

    error      largest |got - exact| / size over the results; inf where no number can say it
    tolerance  largest error allowed; 0 where every bit counts
    reason     what is wrong, where it did not pass: the worst value, the shape, NaN, an exception,
               an input that changed
    seconds    median of one call whose inputs are in no cache, for the cases meant for timing, if
               they were asked for and the op is right; a wrong op is not timed
    cost       bytes that a call must move and operations it must do; None where not timed
    """

    op: str
    case: str
    passed: bool
    error: float
    tolerance: float
    reason: str | None = None
    seconds: float | None = None
    cost: Cost | None = None

    @property
    def exception(self) -> str | None:
        """Type and text of what the op raised; None where it raised nothing."""
        reason = self.reason or ""
        return reason.removeprefix(RAISED) if reason.startswith(RAISED) else None

    @property
    def gigabytes_per_second(self) -> float | None:
        """Bytes moved over time, in 10^9 bytes a second."""
        if self.seconds is None or self.cost is None:
            return None
        return self.cost.bytes / self.seconds / 1e9

    @property
    def gigaops_per_second(self) -> float | None:
        """Operations over time, in 10^9 a second."""
        if self.seconds is None or self.cost is None:
            return None
        return self.cost.operations / self.seconds / 1e9

    def share(self, ceilings: Ceilings) -> tuple[float, str] | None:
        """Of the ceiling that binds, and its name: `read`, or the unit of the products.

        The least time is that of the bytes or that of the operations, whichever is more; the share
        is the least time over the time taken. None where not timed.
        """
        if self.seconds is None or self.cost is None:
            return None
        unit = self.cost.unit
        rate = {"f32": ceilings.f32, "bf16": ceilings.bf16, "int8": ceilings.int8}[unit]
        if rate is None:
            rate, unit = ceilings.f32, "f32"
        reading = self.cost.bytes / ceilings.read.per_s
        counting = self.cost.operations / rate.per_s
        bound = unit if counting > reading else "read"
        return max(reading, counting) / self.seconds, bound


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
    enough_s: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """Try every op of a backend on random and on awkward inputs.

    seed      draws the inputs; print it, so that a failure can be repeated
    only      names of ops; all by default
    timed     add large cases, and time them where the op passed everything
    enough_s  take no further case of an op after this long
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
        with devices.current(draw.device):
            verdicts += _try(ops, name, draw, timed, enough_s)
    if progress:
        progress(len(wanted), len(wanted))
    return verdicts


def _try(ops: Ops, name: str, draw: Draw, timed: bool, enough_s: float) -> list[Verdict]:
    op = getattr(ops, name, None)
    verdicts, large = [], []
    ended = time.perf_counter() + enough_s
    for case in chain(EDGES[name](draw, timed) if name in EDGES else (), CASES[name](draw, timed)):
        found = _judge(op, case, draw.device)
        label = f"{case.name} {str(case.dtype).removeprefix('torch.')}"
        passed = found.error <= case.tolerance
        reason = None if passed else found.reason
        verdicts.append(Verdict(name, label, passed, found.error, case.tolerance, reason))
        if timed and case.moved:
            large.append((len(verdicts) - 1, case))
        if time.perf_counter() > ended:
            break
    if all(verdict.passed for verdict in verdicts):
        for index, case in large:
            verdicts[index] = _timed(op, case, verdicts[index], draw.device)
    return verdicts


def _judge(op: Callable[..., Any] | None, case: Case, device: torch.device) -> Finding:
    """Call the op once, with memory it allocates full of NaN, and check all it did."""
    if op is None:
        return wrong("the backend has no such op")
    kept = [arg for number, arg in enumerate(case.args) if number != case.writes]
    before = [tensor.clone() for tensor in _tensors(kept)]
    try:
        with torch.inference_mode(), Poison():
            got = op(*case.args)
    except Exception as error:  # whatever a backend raises is its verdict
        return wrong(f"{RAISED}{type(error).__name__}: {error}")
    try:
        changed = sum(not _same(a, b) for a, b in zip(before, _tensors(kept), strict=True))
        if changed:
            return wrong(f"{changed} of its inputs changed")
        for tensor in _tensors(got):
            host = tensor.dtype is torch.float64 and not devices.has_float64(device)
            if tensor.device.type != ("cpu" if host else device.type):
                return wrong(f"a result is on {tensor.device}, the inputs are on {device}")
        return case.check(got)
    except Exception as error:  # so is a result of a form that no check foresees
        return wrong(f"left what cannot be checked, {type(error).__name__}: {error}")


def _timed(
    op: Callable[..., Any] | None, case: Case, verdict: Verdict, device: torch.device
) -> Verdict:
    assert op is not None
    must = cost(case.op, case.args)
    times: list[float] = []
    with torch.inference_mode():
        copies = _copies(case.args, must.bytes)
        for args in copies:
            _know(args)
        turns = cycle(copies)
        op(*next(turns))
        while len(times) < REPEATS and sum(times) < ENOUGH_S:
            times.append(devices.seconds(partial(op, *next(turns)), device))
    return replace(verdict, seconds=statistics.median(times), cost=must)


def _copies(args: tuple[Any, ...], moved: int) -> list[tuple[Any, ...]]:
    """Arguments to call with in turn, so many that no cache still holds those that come next."""
    held = sum(tensor.nbytes for tensor in _tensors(args))
    wanted = 1 + 2 * max(last_cache_bytes(), 32 << 20) // max(1, moved)
    return [args] + [_copied(args) for _ in range(min(wanted, COPIES_BYTES // max(1, held)) - 1)]


def _know(value: Any) -> None:
    """What arguments work out once (tables of addresses, widths) is there before the clock runs:
    a model's weights stay, so a step does not pay for it."""
    if isinstance(value, list | tuple):
        for item in value:
            _know(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for name, part in vars(type(value)).items():
            if isinstance(part, cached_property):
                getattr(value, name)
        for field in fields(value):
            _know(getattr(value, field.name))


def _copied(value: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    if (
        is_dataclass(value)
        and not isinstance(value, type)
        and next(_tensors(value), None) is not None
    ):
        parts = {field.name: _copied(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **parts)
    return value


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
