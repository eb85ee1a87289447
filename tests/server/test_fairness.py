"""Two tiers at a server that is full: what each key gets, in answers, follows their priorities."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.live import NAME, live, scripted
from tests.server.test_tenants import post

TIERS = """
currency = "USD"
[tiers.low]
priority = 1
price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }
[tiers.high]
priority = 4
price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }
[tiers.admin]
admin = true
price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }
"""
ANSWERS, EACH = 300, 20


def test_answers_are_shared_by_the_priority_of_tiers(tmp_path: Path) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(TIERS)
    told: list[str] = []
    lock, enough = threading.Lock(), threading.Event()
    with live(
        # A step takes long enough for the clients to be back in time: somebody always waits.
        tmp_path, scripted(lambda prompt: "a b c d e f g h " * 4, slots=10, delay_s=0.02), slots=10,
        tiers=tiers, needs_keys=True,
    ) as server:  # fmt: skip
        keys = {tier: server.key(tier, user=tier) for tier in ("low", "high")}

        def client(tier: str, number: int) -> None:
            """Ask again and again, so that both tiers always have somebody waiting."""
            while not enough.is_set():
                prompt = f"{tier} {number} " + "word " * 40 + "\n"
                body = {"model": NAME, "prompt": prompt, "max_tokens": 12}
                post(server.url, "/v1/completions", body, keys[tier])
                with lock:
                    told.append(tier)
                    if len(told) >= ANSWERS:
                        enough.set()

        with ThreadPoolExecutor(2 * EACH) as pool:
            work = [pool.submit(client, tier, n) for tier in keys for n in range(EACH)]
        for one in work:
            one.result()
    # Between the first places, which nobody waited for, and the last ones, after which nobody asks.
    within = told[2 * EACH : ANSWERS]
    found = within.count("high") / within.count("low")
    print(f"priorities 1:4, answers 1:{found:.2f}")
    assert found == pytest.approx(4, rel=0.15)
