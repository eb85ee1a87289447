"""Many processes on one key: no quota or balance is overspent by a token or a nano-unit.

Kills: test_ledger_crash.py.
"""

from pathlib import Path

import sqlalchemy as sa

from overleap.server.auth import create_key
from overleap.server.database import Database, entries, keys, windows
from overleap.server.reports import check_books
from tests.server.accounts import PRICE, tiers_of
from tests.server.ledger_users import hold_against, read_journal, users

WORKERS = 64


def race(where: str, folder: Path, seed: int, credit: int, **limits: int | bool) -> Database:
    """Let 64 processes use one key until nothing fits any more; watch the sums meanwhile."""
    database = Database(where)
    _, key = create_key(database, tiers_of(**limits), user="alice", tier="test", credit=credit)
    order = {
        "where": where,
        "key": key,
        "limits": limits,
        "folder": str(folder),
        "tasks": 1,
        "rounds": 10**6,
    }
    with users() as forked:
        running = {forked.start(order | {"seed": seed + worker}) for worker in range(WORKERS)}
        assert len(running) == WORKERS
        forked.until_ready(folder, running)
        (folder / "go").touch()
        while running:
            child, status = forked.collect()
            assert status == 0, child
            running.remove(child)
            watch(database, credit, **limits)
    return database


def watch(database: Database, credit: int, **limits: int | bool) -> None:
    """Used and reserved together are within the limits, at any moment."""
    with database.read() as connection:
        for window in connection.execute(sa.select(windows)):
            limit = limits.get("tokens_per_day" if len(window.period) == 10 else "tokens_per_month")
            assert limit is None or window.used + window.reserved <= limit
        key = connection.execute(sa.select(keys)).one()
        assert not limits.get("prepaid") or key.charged + key.reserved <= credit


def test_the_last_tokens_of_a_quota(where: str, tmp_path: Path, seed: int) -> None:
    limit, period = 30_000, ("day", "month")[seed % 2]
    database = race(where, tmp_path, seed, 0, **{f"tokens_per_{period}": limit})
    journal = read_journal(tmp_path / "journal")
    hold_against(database, journal)
    assert journal.will == journal.did
    used = sum(miss + output for _, miss, output in journal.did.values())
    with database.read() as connection:
        rows = connection.execute(sa.select(windows)).all()
    assert {(row.used, row.reserved) for row in rows} == {(used, 0)}
    assert limit - 1000 < used <= limit, "what was left is less than a request"
    assert check_books(database) == []
    database.close()


def test_the_last_of_a_balance(where: str, tmp_path: Path, seed: int) -> None:
    credit = 30_000 * PRICE.cache_miss
    database = race(where, tmp_path, seed, credit, prepaid=True)
    journal = read_journal(tmp_path / "journal")
    hold_against(database, journal)
    paid = sum(PRICE.of(*tokens) for tokens in journal.did.values())
    with database.read() as connection:
        key = connection.execute(sa.select(keys)).one()
    assert (key.charged, key.reserved) == (paid, 0) and paid <= credit
    assert credit - PRICE.worst(900, 100) < paid, "what was left is less than a request"
    assert check_books(database) == []
    database.close()


def test_requests_at_once_over_processes(where: str, tmp_path: Path, seed: int) -> None:
    database = Database(where)
    limits = {"concurrent_requests": 3}
    _, key = create_key(database, tiers_of(**limits), user="alice", tier="test")
    order = {
        "where": where,
        "key": key,
        "limits": limits,
        "folder": str(tmp_path),
        "tasks": 4,
        "rounds": 10,
    }
    with users() as forked:
        running = {forked.start(order | {"seed": seed + worker * 100}) for worker in range(4)}
        forked.until_ready(tmp_path, running)
        (tmp_path / "go").touch()
        most, count = 0, sa.select(sa.func.count()).where(entries.c.state == "open")
        while not all((tmp_path / f"done-{child}").exists() for child in running):
            with database.read() as connection:
                most = max(most, int(connection.scalar(count) or 0))
        assert {forked.collect()[1] for _ in running} == {0}
    assert most == 3
    hold_against(database, read_journal(tmp_path / "journal"))
    assert check_books(database) == []
    database.close()
