"""A folder of units that survives kills, power cuts, full disks and other processes.

Not here: what a unit is (unit.py), its bytes (packing.py), the table of units (index.py), single
files (durable.py). No torch.
Raises OSError and the index's errors; disk.py sees to it that no request fails of them.

    key                 32 random bytes: who cannot read them cannot forge a unit
    overleap.lock       held together by all who use the folder; who gets it alone, repairs it
    index.sqlite        which units there are; made again from the files when lost
    <name>.safetensors  the units

A write: temporary name, fsync; then in one change of the index, while no other process writes,
rename and row; then fsync of the folder. A kill leaves a temporary file, a file without a row or
a row without a file: each is recognised.
"""

import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from overleap.cache import durable
from overleap.cache.index import ERRORS, Entry, Index
from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.unit import (
    KEY_BYTES,
    MAC_BYTES,
    Unit,
    Unsound,
    header_bytes,
    is_name,
    unit_of,
)
from overleap.errors import CapacityError

FREE_SHARE = 0.05  # of the disk stays free
LOCK_S = 5.0  # how long another process may take to repair the folder
_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_INDEX, _LOCK = "index.sqlite", "overleap.lock"
_CHUNK = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class DiskStats:
    """What is on disk, and what this process did with it.

    units, texts      files, and those of them at which a text ends
    bytes, tokens     of all units; with units and texts 0 where the index does not answer
    hits, hit_tokens  times and tokens read back
    written, refused  units written; not written because they do not fit
    dropped, evicted  units removed because they were unsound; to make room
    errors, problem   failures of the disk or the index, and the last of them
    """

    folder: Path
    space_bytes: int
    units: int = 0
    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    written: int = 0
    refused: int = 0
    dropped: int = 0
    evicted: int = 0
    errors: int = 0
    problem: str | None = None


