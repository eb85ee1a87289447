"""What each sequence remembers: its pages, its window rings and its compressor tails.

The absolute position is the only clock: ring rows are found by position, so a rewind moves a
cursor. Read next: model/attention.py (who writes), prefix.py (who keeps snapshots).
"""

import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from overleap.cache import layout
from overleap.cache.layout import PAGE_TOKENS, REWIND_TOKENS, CacheFormat
from overleap.cache.pool import PagePool, row_formats, row_width
from overleap.config import CSA_RATIO, LayerKind, ModelConfig
from overleap.errors import CapacityError
from overleap.kernels.spec import Pool


@dataclass
class Sequence:
    """One text in the cache. `length` tokens are in it; the next token has that position.

    oldest  no rewind below this length: the rows it would need have been given up
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0
    oldest: int = 0


@dataclass(frozen=True)
class LayerCache:
    """The tensors of one layer that a forward pass reads and writes.

    ring     [slots, ring rows, row]  window rows by position
    entries  paged compressed entries; keys: paged indexer keys; None where the layer has none
    tail     f32 [slots, tail rows, 2, W]  values and gates of the compressor; index_tail likewise
    """

    ring: Pool
    entries: Pool | None
    keys: Pool | None
    tail: Tensor | None
    index_tail: Tensor | None


@dataclass(frozen=True)
class Snapshot:
    """A sequence's fixed-size state at a page boundary. Its pages are kept by whoever keeps it.

    windows  per layer, the last min(length, window) ring rows in order of position
    tails    per CSA layer, the overlap rows (main, indexer); the HCA tail is empty there
    """

    length: int
    windows: tuple[Tensor, ...]
    tails: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes this snapshot holds."""
        tails = sum(main.nbytes + index.nbytes for main, index in self.tails)
        return sum(rows.nbytes for rows in self.windows) + tails


