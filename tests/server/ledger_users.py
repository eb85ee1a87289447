"""Starts, kills and reads after the processes of ledger_worker.py. Not a test itself."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from overleap.server.database import Database, entries

ROOT = Path(__file__).resolve().parents[2]


class Users:
    """The process that forks users."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.running: set[int] = set()
        self._ended: list[tuple[int, int]] = []  # while another was waited for

    def start(self, order: dict[str, Any]) -> int:
        """Fork one. Returns its process id."""
        child = int(self._ask(json.dumps(order)))
        self.running.add(child)
        return child

    def until_ready(self, folder: Path, children: Iterable[int]) -> None:
        """Wait until these have opened the ledger, for a minute at most."""
        missing = {folder / f"ready-{child}" for child in children}
        deadline = time.monotonic() + 60
        while missing := {path for path in missing if not path.exists()}:
            assert time.monotonic() < deadline, missing
            time.sleep(0.005)

    def collect(self) -> tuple[int, int]:
        """Wait for one that ended: its process id, and how."""
        return self._ended.pop() if self._ended else self._next()

    def _next(self) -> tuple[int, int]:
        child, status = map(int, self._ask("wait").split())
        self.running.remove(child)
        return child, status

    def kill(self, child: int) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(child, signal.SIGKILL)
        while (ended := self._next())[0] != child:
            self._ended.append(ended)
        assert ended[1] == signal.SIGKILL, f"it had ended with {ended[1]}"

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextmanager
def users() -> Iterator[Users]:
    """Users of ledgers, none of which outlives the block."""
    command = [sys.executable, "-m", "tests.server.ledger_worker"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        forked = Users(process)
        try:
            yield forked
        finally:
            for child in forked.running:  # a test that failed left them
                os.kill(child, signal.SIGKILL)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


class Journal(NamedTuple):
    """What users said: settlements they were about to ask for, and those that were acknowledged."""

    will: dict[str, tuple[int, ...]]
    did: dict[str, tuple[int, ...]]


def read_journal(path: Path) -> Journal:
    journal = Journal({}, {})
    for line in path.read_text().splitlines():
        word, name, *tokens = json.loads(line)
        known = journal.will if word == "will" else journal.did
        assert name not in known, f"{name} was settled twice"
        known[name] = tuple(tokens)
    return journal


def settled(database: Database) -> dict[str, tuple[int, ...]]:
    """Tokens of every entry that was charged."""
    columns = (
        entries.c.id, entries.c.cache_hit_tokens,
        entries.c.cache_miss_tokens, entries.c.output_tokens,
    )  # fmt: skip
    with database.read() as connection:
        rows = connection.execute(sa.select(*columns).where(entries.c.state == "settled"))
        return {row[0]: tuple(row[1:]) for row in rows}


def hold_against(database: Database, journal: Journal) -> None:
    """Acknowledged settlements are in the ledger, once and exactly; nothing else is, save what was
    being settled at the moment of a kill."""
    booked = settled(database)
    assert {name: booked.get(name) for name in journal.did} == journal.did
    for name, tokens in booked.items():
        assert journal.will.get(name) == tokens, name