class Store:
    """The folder, open. Any number of processes of one user may have it open.

    folder       made if missing (0700); else it must be such a folder, or empty, and the user's
    space_bytes  what the units may take; the least recently used texts go first, from their ends
    """

    def __init__(self, folder: Path, space_bytes: int) -> None:
        self.folder, self.space_bytes = folder.absolute(), space_bytes
        durable.own(self.folder, _LOCK)
        self._lock = os.open(self._at(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.index = self._open()
            self.key = bytes(durable.read(self._at("key"), KEY_BYTES))
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Let go of the folder. Twice is harmless."""
        if self._lock >= 0:
            self.index.close()
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1

    # -- units

    def read(self, entry: Entry, size: int) -> bytearray:
        """The bytes of a unit, if there are `size`. Raises Unsound, OSError."""
        return durable.read(self._path_of(entry.unit.name), size)

    def put(self, unit: Unit, data: bytearray, spare: Sequence[str]) -> bool:
        """Write a unit, and mark it and those of `spare` as used now.

        False where it does not fit or its parent has gone meanwhile.
        """
        path = self._path_of(unit.name)
        partial = self._at(f".{unit.name}.{os.getpid()}.{secrets.token_hex(4)}{_PARTIAL}")
        placed = False
        try:
            durable.write_new(partial, data)
            with self.index.changes():
                orphan = unit.parent and self.index.get(unit.parent) is None
                if orphan or self.index.bytes() + len(data) > self.space_bytes:
                    return False
                os.replace(partial, path)
                placed = True
                self.index.add(unit, len(data), used=0)
                self.index.touch(spare)
        except BaseException:
            if placed:  # without its row nobody would count the space it takes
                with suppress(OSError):
                    os.unlink(path)
            raise
        finally:
            if not placed:
                with suppress(OSError):
                    os.unlink(partial)
        durable.sync(self.folder)
        return True

    def make_room(self, size: int, spare: Collection[str]) -> int | None:
        """Evict until `size` bytes fit. Returns how many units went.

        None, and none went, where they do not fit beside `spare` or the disk is nearly full.
        """
        disk = os.statvfs(self.folder)
        free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if whole and free - size < FREE_SHARE * whole:
            return None
        return self._evict(size, spare)

    def drop(self, entry: Entry) -> bool:
        """Remove a unit and what hangs on it; False if another process changed it meanwhile."""
        with self.index.changes():
            if self.index.get(entry.unit.name) != entry:
                return False
            names = self.index.below(entry.unit.name)
            self._unlink(names)
            self.index.remove(names)
        return True

    def stats(self) -> DiskStats:
        """What is there."""
        units, size, pages, texts = self.index.totals()
        return DiskStats(
            folder=self.folder,
            space_bytes=self.space_bytes,
            units=units,
            texts=texts,
            bytes=size,
            tokens=pages * PAGE_TOKENS,
        )

    def clear(self) -> None:
        """Remove all units."""
        with self.index.changes():
            self.index.remove([entry.unit.name for entry in list(self.index.entries())])
            self._unlink(self._names_on_disk())

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte; drop what is unsound. One sentence for each such file."""
        found = []
        entries = list(self.index.entries())
        done, total = 0, sum(entry.size for entry in entries)
        for entry in entries:
            try:
                self._check(entry)
            except (Unsound, OSError) as error:
                if self.drop(entry):
                    found.append(f"{entry.unit.name}{_SUFFIX} {error}")
            done += entry.size
            if progress:
                progress(done, total)
        self._reconcile()
        return found

    def _evict(self, size: int, spare: Collection[str]) -> int | None:
        with self.index.changes():
            excess = self.index.bytes() + size - self.space_bytes
            going = []
            for entry in self.index.idle(spare) if excess > 0 else ():
                going.append(entry.unit.name)
                excess -= entry.size
                if excess <= 0:
                    break
            if excess > 0:
                return None
            self._unlink(going)
            self.index.remove(going)
        return len(going)

    def _check(self, entry: Entry) -> None:
        """Raises Unsound or OSError unless the file is one that we wrote, under its own name."""
        handle = os.open(self._path_of(entry.unit.name), durable.READ)
        try:
            if _claim(handle) != entry:
                raise Unsound("is not the unit of this name")
            os.lseek(handle, 0, os.SEEK_SET)
            mac, left = blake3(key=self.key), entry.size - MAC_BYTES
            while left and (chunk := os.read(handle, min(left, _CHUNK))):
                mac.update(chunk)
                left -= len(chunk)
            if not secrets.compare_digest(mac.digest(), os.read(handle, MAC_BYTES)):
                raise Unsound("does not have the bytes that were written")
        finally:
            os.close(handle)

    # -- opening

    def _open(self) -> Index:
        """Take the lock and open the index; who has the folder alone repairs it first."""
        alone = durable.take(self._lock, alone=True)
        index = self._repair() if alone else None
        until = time.monotonic() + LOCK_S
        # Who changes a lock has none for a moment, in which another process may take it.
        while not durable.take(self._lock, alone=False):
            if time.monotonic() > until:
                raise TimeoutError("another process is repairing it")
            time.sleep(0.05)
        if index is None and not self._has_key():
            raise FileNotFoundError("its key is gone, and another process is using it")
        return index or Index(self._at(_INDEX))

    def _repair(self) -> Index:
        """Key, index and files as they must be, whatever was left behind."""
        if not self._has_key():  # what was written under a lost key is of no use
            self._forget_index()
            self._unlink(self._names_on_disk())
            with suppress(FileNotFoundError):
                os.unlink(self._at("key"))
            durable.write_new(self._at("key"), secrets.token_bytes(KEY_BYTES))
            durable.sync(self.folder)
        for name in os.listdir(self.folder):
            if name.endswith(_PARTIAL):
                os.unlink(self._at(name))
        try:
            return self._sound_index()
        except ERRORS:
            self._forget_index()
            return self._sound_index()

    def _sound_index(self) -> Index:
        os.close(os.open(self._at(_INDEX), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        index = self.index = Index(self._at(_INDEX))
        try:
            index.check()
            self._reconcile()
            self._evict(0, ())
        except BaseException:
            index.close()
            raise
        return index

    def _reconcile(self) -> None:
        """Forget rows without a file; take files without a row in, or remove them."""
        with self.index.changes():
            there = set(self._names_on_disk())
            rows = {entry.unit.name: entry.unit for entry in self.index.entries()}
            lost = [
                name
                for name, unit in rows.items()
                if name not in there or (unit.parent and unit.parent not in rows)
            ]
            gone = {below for name in lost for below in self.index.below(name)}
            self.index.remove(gone)
            known = rows.keys() - gone
            for entry in sorted(self._claims(there - known), key=lambda entry: entry.unit.first):
                if not entry.unit.parent or entry.unit.parent in known:
                    self.index.add(entry.unit, entry.size, used=0)
                    known.add(entry.unit.name)
            self._unlink(there - known)

    def _claims(self, names: Iterable[str]) -> list[Entry]:
        """What the files of these names say that they are, where that is their own name."""
        found = []
        for name in names:
            with suppress(Unsound, OSError):
                handle = os.open(self._path_of(name), durable.READ)
                try:
                    entry = _claim(handle)
                finally:
                    os.close(handle)
                if entry.unit.name == name:
                    found.append(entry)
        return found

    # -- files

    def _at(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _path_of(self, name: str) -> str:
        assert is_name(name), name
        return self._at(name + _SUFFIX)

    def _has_key(self) -> bool:
        try:
            return len(durable.read(self._at("key"), KEY_BYTES)) == KEY_BYTES
        except (OSError, Unsound):
            return False

    def _forget_index(self) -> None:
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(self._at(_INDEX + ending))

    def _names_on_disk(self) -> list[str]:
        names = [name for name in os.listdir(self.folder) if name.endswith(_SUFFIX)]
        return [name for name in (name.removesuffix(_SUFFIX) for name in names) if is_name(name)]

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self._path_of(name))


def open_store(folder: Path, space_bytes: int) -> Store:
    """The store in a folder. CapacityError, in a sentence, where the folder cannot be used."""
    try:
        return Store(folder, space_bytes)
    except (OSError, *ERRORS, Unsound) as error:
        raise CapacityError(
            f"{folder} cannot keep what was read: {error}",
            "name another folder, or go on without keeping",
        ) from None


def _claim(handle: int) -> Entry:
    """What a file says that it is. Raises Unsound."""
    size = os.fstat(handle).st_size
    count = header_bytes(os.read(handle, 8), size)
    return Entry(unit_of(os.read(handle, count)), size)
