"""Two whole servers on one PostgreSQL ledger: one quota for both, and not a token over it."""

import http.client
import json
import random
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from overleap.server.auth import create_key
from overleap.server.database import Database, entries, windows
from overleap.server.reports import check_books
from overleap.server.tiers import load_tiers
from tests.server.test_served_crash import served

LIMIT, CLIENTS = 20_000, 32  # of each server
TIERS = f"""
currency = "USD"
[tiers.small]
tokens_per_day = {LIMIT}
price_per_million = {{ cache_hit = 1, cache_miss = 10, output = 20 }}
[tiers.admin]
admin = true
price_per_million = {{ cache_hit = 0, cache_miss = 0, output = 0 }}
"""


def spend(port: int, key: str, seed: int, told: list[int], statuses: set[int]) -> None:
    """Ask until the quota is used up; note the computed tokens of every answer."""
    draw = random.Random(seed)
    while True:
        words = " ".join(f"word{draw.randrange(1000)}" for _ in range(draw.randint(5, 60)))
        body = {"model": "overleap-mini", "prompt": words, "max_tokens": draw.randint(1, 16)}
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        statuses.add(response.status)
        if response.status != 200:
            return
        usage = answer["usage"]
        told.append(usage["prompt_cache_miss_tokens"] + usage["completion_tokens"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_servers_share_a_quota(postgres: str, tmp_path: Path, seed: int) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(TIERS)
    database = Database(postgres)
    _, key = create_key(database, load_tiers(tiers), user="alice", tier="small")
    options = ("--tiers", str(tiers), "--queue", "200")
    with served(postgres, *options) as (_, one, _), served(postgres, *options) as (_, two, _):
        told: dict[int, list[int]] = {one: [], two: []}
        statuses: set[int] = set()
        clients = [
            threading.Thread(
                target=spend, args=(port, key, seed + 1000 * n + port, told[port], statuses)
            )
            for port in told
            for n in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    spent = {port: sum(tokens) for port, tokens in told.items()}
    with database.read() as connection:
        rows = connection.execute(sa.select(windows)).all()
        states = {row.state for row in connection.execute(sa.select(entries))}
    day = next(row for row in rows if len(row.period) == 10)
    print(f"{spent[one]} and {spent[two]} tokens of {LIMIT}, booked {day.used}")
    assert statuses == {200, 402}
    assert day.used == spent[one] + spent[two] <= LIMIT
    assert day.used > LIMIT - 100, "what is left is less than a request"
    assert min(spent.values()) > LIMIT // 10, "both served"
    assert day.reserved == 0 and states == {"settled"}
    assert check_books(database) == []
    database.close()