class Cache:
    """Room for `slots` sequences over `pages` pages of 128 tokens.

    Raises CapacityError, with the numbers, where something does not fit; nothing changes then.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        slots: int,
        format: CacheFormat = CacheFormat.RELEASE,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.format, self.device = config, format, torch.device(device)
        self.pool = PagePool(config, pages, format, self.device)
        entry, _ = row_formats(config, format)
        self.layers: list[LayerCache] = []
        for number, kind in enumerate(config.all_kinds):
            shape = (slots, layout.ring_rows(config), row_width(entry))
            ring = torch.zeros(shape, dtype=entry.dtype, device=self.device)
            self.layers.append(
                LayerCache(
                    Pool(ring, entry),
                    self.pool.entries[number],
                    self.pool.keys[number],
                    self._tail(slots, kind, config.head_dim, kind is not LayerKind.SLIDING),
                    self._tail(slots, kind, config.index_head_dim, kind is LayerKind.CSA),
                )
            )
        self._free_slots = list(range(slots - 1, -1, -1))
        self.slots = slots

    def _tail(self, slots: int, kind: LayerKind, width: int, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        shape = (slots, layout.tail_rows(kind), 2, layout.series_width(kind, width))
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    @property
    def pages_free(self) -> int:
        """Pages that nobody holds."""
        return self.pool.free

    @property
    def slots_free(self) -> int:
        """Sequences that can still be opened."""
        return len(self._free_slots)

    def open(self) -> Sequence:
        """A new, empty sequence."""
        if not self._free_slots:
            raise CapacityError(
                f"all {self.slots} sequence slots are in use", "wait for a sequence to finish"
            )
        return Sequence(self._free_slots.pop())

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Make sure the sequence has its own pages for positions below `length`."""
        missing = layout.pages_for(length) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.pool.take(missing)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forget the tokens from position `length` on.

        At most REWIND_TOKENS below the furthest length the sequence has had, never below the
        snapshot it was restored from, nor into a page that others hold.
        """
        oldest = max(sequence.oldest, sequence.length - REWIND_TOKENS)
        assert oldest <= length <= sequence.length, (oldest, length, sequence.length)
        rewritten = sequence.pages[length // PAGE_TOKENS :]
        assert all(self.pool.holders(page) == 1 for page in rewritten), (length, "shared page")
        sequence.length, sequence.oldest = length, oldest

    def close(self, sequence: Sequence) -> None:
        """Give back the slot and the holds on pages."""
        for page in sequence.pages:
            self.pool.release(page)
        sequence.pages = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same past. Full pages are shared, the open one is copied."""
        full = sequence.length // PAGE_TOKENS
        copied = layout.pages_for(sequence.length) - full
        fresh = self.pool.take(copied)
        try:
            twin = self.open()
        except CapacityError:
            for page in fresh:
                self.pool.release(page)
            raise
        for page in sequence.pages[:full]:
            self.pool.share(page)
        for page in fresh:
            self.pool.copy(sequence.pages[full], page)
        twin.pages, twin.length = sequence.pages[:full] + fresh, sequence.length
        twin.oldest = sequence.oldest
        for layer in self.layers:
            for rows in (layer.ring.rows, layer.tail, layer.index_tail):
                if rows is not None:
                    rows[twin.slot] = rows[sequence.slot]
        return twin

    def snapshot(self, sequence: Sequence) -> Snapshot:
        """Copy the fixed-size state; the sequence must stand at a page boundary."""
        assert sequence.length % PAGE_TOKENS == 0, sequence.length
        first = max(0, sequence.length - self.config.sliding_window)
        near = torch.arange(first, sequence.length, device=self.device)
        windows = tuple(
            layer.ring.rows[sequence.slot, near % layer.ring.per_page] for layer in self.layers
        )
        overlap = torch.arange(max(0, sequence.length - CSA_RATIO), sequence.length)
        tails = []
        for layer in self.layers:
            if layer.tail is not None and layer.index_tail is not None:
                at = overlap.to(self.device) % layer.tail.shape[1]
                tails.append((layer.tail[sequence.slot, at], layer.index_tail[sequence.slot, at]))
        block = _Block(self.device, [*windows, *(part for tail in tails for part in tail)])
        return Snapshot(
            sequence.length,
            tuple(block.take(rows) for rows in windows),
            tuple((block.take(main), block.take(index)) for main, index in tails),
        )

    def restore(self, snapshot: Snapshot, pages: list[int]) -> Sequence:
        """A sequence that continues at the snapshot, sharing these pages (all before it)."""
        assert len(pages) * PAGE_TOKENS == snapshot.length, (len(pages), snapshot.length)
        sequence = self.open()
        for page in pages:
            self.pool.share(page)
        sequence.pages, sequence.length = list(pages), snapshot.length
        sequence.oldest = snapshot.length
        try:
            self._put_back(snapshot, sequence.slot)
        except BaseException:
            self.close(sequence)
            raise
        return sequence

    def _put_back(self, snapshot: Snapshot, slot: int) -> None:
        first = max(0, snapshot.length - self.config.sliding_window)
        near = torch.arange(first, snapshot.length, device=self.device)
        overlap = torch.arange(max(0, snapshot.length - CSA_RATIO), snapshot.length)
        tails = iter(snapshot.tails)
        for layer, rows in zip(self.layers, snapshot.windows, strict=True):
            layer.ring.rows[slot, near % layer.ring.per_page] = rows
            if layer.tail is not None and layer.index_tail is not None:
                main, index = next(tails)
                at = overlap.to(self.device) % layer.tail.shape[1]
                layer.tail[slot, at] = main
                layer.index_tail[slot, at] = index

    def nbytes(self, sequence: Sequence) -> int:
        """Bytes the sequence occupies: its pages (shared ones in full) and its slot."""
        page = layout.page_bytes(self.config, self.format)
        return len(sequence.pages) * page + layout.slot_bytes(self.config, self.format).total

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools and all slots, in use or not."""
        return self.pool.nbytes + self.slots * layout.slot_bytes(self.config, self.format).total


class _Block:
    """Memory of its own for the parts of a snapshot, outside of the heap on a CPU.

    A small block that lives long, between the large ones of a step that do not, keeps them from
    being used again as a whole: the heap would grow with every snapshot.
    """

    def __init__(self, device: torch.device, parts: list[Tensor]) -> None:
        self._at, self._room = 0, None
        if device.type == "cpu":
            room = mmap.mmap(-1, max(1, sum(map(_aligned, parts))))
            self._room = torch.frombuffer(room, dtype=torch.uint8)

    def take(self, part: Tensor) -> Tensor:
        """A copy of the part in the block; elsewhere the part itself, which nobody else has."""
        if self._room is None:
            return part
        here = self._room[self._at : self._at + part.nbytes].view(part.dtype).view(part.shape)
        self._at += _aligned(part)
        return here.copy_(part)


def _aligned(part: Tensor) -> int:
    return -(-part.nbytes // 64) * 64
