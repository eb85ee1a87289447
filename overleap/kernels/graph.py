"""The work that a step gives a device, captured once and given again as one graph (devices.KINDS).

What is captured must stay where it is: weights, the cache, the numbers of the step (`Spans.known`)
and what it makes itself, in memory that all captures of a thread share. Not run on a card yet; the
tests capture on a device that pretends. Read next: engine/replay.py, cpu/tape.py (the same for the
native calls of a CPU).
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.devices import capturing, current, graph_room, new_graph
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops

log = logging.getLogger("overleap.kernels")

NOT_WAITING = {"window_write", "page_write"}  # for the device, of the definition's ops
IN_NO_STEP = {"sample", "orthogonalise"}
_ROOMS: dict[tuple[torch.device, int], tuple[Any, Any]] = {}
_FAILED: dict[torch.device, Any] = {}  # graphs that were not finished: a device may point at them


def capturable(ops: Ops) -> bool:
    """Whether no op of a step asks the device for a number, or has the host compute."""
    return all(
        op.__module__.startswith("overleap.kernels.triton.") or name in NOT_WAITING | IN_NO_STEP
        for name, op in vars(ops).items()
    )


class Capture:
    """Captures what `of` is given to call; `play` gives it to the device again.

    refused  why nothing is captured on this device, None where it is
    large    there was no memory for it
    nbytes   0: what captures hold is bounded by their number
    """

    nbytes = 0

    def __init__(self, spans: Spans) -> None:
        self.refused: str | None = None
        self.large = False
        self._spans, self._device = spans, spans.position_T.device

    def of(self, said: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `said` returns. It is called twice: a capture computes nothing."""
        found = said()
        if self._device in _FAILED:
            self.refused = "a capture failed before"
            return found
        graph = None
        try:
            with current(self._device):
                graph, room = new_graph(self._device), self._room()
                with capturing(self._device, graph, *room):
                    results = said()
        except torch.OutOfMemoryError:
            self.large = True
            return found
        except (RuntimeError, AttributeError) as error:
            _FAILED[self._device], self.refused = graph, str(error)
            log.warning("steps are launched op by op, %s captures none: %s", self._device, error)
            return found
        self._graph, self._said = graph, said  # and with it the tensors that it reads
        for own, made in zip(results, found, strict=True):
            own.copy_(made)
        return results

    def _room(self) -> tuple[Any, Any]:
        key = self._device, threading.get_ident()
        if key not in _ROOMS:
            _ROOMS[key] = graph_room(self._device)
        return _ROOMS[key]

    def play(self, spans: Spans) -> None:
        """All of it again, for sequences that stand elsewhere; results are where they were."""
        self._spans.follow(spans)
        with current(self._device):
            self._graph.replay()
