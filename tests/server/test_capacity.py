"""What the page says of the running model: counted by hand from the parts it is made of."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from overleap.config import ModelConfig
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling, Stats
from overleap.plan import Load, running
from overleap.server.capacity import Capacity
from overleap.server.costs import load_costs
from tests.engine.fake import FakeModel
from tests.server.live import MINI, NAME, live, scripted
from tests.server.test_tenants import get, post

CONTEXT = 65_536
MIB = 2**20


@pytest.fixture
def plan() -> dict[str, Any]:
    return running(Load(ModelConfig.from_checkpoint(MINI), CONTEXT))


def stats_of(**changed: Any) -> Stats:
    engine = Engine(FakeModel(), pages=1024, slots=4)  # type: ignore[arg-type]
    engine.generate(Request(prompt=[3, 4, 5], sampling=Sampling(max_tokens=2)))
    return dataclasses.replace(engine.stats(), **changed)


def test_users_are_those_whose_pages_and_slots_are_there(plan: dict[str, Any]) -> None:
    # 65,536 tokens are 512 pages: 1,024 pages hold 2 of them, and 1,535 still 2.
    for pages, slots, users in ((1024, 4, 2), (1535, 4, 2), (5120, 4, 4), (511, 4, 0)):
        found = Capacity(CONTEXT, slots, plan).of(stats_of(pages=pages))
        assert found["users_at_full_context"] == users
        assert found["cache_tokens"] == pages * 128 and found["slots"] == slots
        assert found["memory_users_at_full_context"] == plan["most_users"] > 0
        assert found["predicted_bytes"] > found["weight_bytes"] > 8 * MIB
    bare = Capacity(CONTEXT, 4).of(stats_of())
    assert "have_bytes" not in bare and bare["users_at_full_context"] == 2


def test_costs_are_those_of_the_seconds_that_tokens_took() -> None:
    costs = load_costs()
    capacity = Capacity(CONTEXT, 4, costs=costs)
    stats = stats_of(
        finished=10, read_tokens=2000, prefill_s=4.0, generated_tokens=500, decode_s=6.0
    )
    second = costs.of(10**6).total / 1e9
    found = capacity.cost(stats)
    assert found is not None and found["currency"] == "USD"
    assert found["request"] == pytest.approx(second * 1.0, rel=1e-5)  # 10 s for 10 requests
    assert found["full_context"] == pytest.approx(second * CONTEXT * 0.002, rel=1e-5)
    assert found["million_read"] == pytest.approx(second * 2000, rel=1e-5)
    assert found["million_written"] == pytest.approx(second * 12_000, rel=1e-5)
    assert capacity.cost(dataclasses.replace(stats, finished=0)) is None
    assert Capacity(CONTEXT, 4).cost(stats) is None
    nothing_read = capacity.cost(dataclasses.replace(stats, read_tokens=0))
    assert nothing_read is not None and nothing_read["million_read"] is None


def test_only_an_admin_sees_costs(tmp_path: Path) -> None:
    with live(tmp_path, scripted(lambda prompt: "Yes."), needs_keys=True) as server:
        plain, admin = server.key("standard"), server.key("admin")
        body = {"model": NAME, "prompt": "x\n", "max_tokens": 3}
        post(server.url, "/v1/completions", body, plain)
        for key, seen in ((plain, False), (admin, True)):
            status = get(server.url, "/status", key)
            assert status["capacity"]["users_at_full_context"] == 1  # 512 pages, 65,536 tokens
            assert status["capacity"]["have_bytes"] > status["capacity"]["predicted_bytes"]
            assert (status["cost"] is not None) == seen
        assert status["cost"]["request"] > 0
