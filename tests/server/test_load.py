"""Load on a whole server, on whatever machine this is: targets are ratios, measured side by side.

The figures: `python -m tests.server.load mixed|overload`.
"""

import asyncio

import pytest

from overleap.engine import replay
from tests.server import load

LONG = 32_768  # by hand 131,072: minutes, and the same ratios


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_short_chats_beside_a_long_prompt(seed: int) -> None:
    with load.served() as server:
        found = asyncio.run(load.mixed(server.port, seed, long_tokens=LONG))
    print(found)
    assert found.read_tokens >= LONG
    assert found.beside_s <= 2 * found.alone_s, f"{found.beside_s / found.alone_s:.2f} times"
    assert found.mean_beside_s <= 2 * found.mean_alone_s
    assert found.first_beside_s <= 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twice_what_the_machine_can_do(seed: int) -> None:
    with load.served() as server:
        usual = asyncio.run(load.nominal(server.port, seed, seconds=15))
    with load.served(*load.patience(usual)) as server:
        rate = 2 * usual.capacity
        found = asyncio.run(load.overload(server, seed, rate=rate, seconds=20))
    print(usual, found)
    assert set(found.statuses) == {200, 503} and found.cut == 0
    assert found.refused > found.accepted / 4, "it was no overload"
    assert found.accepted_p99_s <= 2 * usual.p99_s, f"{found.accepted_p99_s / usual.p99_s:.2f}"
    assert found.refused_p99_s <= 0.1
    assert found.growth_bytes < 30e6 + replay.MOST_BYTES  # records of steps come with the load
    assert found.after_s <= usual.p99_s, "it recovers"
