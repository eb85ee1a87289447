"""The work that a step gives a device, captured once and given again as one (CUDA graphs).

What is captured must stay where it is: weights, the cache, the numbers of the step (`Spans.known`)
and what it makes itself, in memory that all captures of a device share. Not run on a card yet; the
tests capture on a device that pretends. Read next: engine/replay.py, cpu/tape.py (the same for the
native calls of a CPU).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from overleap.devices import current, free_bytes
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops

NEVER_WAIT = {"window_write", "page_write", "sample", "orthogonalise"}  # of the definition's ops
_POOLS: dict[torch.device, tuple[int, int]] = {}


def capturable(ops: Ops) -> bool:
    """Whether no op of a step asks the device for a number, or has the host compute."""
    return all(
        op.__module__.startswith("overleap.kernels.triton.")
        or (name in NEVER_WAIT and op.__module__.startswith("overleap.kernels.torch."))
        for name, op in vars(ops).items()
    )


class Capture:
    """Captures what `of` is given to call; `play` gives it to the device again.

    refused  what cannot be captured, None where all can
    nbytes   of the device's memory that it holds; large: more than most_bytes
    """

    def __init__(self, spans: Spans, most_bytes: int) -> None:
        self.refused: str | None = None
        self.nbytes, self.large, self._most_bytes = 0, False, most_bytes
        self._spans, self._device = spans, spans.position_T.device
        self._graph = torch.accelerator.Graph(
            pool=_POOLS.get(self._device), capture_error_mode="thread_local"
        )

    def of(self, said: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `said` returns. It is called twice: a capture computes nothing."""
        found = said()
        before = free_bytes(self._device)
        self._said = said  # and with it the tensors that it reads
        try:
            with current(self._device), torch.Stream(self._device), self._graph:
                results = said()
        except RuntimeError as error:
            self.refused = str(error)
            return found
        _POOLS[self._device] = self._graph.pool()
        for own, made in zip(results, found, strict=True):
            own.copy_(made)
        after = free_bytes(self._device)
        taken = 0 if before is None or after is None else before - after
        self.nbytes = max(taken, sum(result.nbytes for result in results))
        self.large = self.nbytes > self._most_bytes
        return results

    def play(self, spans: Spans) -> None:
        """All of it again, for sequences that stand elsewhere; results are where they were."""
        self._spans.follow(spans)
        with current(self._device):
            self._graph.replay()
