"""Experts in memory, at most so many bytes: asked for, read by threads, let go by how much used.

An expert is a layer and a number. Not here: who asks (resident.py), pages (checkpoint/pages.py).
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from overleap.checkpoint.pages import Extent
from overleap.errors import OverleapError

READERS = 4  # threads: so many reads wait at the disk at a time
READ_BYTES = 2**20  # asked of the disk at a time
# Tokens after which a use counts half. On the routing of the bundled model 256 keeps most; 16 to
# 1024 find at most 3 of 100 uses less in memory, the least recently used to go first 6 less.
HALF_LIFE = 256.0
GONE, ASKED, COMING, HERE = range(4)


@dataclass
class Counts:
    """See request.ExpertStats."""

    kept: int = 0
    ahead: int = 0
    missed: int = 0
    read_ahead: int = 0
    right: int = 0
    read_bytes: int = 0
    waited_s: float = 0.0


class Shelf:
    """Holds experts. One thread calls; the readers are its own.

    extents    of every expert, by layer and number
    room       bytes that may be held
    half_life  tokens after which a use counts half
    """

    def __init__(
        self,
        extents: Sequence[Sequence[tuple[Extent, ...]]],
        room: int,
        half_life: float = HALF_LIFE,
    ) -> None:
        self._extents = [expert for layer in extents for expert in layer]
        self._size = [sum(e.memory for e in expert) for expert in self._extents]
        self._layers, self._experts = len(extents), len(extents[0])
        self._room, self._held, self._half_life = room, 0, half_life
        count = len(self._extents)
        self._layer = np.repeat(np.arange(self._layers), self._experts)
        self._now = 0  # the layer asked for last
        self._state = np.zeros(count, dtype=np.int8)
        self._heat = np.zeros(count)
        self._needed = np.zeros(count, dtype=bool)  # by the piece that is computed
        self._expected = np.zeros(count, dtype=bool)  # by a layer still to come
        self._ahead = np.zeros(count, dtype=bool)  # read because it was expected, not used yet
        self._leaving: set[int] = set()
        self._first: deque[int] = deque()  # to be read: the model waits
        self._later: deque[int] = deque()  # to be read when nothing else is
        self._counts = Counts()
        self._error: OverleapError | None = None
        self._changed, self._open = threading.Condition(), True
        self.lets_go = all(e.pages.lets_go for expert in self._extents for e in expert)
        every = [e for expert in self._extents for e in expert]
        for place, e in enumerate(sorted(every, key=lambda e: (str(e.pages.path), e.start))):
            e.pages.scatter(e.start, e.end, odd=place % 2 == 1)
        self._readers = [
            threading.Thread(target=self._read_on, name=f"experts-{n}", daemon=True)
            for n in range(READERS)
        ]
        for reader in self._readers:
            reader.start()

    def close(self) -> None:
        """Stop the readers. What is in memory stays there, as long as the system likes."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for reader in self._readers:
            reader.join()

    def counts(self) -> tuple[Counts, int]:
        """So far, and the bytes held now."""
        with self._changed:
            return replace(self._counts), self._held

    # What the model tells.

    def age(self, tokens: int) -> None:
        """A step of so many tokens begins; what an earlier one expected is forgotten."""
        with self._changed:
            self._heat *= 0.5 ** (tokens / self._half_life)
            self._needed[:] = self._expected[:] = self._ahead[:] = False
            self._cancel([*self._first, *self._later])

    def expect(self, layer: int, numbers: Sequence[int]) -> None:
        """A layer still to come will want these experts, or so it seems; the surest first."""
        with self._changed:
            for key in (layer * self._experts + n for n in numbers):
                self._expected[key] = True
                if self._state[key] == GONE:
                    self._state[key] = ASKED
                    self._later.append(key)
            self._changed.notify_all()

    def use(self, layer: int, chosen_TX: Tensor) -> None:
        """A layer has chosen. What was expected of it and is not being read yet is forgotten."""
        tokens = len(chosen_TX)
        often = torch.bincount(chosen_TX.flatten(), minlength=self._experts).numpy()
        # As if the uses were spread evenly over the step's tokens, each fading to its end.
        fade = 0.5 ** (1 / self._half_life)
        weight = (1 - fade**tokens) / (1 - fade) / tokens
        own = slice(layer * self._experts, (layer + 1) * self._experts)
        with self._changed:
            self._now = layer
            self._heat[own] += weight * often
            first = own.start
            self._cancel([k for k in self._later if 0 <= k - first < self._experts])
            counts, used = self._counts, np.flatnonzero(often) + first
            there = self._state[used] >= COMING
            ahead = there & self._ahead[used]
            counts.right += int(ahead.sum())
            counts.ahead += int(ahead.sum())
            counts.kept += int((there & ~ahead).sum())
            counts.missed += int((~there).sum())
            self._ahead[own] = False

    def cut(self, chosen_TX: Tensor) -> Iterator[tuple[slice, list[int]]]:
        """Ranges of tokens, each with its experts: all that fit into the room at once."""
        limit = self._room // max(self._size)
        every = torch.unique(chosen_TX).tolist()
        if len(every) <= limit:
            yield slice(0, len(chosen_TX)), every
            return
        begin, wanted = 0, set[int]()
        for token, row in enumerate(chosen_TX.tolist()):
            if len(wanted.union(row)) > limit:
                yield slice(begin, token), sorted(wanted)
                begin, wanted = token, set()
            wanted.update(row)
        yield slice(begin, len(chosen_TX)), sorted(wanted)

    def hold(self, layer: int, numbers: Sequence[int]) -> None:
        """Wait until these experts are in memory; they stay until others are held, or released.

        Raises CheckpointError for a file that cannot be read.
        """
        keys = np.array(numbers) + layer * self._experts
        began = time.perf_counter()
        with self._changed:
            self._needed[:] = False
            self._needed[keys] = True
            for key in keys[self._state[keys] == GONE].tolist():
                self._state[key] = ASKED
                self._first.append(key)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._error is not None or bool((self._state[keys] == HERE).all())
            )
            self._counts.waited_s += time.perf_counter() - began
            error, self._error = self._error, None
        if error is not None:
            raise error

    def release(self, layer: int) -> None:
        """The layer has run: its experts may be let go."""
        with self._changed:
            self._needed[:] = False
            self._expected[layer * self._experts : (layer + 1) * self._experts] = False
            self._changed.notify_all()

    # What the readers do.

    def _read_on(self) -> None:
        room = bytearray(READ_BYTES)
        while (job := self._job()) is not None:
            key, victims = job
            for victim in victims:
                for e in self._extents[victim]:
                    e.pages.drop(e.start, e.end)
            with self._changed:
                self._leaving.difference_update(victims)
                self._changed.notify_all()
            error = None
            try:
                for e in self._extents[key]:
                    e.pages.read(e.start, e.end, room)
            except OverleapError as caught:
                error = caught
            with self._changed:
                self._state[key] = HERE if error is None else GONE
                self._held -= 0 if error is None else self._size[key]
                if self._needed[key]:  # else it was only expected, and is asked for where it is
                    self._error = self._error or error
                self._changed.notify_all()

    def _job(self) -> tuple[int, list[int]] | None:
        """Wait for something to read; None when it is over."""
        with self._changed:
            while self._open:
                job = self._take()
                if job is not None:
                    return job
                self._changed.wait()
        return None

    def _take(self) -> tuple[int, list[int]] | None:
        """The next expert to read and those that go for it; None when there is nothing to do."""
        urgent = bool(self._first)
        for key in self._first or self._later:
            if key in self._leaving:
                continue
            victims = self._victims(self._held + self._size[key] - self._room, urgent)
            if victims is None:
                if not urgent:
                    self._cancel(list(self._later))
                return None
            (self._first if urgent else self._later).remove(key)
            self._state[key] = COMING
            self._held += self._size[key] - sum(self._size[v] for v in victims)
            self._state[victims] = GONE
            self._ahead[victims] = False
            self._leaving.update(victims)
            self._ahead[key] = not urgent
            self._counts.read_ahead += not urgent
            self._counts.read_bytes += self._size[key]
            return key, victims
        return None

    def _victims(self, excess: int, urgent: bool) -> list[int] | None:
        """The least used, together of so many bytes or more; None where there are too few.

        What is expected goes last, and only for what the model waits for. Of equally used ones
        those go first whose layer comes last.
        """
        if excess <= 0:
            return []
        free = (self._state == HERE) & ~self._needed
        if not urgent:
            free &= ~self._expected
        keys = np.flatnonzero(free)
        until = (self._layer[keys] - self._now - 1) % self._layers
        order = keys[np.lexsort((-until, self._heat[keys], self._expected[keys]))]
        victims: list[int] = []
        for key in order.tolist():
            victims.append(key)
            excess -= self._size[key]
            if excess <= 0:
                return victims
        return None

    def _cancel(self, keys: list[int]) -> None:
        """Take experts out of the queues."""
        for key in keys:
            (self._first if key in self._first else self._later).remove(key)
            self._state[key] = GONE
