"""A whole server killed 30 times while it answers: the bill is the sum of what clients were told.

The ledger alone, and on PostgreSQL: test_ledger_crash.py.
"""

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from overleap.server.auth import create_key
from overleap.server.database import Database, entries
from overleap.server.ledger import Ledger
from overleap.server.reports import check_books
from overleap.server.tiers import load_tiers

KILLS, CLIENTS = 30, 6
Told = dict[str, tuple[int, int, int]]  # request -> cache-hit, cache-miss and output tokens


@contextmanager
def served(
    ledger: Path | str, *options: str
) -> Iterator[tuple["subprocess.Popen[str]", int, float]]:
    """A server on the bundled model: its process, its port, and how long until it was ready.

    In seconds of processor, which do not depend on what else the machine does.
    """
    deadline = time.monotonic() + 120
    command = [
        sys.executable, "-m", "overleap.cli", "serve", "--port", "0", "--keys", "--no-keep",
        "--ledger", str(ledger), *options,
    ]  # fmt: skip
    environment = os.environ | {"COLUMNS": "500"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        port = int(found.group(1))
        while not is_ready(port):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        times = psutil.Process(process.pid).cpu_times()
        try:
            yield process, port, times.user + times.system
        finally:
            process.kill()
            process.wait()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def talk(port: int, key: str, seed: int, told: Told) -> None:
    """Chats one after the other until the server is gone; note the usage they were told."""
    draw = random.Random(seed)
    with suppress(OSError, http.client.HTTPException):
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                chat(connection, key, draw, told)
            finally:
                connection.close()


def chat(connection: http.client.HTTPConnection, key: str, draw: random.Random, told: Told) -> None:
    words = " ".join(f"word{draw.randrange(100)}" for _ in range(draw.randint(5, 60)))
    body = {
        "model": "overleap-mini", "messages": [{"role": "user", "content": words}],
        "max_tokens": draw.randint(1, 24), "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    name = response.getheader("x-request-id")
    assert name is not None
    for line in response:
        if line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage")
            if usage is not None:
                hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
                told[name] = (hit, miss, usage["completion_tokens"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_killed_under_load(tmp_path: Path, seed: int) -> None:
    draw, told = random.Random(seed), Told()
    ledger = tmp_path / "ledger.sqlite"
    database = Database(str(ledger))
    _, key = create_key(database, load_tiers(), user="alice", tier="admin")
    slowest = 0.0
    for kill in range(KILLS):
        with served(ledger) as (process, port, seconds):
            slowest = max(slowest, seconds)
            clients = [
                threading.Thread(target=talk, args=(port, key, seed + 100 * kill + client, told))
                for client in range(CLIENTS)
            ]
            for thread in clients:
                thread.start()
            time.sleep(draw.uniform(0.2, 2))
            process.send_signal(signal.SIGKILL)
            for thread in clients:
                thread.join(60)
                assert not thread.is_alive()
    with Ledger(database):
        pass  # refunds what the last one left open
    assert check_books(database) == []
    with database.read() as connection:
        rows = connection.execute(sa.select(entries)).all()
    booked = {
        row.id: (row.cache_hit_tokens, row.cache_miss_tokens, row.output_tokens)
        for row in rows
        if row.state == "settled"
    }
    untold = booked.keys() - told.keys()
    refunded = sum(row.state == "refunded" for row in rows)
    print(
        f"{KILLS} kills, {len(told)} answers told, {len(untold)} settled and not told, "
        f"{refunded} refunded, slowest start {slowest:.2f} s of processor"
    )
    assert {name: booked.get(name) for name in told} == told
    assert {row.state for row in rows} <= {"settled", "refunded"}
    assert len(untold) <= KILLS * CLIENTS, "only what was being told at a kill"
    assert len(told) > KILLS and refunded > 0
    database.close()
