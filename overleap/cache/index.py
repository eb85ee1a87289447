"""Which units are on disk, in SQLite: what hangs on what, how large, how long unused.

A helper that may be wrong or lost: files speak for themselves (unit.py), and disk.py rebuilds it
from them. Not here: files. All methods raise ERRORS.
"""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from overleap.cache.unit import Unit, is_sensible

VERSION = 1
ERRORS = (sqlite3.Error, UnicodeError)  # SQLite's own words about a damaged file may be damaged
BUSY_S = 2.0  # how long to wait for another process's change
_LIMIT = 2**60  # of any number in it
_BATCH = 500  # names in one statement; SQLite's own limit was 999 for long
_COLUMNS = "name, parent, first, last, snapshot, size"
_SCHEMA = """
CREATE TABLE units (
    name TEXT PRIMARY KEY, parent TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    snapshot INTEGER NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX by_parent ON units (parent);
CREATE INDEX by_use ON units (used, last DESC);
"""


@dataclass(frozen=True)
class Entry:
    """A unit and the bytes of its file."""

    unit: Unit
    size: int


class Index:
    """The table of units. `used` is a counter, not a clock: no clock of ours runs backwards.

    A unit is never used later than its parent, so the least recently used is never a parent of
    something newer.
    """

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(
            path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with self.changes():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"the index has version {version}, not {VERSION}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close it. Twice is harmless."""
        with suppress(sqlite3.Error):
            self._db.close()

    def check(self) -> None:
        """Raises sqlite3.DatabaseError where the file is damaged."""
        # Not quick_check: it passes rows that the two other indexes have lost.
        (verdict,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        self.next_use()

    @contextmanager
    def changes(self) -> Iterator[None]:
        """A block whose changes happen together or not at all, with no other writer meanwhile."""
        if self._db.in_transaction:  # an earlier block could not even roll back
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def get(self, name: str) -> Entry | None:
        """The unit of this name."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM units WHERE name = ?", (name,)).fetchone()
        return _entry(row) if row else None

    def deepest(self, names: Sequence[str], *, snapshot: bool) -> Entry | None:
        """The last of these names that is there; with a snapshot, if that is asked for."""
        for end in range(len(names), 0, -_BATCH):
            some = names[max(0, end - _BATCH) : end]
            row = self._db.execute(
                f"SELECT {_COLUMNS} FROM units WHERE name IN ({_marks(some)}) AND snapshot >= ? "
                "ORDER BY last DESC LIMIT 1",
                (*some, int(snapshot)),
            ).fetchone()
            if row:
                return _entry(row)
        return None

    def add(self, unit: Unit, size: int, *, used: int) -> None:
        """Put a unit in, or in the place of the one of its name."""
        values = (unit.name, unit.parent, unit.first, unit.last, unit.snapshot, size, used)
        self._db.execute("INSERT OR REPLACE INTO units VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def next_use(self) -> int:
        """A number above that of every earlier use."""
        (latest,) = self._db.execute("SELECT max(used) FROM units").fetchone()
        if not isinstance(latest, int | None) or not 0 <= (latest or 0) < _LIMIT:
            raise sqlite3.DatabaseError(f"the index says that unit {latest!r:.40} was used")
        return (latest or 0) + 1

    def touch(self, names: Sequence[str]) -> None:
        """These units are in use now."""
        now = self.next_use()
        for first in range(0, len(names), _BATCH):
            some = names[first : first + _BATCH]
            self._db.execute(
                f"UPDATE units SET used = ? WHERE name IN ({_marks(some)})", (now, *some)
            )

    def below(self, name: str) -> list[str]:
        """The unit and all that hangs on it."""
        # UNION, not UNION ALL: a damaged index may hold a circle.
        rows = self._db.execute(
            "WITH RECURSIVE found(name) AS (SELECT ? UNION SELECT units.name FROM units "
            "JOIN found ON units.parent = found.name) SELECT name FROM found",
            (name,),
        )
        return [row[0] for row in rows]

    def remove(self, names: Collection[str]) -> None:
        """Forget these units."""
        self._db.executemany("DELETE FROM units WHERE name = ?", [(name,) for name in names])

    def idle(self, spare: Collection[str]) -> Iterator[Entry]:
        """Units in the order in which they should go, those of `spare` left out."""
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM units ORDER BY used, last DESC")
        return (_entry(row) for row in rows if row[0] not in spare)

    def entries(self) -> Iterator[Entry]:
        """All units."""
        return (_entry(row) for row in self._db.execute(f"SELECT {_COLUMNS} FROM units"))

    def totals(self) -> tuple[int, int, int, int]:
        """Units, their bytes, the pages in them, and units that nothing hangs on."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(last - first), 0), "
            "count(*) FILTER (WHERE name NOT IN (SELECT parent FROM units)) FROM units"
        ).fetchone()
        return int(row[0]), int(row[1]), int(row[2]), int(row[3])

    def bytes(self) -> int:
        """Bytes of all units."""
        (total,) = self._db.execute("SELECT coalesce(sum(size), 0) FROM units").fetchone()
        return int(total)


def _marks(names: Sequence[str]) -> str:
    return ", ".join("?" * len(names))


def _entry(row: tuple[str, str, int, int, int, int]) -> Entry:
    """A row as an entry. Raises DatabaseError for one that nobody of ours wrote."""
    entry = Entry(Unit(*row[:4], bool(row[4])), row[5])
    numbers = (entry.unit.first, entry.unit.last, entry.size)
    plain = all(isinstance(number, int) and 0 <= number < _LIMIT for number in numbers)
    if not plain or not is_sensible(entry.unit):
        raise sqlite3.DatabaseError(f"the index has a row that cannot be: {row!r:.200}")
    return entry
