"""The native calls of a step, recorded once and made again without Python between them.

What calls of a step address must stay where it is: weights, the cache, and what the step itself
made, which a recording holds. Of torch's own work only what is listed here is repeated; a step
that needs more is not recordable, since numbers it took from the step before would be repeated
too. Read next: engine/replay.py, src/tape.h.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from overleap.kernels.cpu import _native
from overleap.kernels.spans import Spans

_aten: Any = torch.ops.aten
_ROOM = {_aten.empty.memory_format, _aten.empty_like.default}
_VIEWS = {
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.view.default,
}
_REPEATED = {
    _aten._to_copy.default,
    _aten.add.Tensor,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.embedding.default,
    _aten.index.Tensor,
    _aten.mul.Tensor,
    _aten.to.dtype,
    _aten.to.dtype_layout,
}


def sequences(spans: Spans) -> Any:
    """Where the sequences of a step stand, as native code is told of it: one object for all ops."""
    if _native not in spans.kept:
        spans.kept[_native] = _native.Sequences(spans.start, spans.count, spans.slot)
    return spans.kept[_native]


class Recording(TorchDispatchMode):
    """Records what `of` is given to call; `play` makes its calls again, in order.

    spans    of the step that is recorded
    ratios   of its layers
    refused  what cannot be repeated, None where all can
    nbytes   that are held; large: more than most_bytes would be, so nothing is, and no call kept
    """

    def __init__(self, spans: Spans, ratios: tuple[int, ...], most_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused: str | None = None
        self.nbytes, self.large, self._most_bytes = 0, False, most_bytes
        self._spans = spans
        for ratio in ratios:  # made here, they are no work of the step that would be repeated
            spans.begins(ratio)
        self._calls: list[Callable[[], object]] = []
        self._held: list[Tensor] = []  # else others would be given their memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: else the first call imports the compiler, 140 MiB that nobody wants."""
        return False

    def of(self, said: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `said` returns, with the calls that it makes on this thread recorded."""
        with self:
            self._go_on()
            try:
                return said()
            finally:
                _native.record(None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _REPEATED and result.data_ptr() != args[0].data_ptr():
            self._calls.append(partial(_again, result, func, args, kwargs))
            self._hold(result)
            self._go_on()
        elif func in _ROOM:
            self._hold(result)
        elif func not in _VIEWS and func not in _REPEATED:
            self.refused = self.refused or str(func)
        return result

    def _hold(self, made: Tensor) -> None:
        self.nbytes += made.nbytes
        self._held.append(made)
        if self.nbytes > self._most_bytes:
            self.large = True
            self._held.clear()
            self._calls.clear()
            _native.record(None)

    def _go_on(self) -> None:
        if self.large:
            return
        tape = _native.Tape()
        self._calls.append(tape.play)
        _native.record(tape)

    def play(self, spans: Spans) -> None:
        """Every call again, for sequences that stand elsewhere; results are where they were."""
        self._spans.follow(spans)
        sequences(self._spans).move(spans.start, spans.slot)
        for call in self._calls:
            call()


def _again(result: Tensor, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    result.copy_(func(*args, **kwargs))
