"""The work that a step gives a device, captured once and given again as one graph (devices.KINDS).

What is captured must stay where it is: weights, the cache, the numbers of the step (`Spans.known`)
and what it makes itself, in memory that the captures of a cache share. Not run on a card yet; the
tests capture on a device that pretends. Read next: engine/replay.py, cpu/tape.py (the same for the
native calls of a CPU).
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from overleap.devices import capturing, current, graph_room, new_graph
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops

log = logging.getLogger("overleap.kernels")

NOT_WAITING = {"window_write", "page_write"}  # for the device, of the definition's ops
IN_NO_STEP = {"sample", "orthogonalise"}


# Graphs that were not finished. A device may point at them, and what state it is in is not ours to
# guess: none are captured on it any more.
_FAILED: dict[torch.device, Any] = {}


def capturable(ops: Ops) -> bool:
    """Whether no op of a step asks the device for a number, or has the host compute."""
    return all(
        op.__module__.startswith("overleap.kernels.triton.")
        or name in IN_NO_STEP
        or (name in NOT_WAITING and op.__module__.startswith("overleap.kernels.torch."))
        for name, op in vars(ops).items()
    )


class Captures:
    """Those of one cache: they share memory, and are captured on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def room(self) -> tuple[Any, Any]:
        """The memory and the stream."""
        return graph_room(self.device)

    def begin(self, spans: Spans, ratios: tuple[int, ...], most_bytes: int) -> "Capture":
        """One more."""
        return Capture(spans, self)


class Capture:
    """Captures what `of` is given to call; `play` gives it to the device again.

    refused  why nothing is captured on this device, None where it is
    large    there was no memory for it
    nbytes   0: what captures hold is bounded by their number
    """

    nbytes = 0

    def __init__(self, spans: Spans, captures: Captures) -> None:
        self.refused: str | None = None
        self.large = False
        self._spans, self._captures, self._device = spans, captures, captures.device
        self._graph: Any = None

    def of(self, said: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `said` returns. It is called twice: a capture computes nothing."""
        found = said()
        if self._device in _FAILED:
            self.refused = "a capture failed before"
            return found
        try:
            results = self._capture(said)
        except (RuntimeError, AttributeError) as error:
            before = error.__context__  # what ends a capture may fail because of it
            first = before if isinstance(before, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                self.large = True
                return found
            self.refused = str(first).partition("\n")[0]
            _FAILED[self._device] = self._graph
            log.warning("%s is given steps op by op, not captured: %s", self._device, self.refused)
            return found
        for own, made in zip(results, found, strict=True):
            own.copy_(made)
        return results

    def _capture(self, said: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with current(self._device):
            stream = torch.accelerator.current_stream(self._device)
            try:
                self._graph, self._said = new_graph(self._device), said  # with what it reads
                with capturing(self._device, self._graph, *self._captures.room):
                    return said()
            finally:  # a capture that fails leaves its own behind
                torch.accelerator.set_stream(stream)

    def play(self, spans: Spans) -> None:
        """All of it again, for sequences that stand elsewhere; results are where they were."""
        self._spans.follow(spans)
        with current(self._device):
            self._graph.replay()
