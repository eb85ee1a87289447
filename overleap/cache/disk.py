"""Prefixes on disk: beyond the memory, and beyond the process.

It is a convenience, so nothing here fails a request: what cannot be written is not kept, what is
not to the last bit as it was written is dropped and computed again, and stats() counts both.
Not here: files (store.py), their bytes (packing.py). Read next: prefix.py (who asks and keeps).
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from overleap.cache.index import ERRORS, Entry
from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.packing import form_of, pack, put_pages, snapshot_of, unpack
from overleap.cache.state import Cache, Snapshot
from overleap.cache.store import DiskStats, open_store
from overleap.cache.unit import UNIT_PAGES, Unit, Unsound

BURST_UNITS = 16  # written at one boundary at most; the next boundary goes on


class DiskTier:
    """Prefixes in a folder, for one process among any number of one user.

    folder       made if missing (0700); else it must be such a folder, or empty, and the user's
    space_bytes  what the prefixes may take; the least recently used texts go first, from their
                 ends. Nothing is written that leaves the disk less than 5 % free

    Raises CapacityError where the folder cannot be used. After that nothing raises. It may be
    closed, and is when the process ends.
    """

    def __init__(self, folder: Path, *, space_bytes: int) -> None:
        self._counts: Counter[str] = Counter()
        self._problem: str | None = None
        self._off = False
        self._store = open_store(folder, space_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder. Nothing is kept or found afterwards; twice is harmless."""
        self._off = True
        self._store.close()

    def keep(
        self,
        cache: Cache,
        model_digest: str,
        chain: Sequence[bytes],
        pages: Sequence[int],
        snapshot: Snapshot,
    ) -> None:
        """Write a snapshot and what of the pages before it is not there yet.

        chain  names of a text's pages, at least of those before the snapshot
        pages  their numbers in the pool of `cache`
        """
        if self._off:
            return
        depth = snapshot.length // PAGE_TOKENS
        names = [name.hex() for name in chain[:depth]]
        with self._guarded():
            index = self._store.index
            known = index.get(names[-1])
            if known is not None and known.unit.snapshot:
                with index.changes():
                    index.touch(names)
                return
            base = index.deepest(names[:-1], snapshot=False)
            first = base.unit.last if base else 0
            if base and names[first - 1 : first] != [base.unit.name]:
                self._drop(base)
                return
            for start in range(first, depth, UNIT_PAGES)[:BURST_UNITS]:
                end = min(depth, start + UNIT_PAGES)
                parent = names[start - 1] if start else ""
                unit = Unit(names[end - 1], parent, start, end, end == depth)
                if not self._put(unit, cache, model_digest, pages, snapshot, names):
                    self._counts["refused"] += 1
                    return

    def touch(self, chain: Sequence[bytes]) -> None:
        """The text was used, be it from memory."""
        if self._off:
            return
        with self._guarded(), self._store.index.changes():
            self._store.index.touch([name.hex() for name in chain])

    def fetch(
        self,
        cache: Cache,
        model_digest: str,
        chain: Sequence[bytes],
        known: Sequence[int],
        beyond: int,
    ) -> tuple[list[int], Snapshot] | None:
        """The deepest snapshot on disk along a text, and the pages before it.

        known    numbers of the text's first pages, as far as the pool has them already
        beyond   a snapshot after this many of them or fewer is of no use
        returns  `known` as far as it is needed, then fresh pages, which the caller now holds;
                 None where there is nothing, or where free pages do not suffice
        """
        assert beyond <= len(known), (beyond, len(known))
        if self._off:
            return None
        held: list[int] = []
        found: Snapshot | None = None
        with self._guarded():
            path = self._path([name.hex() for name in chain], len(known), beyond)
            end = path[-1].unit.last if path else 0
            if not path or end - len(known) > cache.pool.free:
                return None
            held = cache.pool.take(max(0, end - len(known)))
            pages = [*known[:end], *held]
            for entry in path:
                tensors = self._read(entry, cache, model_digest)
                if tensors is None:
                    break
                unit = entry.unit
                skip = min(max(0, len(known) - unit.first), unit.last - unit.first)
                put_pages(cache, tensors, skip, pages[unit.first + skip : unit.last])
                if unit.snapshot:
                    found = snapshot_of(cache, unit, tensors)
        depth = found.length // PAGE_TOKENS if found else 0
        useful = max(0, depth - len(known))
        for page in held[useful:]:
            cache.pool.release(page)
        if found is None:
            return None
        self._counts["hits"] += 1
        self._counts["hit_tokens"] += (depth - beyond) * PAGE_TOKENS
        self.touch(chain[:depth])
        return [*known[:depth], *held[:useful]], found

    def stats(self) -> DiskStats:
        """What is there, and what was done."""
        there = DiskStats(folder=self._store.folder, space_bytes=self._store.space_bytes)
        if not self._off:
            with self._guarded():
                there = self._store.stats()
        return replace(
            there,
            hits=self._counts["hits"],
            hit_tokens=self._counts["hit_tokens"],
            written=self._counts["written"],
            refused=self._counts["refused"],
            dropped=self._counts["dropped"],
            evicted=self._counts["evicted"],
            errors=self._counts["errors"],
            problem=self._problem,
        )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte; drop what is unsound. One sentence for each such file."""
        found: list[str] = []
        if not self._off:
            with self._guarded():
                found = self._store.verify(progress)
        self._counts["dropped"] += len(found)
        return found

    def clear(self) -> None:
        """Remove everything that was kept."""
        if not self._off:
            with self._guarded():
                self._store.clear()

    def _put(
        self,
        unit: Unit,
        cache: Cache,
        model_digest: str,
        pages: Sequence[int],
        snapshot: Snapshot,
        names: Sequence[str],
    ) -> bool:
        """Write one unit of the text of these names; False where it does not fit."""
        form = form_of(unit, cache, model_digest)
        evicted = self._store.make_room(form.size, set(names))
        if evicted is None:
            return False
        self._counts["evicted"] += evicted
        ends_here = snapshot if unit.snapshot else None
        data = pack(form, self._store.key, cache, pages[unit.first : unit.last], ends_here)
        written = self._store.put(unit, data, names)
        self._counts["written"] += written
        return written

    def _path(self, names: list[str], known: int, beyond: int) -> list[Entry]:
        """Units from the known pages to the deepest snapshot, in order; empty for none."""
        index = self._store.index
        while end := index.deepest(names[beyond:], snapshot=True):
            path = [end]
            while _fits(path[-1].unit, names):
                unit = path[-1].unit
                if unit.first <= known:
                    return path[::-1]
                above = index.get(unit.parent)
                if above is None or above.unit.last != unit.first:
                    break
                path.append(above)
            if not self._drop(path[-1]):  # it leads nowhere
                break
        return []

    def _read(self, entry: Entry, cache: Cache, model_digest: str) -> dict[str, Tensor] | None:
        """The tensors of a unit; None, and the unit is dropped, unless all of it is as written."""
        form = form_of(entry.unit, cache, model_digest)
        try:
            return unpack(self._store.read(entry, form.size), form, self._store.key)
        except (Unsound, FileNotFoundError):
            self._drop(entry)
            return None

    def _drop(self, entry: Entry) -> bool:
        dropped = self._store.drop(entry)
        self._counts["dropped"] += dropped
        return dropped

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Nothing is worth failing a request for: count the error and go on."""
        try:
            yield
        # What torch cannot allocate is a RuntimeError.
        except (OSError, MemoryError, RuntimeError, *ERRORS) as error:
            self._counts["errors"] += 1
            self._problem = f"{type(error).__name__}: {error}"
            # A damaged index is made again by the next process that has the folder alone.
            damaged = isinstance(error, sqlite3.DatabaseError | UnicodeError)
            self._off = damaged and not isinstance(error, sqlite3.OperationalError)


def _fits(unit: Unit, names: Sequence[str]) -> bool:
    """Whether a unit is part of the text of these names."""
    return (
        unit.last <= len(names)
        and names[unit.last - 1] == unit.name
        and unit.parent == (names[unit.first - 1] if unit.first else "")
    )
