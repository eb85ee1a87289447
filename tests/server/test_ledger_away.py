"""A ledger that does not answer: requests are refused in time, and a server told to stop ends.

A ledger that answers with errors: test_ledger.py.
"""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from overleap.errors import LedgerError
from overleap.server import database as databases
from overleap.server import ledger as ledgers
from overleap.server.auth import create_key
from overleap.server.database import Database, entries
from overleap.server.ledger import Ledger
from overleap.server.reports import check_books
from overleap.server.tiers import load_tiers
from tests.server import load
from tests.server.accounts import customer_of
from tests.server.live import NAME, Live, live, scripted

SOME = {"model": NAME, "prompt": "a\n", "max_tokens": 2}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process has begun to write, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


async def refused(port: int, requests: int) -> None:
    """So many requests at once, all told that it is the ledger."""
    sent = [load.send(port, "POST", "/v1/completions", SOME) for _ in range(requests)]
    for status, _, raw in await asyncio.gather(*sent):
        assert (status, json.loads(raw)["error"]["code"]) == (503, "ledger_unavailable")


def port_of(server: Live) -> int:
    return int(server.url.rpartition(":")[2])


def test_requests_are_refused_while_another_holds_the_lock(tmp_path: Path) -> None:
    with live(tmp_path, scripted(lambda prompt: "Yes.")) as server:
        with locked(tmp_path / "ledger.sqlite"):
            began = time.monotonic()
            asyncio.run(refused(port_of(server), 8))
            assert time.monotonic() - began < ledgers.PATIENCE_S + 4
        assert asyncio.run(load.send(port_of(server), "POST", "/v1/completions", SOME))[0] == 200
        assert check_books(server.database) == []


def test_a_server_that_is_told_to_stop_ends_beside_a_held_lock(tmp_path: Path) -> None:
    with locked_after_start(tmp_path) as server:
        asked = threading.Thread(target=lambda: asyncio.run(refused(port_of(server), 8)))
        asked.start()
        while server.service.everyone.coming < 8:
            time.sleep(0.01)
        began = time.monotonic()
        server.stop()
        asked.join(60)
        while server.service.bridge._thread.is_alive() or not server.service.ledger._closed:
            assert time.monotonic() - began < 60
            time.sleep(0.05)
    took = time.monotonic() - began
    assert took < 1 + ledgers.PATIENCE_S + ledgers.CLOSE_S + 4, "of a drain of 1 s"


@contextmanager
def locked_after_start(folder: Path) -> Iterator[Live]:
    """A server whose ledger is locked until it has ended."""
    path = folder / "ledger.sqlite"
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as connection,
        live(folder, scripted(lambda prompt: "Yes.")) as server,
    ):
        connection.execute("BEGIN IMMEDIATE")
        yield server


def test_every_step_of_the_end_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(tmp_path, scripted(lambda prompt: "Yes.")) as server:

        async def never() -> None:
            raise TimeoutError

        monkeypatch.setattr(server.service.everyone, "wait", never)
    assert not server.service.bridge._thread.is_alive()
    assert server.service.ledger._closed


def test_what_comes_late_is_given_back(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reservation is made after its request was refused, one is not begun any more."""
    customer = customer_of(database)
    with Ledger(database) as ledger:
        books, opened = ledger._books, threading.Event()
        reserve = books.reserve

        def late(terms: ledgers.Terms) -> None:
            opened.wait(60)
            reserve(terms)

        monkeypatch.setattr(books, "reserve", late)
        monkeypatch.setattr(ledgers, "PATIENCE_S", 0.2)

        async def ask() -> None:
            with pytest.raises(LedgerError, match="did not answer"):
                async with ledger.reserve(customer, 9, 1):
                    raise AssertionError("it was let in")

        async def both() -> None:
            await asyncio.gather(ask(), ask())

        asyncio.run(both())
        opened.set()
    with database.read() as connection:
        assert connection.scalars(sa.select(entries.c.state)).all() == ["refunded"]
    assert check_books(database) == []


def test_closing_does_not_wait_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, opened = Ledger(database), threading.Event()
    monkeypatch.setattr(ledgers, "CLOSE_S", 0.1)
    ledger._thread.submit(opened.wait, 60)
    with pytest.raises(LedgerError, match="did not close"):
        ledger.close()
    opened.set()


def test_who_asks_is_found_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(tmp_path, scripted(lambda prompt: "Yes."), needs_keys=True) as server:
        opened = threading.Event()
        monkeypatch.setattr(ledgers, "PATIENCE_S", 0.2)
        monkeypatch.setattr(
            server.service.auth, "authorize", lambda authorization, access: opened.wait(60)
        )
        asyncio.run(refused(port_of(server), 1))
        opened.set()


def test_postgresql_that_does_not_answer_is_given_up(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What both sides of a connection to it bound, and that a lock of another ends in time."""
    database = Database(postgres)
    create_key(database, load_tiers(), user="alice", tier="free")
    with database.write() as connection:
        raw = connection.connection.dbapi_connection
        assert isinstance(raw, psycopg.Connection)
        told = raw.info.get_parameters()
        assert (told["keepalives_idle"], told["keepalives_interval"]) == ("10", "5")
        assert (told["keepalives_count"], told["tcp_user_timeout"]) == ("3", "15000")
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "30s"
        assert connection.scalar(sa.text("SHOW lock_timeout")) == "15s"
    database.close()
    soon = databases._POSTGRES["options"].replace("lock_timeout=15000", "lock_timeout=300")
    monkeypatch.setitem(databases._POSTGRES, "options", soon)
    database = Database(postgres)
    with database.write() as connection, pytest.raises(LedgerError, match="lock timeout"):
        connection.execute(sa.text("LOCK TABLE keys"))
        create_key(database, load_tiers(), user="bob", tier="free")
    database.close()
