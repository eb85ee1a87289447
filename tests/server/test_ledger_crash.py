"""Processes killed under load: the ledger is the sum of what was acknowledged, nothing twice.

Races without kills: test_ledger_race.py.
"""

import random
import time
from pathlib import Path

import sqlalchemy as sa

from overleap.server.auth import create_key
from overleap.server.database import Database, entries, keys, owners, windows
from overleap.server.ledger import Ledger
from overleap.server.reports import check_books
from tests.server.accounts import tiers_of
from tests.server.ledger_users import Users, hold_against, read_journal, users

KILLS = 30
LIMITS = {"concurrent_requests": 24}


def order_of(where: str, key: str, folder: Path, seed: int, rounds: int) -> dict[str, object]:
    (folder / "go").touch()
    return {
        "where": where,
        "key": key,
        "limits": LIMITS,
        "folder": str(folder),
        "tasks": 8,
        "seed": seed,
        "rounds": rounds,
    }


def started(forked: Users, order: dict[str, object], folder: Path) -> int:
    """A user that serves: it has opened the ledger."""
    child = forked.start(order)
    forked.until_ready(folder, [child])
    return child


def some_time(folder: Path, draw: random.Random) -> None:
    """A moment in the middle of work, however slow the machine: a few more lines, and a bit."""
    journal = folder / "journal"
    enough = (journal.stat().st_size if journal.exists() else 0) + draw.randint(1, 2000)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.stat().st_size < enough:
        assert time.monotonic() < deadline, "nothing is being settled"
        time.sleep(0.002)
    time.sleep(draw.random() * 0.02)


def test_kills_under_load(where: str, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    database = Database(where)
    _, key = create_key(database, tiers_of(**LIMITS), user="alice", tier="test")
    slowest, refunded = 0.0, 0
    with users() as forked:
        for kill in range(KILLS):
            order = order_of(where, key, tmp_path, seed + 100 * kill, 10**6)
            child = started(forked, order, tmp_path)
            some_time(tmp_path, draw)
            forked.kill(child)
            began = time.perf_counter()
            again = Database(where)
            with Ledger(again) as ledger:
                slowest = max(slowest, time.perf_counter() - began)
                refunded += ledger.refunded_at_start
            again.close()
            assert check_books(database) == []
    print(f"{KILLS} kills, {refunded} orphans refunded, slowest restart {slowest:.2f} s")
    settle_down(where)
    journal = read_journal(tmp_path / "journal")
    hold_against(database, journal)
    assert len(journal.did) > KILLS and refunded > 0
    assert slowest < 5
    nothing_is_open(database)
    database.close()


def settle_down(where: str) -> None:
    """PostgreSQL may learn of the last death a moment after the restart."""
    deadline = time.monotonic() + 10
    database = Database(where)
    while True:
        Ledger(database).close()
        with database.read() as connection:
            if not connection.execute(sa.select(owners)).all():
                break
        assert time.monotonic() < deadline
    database.close()


def nothing_is_open(database: Database) -> None:
    with database.read() as connection:
        states = set(connection.scalars(sa.select(entries.c.state)))
        assert states <= {"settled", "refunded"}
        assert set(connection.scalars(sa.select(keys.c.reserved))) == {0}
        assert set(connection.scalars(sa.select(windows.c.reserved))) == {0}
        assert connection.execute(sa.select(owners)).all() == []


def test_a_living_sibling_keeps_its_reservations(where: str, tmp_path: Path, seed: int) -> None:
    """Of two processes on one ledger one is killed again and again, the other never notices."""
    draw = random.Random(seed)
    database = Database(where)
    _, key = create_key(database, tiers_of(**LIMITS), user="alice", tier="test")
    with users() as forked:
        order = order_of(where, key, tmp_path, seed, 100)
        living = started(forked, order, tmp_path)
        for kill in range(3):
            order = order_of(where, key, tmp_path, seed + 100 * (kill + 1), 10**6)
            child = started(forked, order, tmp_path)
            some_time(tmp_path, draw)
            forked.kill(child)
        assert forked.collect() == (living, 0), "the living one met a refunded request"
    settle_down(where)
    hold_against(database, read_journal(tmp_path / "journal"))
    assert check_books(database) == []
    nothing_is_open(database)
    database.close()
