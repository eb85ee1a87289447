"""What one customer may take of what all share: the queue, the wait foreseen, the text side."""

import asyncio
import json
import random
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.tokenizer import Tokenizer
from overleap.engine.request import Request
from overleap.errors import RateError, RequestError
from overleap.server.auth import LOCAL_ID, Customer, credit_key
from overleap.server.bridge import Bridge, Generation
from overleap.server.limits import Limits
from overleap.server.refusals import Refusal
from overleap.server.reports import check_books
from overleap.server.tiers import Tier
from overleap.server.turns import Turns
from tests.server import load
from tests.server.live import NAME, Live, live, scripted
from tests.server.test_bridge import until

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LIMITED = """
currency = "USD"
[tiers.admin]
admin = true
price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }
[tiers.small]
tokens_per_day = 900
price_per_million = { cache_hit = 0, cache_miss = 0, output = 0 }
[tiers.paid]
prepaid = true
price_per_million = { cache_hit = 0.1, cache_miss = 1, output = 2 }
"""


def call(server: Live, path: str, body: dict[str, Any], key: str = "") -> tuple[int, Any]:
    port = int(server.url.rpartition(":")[2])
    status, _, raw = asyncio.run(load.send(port, "POST", path, {"model": NAME} | body, key))
    return status, json.loads(raw)


class Asking:
    """Clients in threads; `told` has their statuses as they come."""

    def __init__(self, server: Live) -> None:
        self.server, self.told = server, list[int]()
        self.threads: list[threading.Thread] = []

    def ask(self, key: str, answers: int = 1) -> None:
        body = {"prompt": "x\n", "n": answers, "max_tokens": 12}

        def run() -> None:
            self.told.append(call(self.server, COMPLETIONS, body, key)[0])

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def join(self) -> list[int]:
        for thread in self.threads:
            thread.join(60)
        return sorted(self.told)


def test_one_user_leaves_places_to_the_next(tmp_path: Path) -> None:
    """Of twelve places one user alone has six, the next may have three, and a third one more."""
    gate = threading.Semaphore(0)
    made = scripted(lambda prompt: "Yes.", slots=4, gate=gate)
    with live(tmp_path, made, slots=4, queue=8, needs_keys=True) as server:
        free, pro, other = (server.key(tier, user=tier) for tier in ("free", "pro", "standard"))
        bridge, asking = server.service.bridge, Asking(server)
        try:
            for key, answers, there in ((free, 12, 0), (free, 6, 6), (pro, 1, 7), (pro, 3, 7),
                                        (pro, 2, 9), (other, 1, 10), (free, 1, 10)):  # fmt: skip
                told = len(asking.told)
                before = len(bridge._live)
                asking.ask(key, answers)
                until(lambda: len(asking.told) > told or len(bridge._live) > before)  # noqa: B023
                assert len(bridge._live) == there, (asking.told, answers)
        finally:
            gate.release(10_000)
        assert asking.join() == [200] * 4 + [400, 503, 503]
    assert not bridge._live


def test_a_burst_of_one_user_does_not_pass_while_it_is_booked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All twelve are asked for before the first is in the queue, where shares are counted."""
    gate = threading.Semaphore(0)
    made = scripted(lambda prompt: "Yes.", slots=4, gate=gate)
    with live(tmp_path, made, slots=4, queue=8, needs_keys=True) as server:
        books, asking = server.service.ledger._books, Asking(server)
        reserve, bridge = books.reserve, server.service.bridge

        def slowly(terms: Any) -> None:
            time.sleep(0.1)
            reserve(terms)

        monkeypatch.setattr(books, "reserve", slowly)
        pro = server.key("pro", user="pro")
        try:
            for _ in range(12):
                asking.ask(pro)
            until(lambda: len(asking.told) + len(bridge._live) == 12)
            assert asking.told == [503] * 6 and len(bridge._live) == 6
        finally:
            gate.release(10_000)
        assert asking.join() == [200] * 6 + [503] * 6


def waiting(bridge: Bridge, flow: str, weight: float, tokens: int, began: bool = False) -> None:
    """Put a request there that nobody serves."""
    number = len(bridge._live)
    prompt = (5,) * max(1, tokens)
    request = Request(prompt=prompt, id=str(number), flow=flow, weight=weight)
    one = Generation(request, bridge, tokens)
    one.began = 1.0 if began else None
    bridge._live[request.id] = one


def test_what_a_user_has_booked_and_not_submitted_is_his_share() -> None:
    """Twelve places: one user's booked requests leave as many to the next as they are."""
    bridge = idle(slots=4, queue=8)
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(bridge.promise(10, 1, 300.0, "one", 1.0))
        with pytest.raises(Refusal, match="this user would have 7 requests"):
            bridge.admit(10, 1, 300.0, "one", 1.0)
        stack.enter_context(bridge.promise(10, 3, 300.0, "two", 1.0))
    assert not bridge._promised.requests and not bridge._promised.tokens


def test_what_was_not_foreseen_is_not_learned_as_late(tmp_path: Path) -> None:
    """The first prompts take what they take: nothing was known of this machine."""
    with live(tmp_path, scripted(lambda prompt: "Yes.", delay_s=0.3)) as server:
        asking = Asking(server)
        for _ in range(3):
            asking.ask("")
        assert asking.join() == [200] * 3
        assert server.service.bridge._late_s == 0.0


def idle(**more: int) -> Bridge:
    """A bridge whose engine is not there, and reads 100 tokens a second."""
    wanted = {"slots": 2, "queue": 64, "queue_tokens": 10**6} | more
    bridge = Bridge(lambda: pytest.fail("no engine"), **wanted)
    bridge._rate = 100.0
    return bridge


def test_a_wait_is_foreseen_from_what_goes_before(seed: int) -> None:
    draw = random.Random(seed)
    bridge = idle()
    sizes = [draw.randint(1000, 9000) for _ in range(9)]
    for place, size in enumerate(sizes):
        waiting(bridge, "flood", 2.0, size, began=place == 0)
    # What runs and what waits of a flow that is due twice as much has twice as much meanwhile.
    assert bridge.expected_wait_s(100, "late", 1.0) == pytest.approx((100 + 200 + 200) / 100)
    assert bridge.expected_wait_s(100, "late", 4.0) == pytest.approx((100 + 50 + 50) / 100)
    assert bridge.expected_wait_s(10**6, "late", 1.0) == pytest.approx((10**6 + sum(sizes)) / 100)
    assert bridge.expected_wait_s(100, "flood", 2.0) == pytest.approx((100 + sum(sizes)) / 100)
    bridge.admit(100, 1, 10.0, "late", 1.0)
    with pytest.raises(Refusal, match="the first token would come after"):
        bridge.admit(100, 1, 10.0, "flood", 2.0)


def test_places_are_foreseen_from_what_goes_before() -> None:
    """Eight of a flow wait for two places, which are free once a second."""
    bridge = idle()
    bridge._each_s = 2.0
    for place in range(10):
        waiting(bridge, "flood", 1.0, 0, began=place < 2)
    assert bridge.expected_wait_s(0, "late", 1.0) == pytest.approx(2.0), "one goes before it"
    assert bridge.expected_wait_s(0, "late", 4.0) == pytest.approx(1.25)
    assert bridge.expected_wait_s(0, "flood", 1.0) == pytest.approx(9.0)


def test_prompt_tokens_are_shared_as_places_are() -> None:
    bridge = idle(queue_tokens=1000)
    for _ in range(2):
        waiting(bridge, "one", 1.0, 0, began=True)
    waiting(bridge, "one", 1.0, 300)
    bridge.admit(200, 1, 300.0, "one")
    with pytest.raises(Refusal, match="601 prompt tokens waiting"):
        bridge.admit(301, 1, 300.0, "one")
    bridge.admit(700, 1, 300.0, "two")
    with pytest.raises(Refusal, match="prompt tokens are waiting already"):
        bridge.admit(701, 1, 300.0, "two")
    with pytest.raises(RequestError, match="the prompts have 501 tokens, 500 may wait"):
        bridge.admit(501, 3, 300.0, "two")
    bridge.admit(700, 3, 300.0)


def test_without_keys_one_user_has_every_place(tmp_path: Path) -> None:
    gate = threading.Semaphore(0)
    made = scripted(lambda prompt: "a b c d e f g h " * 4, slots=2, gate=gate)
    with live(tmp_path, made, slots=2, queue=2) as server:
        bridge, asking = server.service.bridge, Asking(server)
        try:
            for _ in range(4):
                asking.ask("")
            until(lambda: len(bridge._live) == 4)
            gate.release(3)
            until(lambda: bridge.running == 2)
        finally:
            gate.release(10_000)
        assert asking.join() == [200] * 4


def customer(key: str, **limits: int) -> Customer:
    return Customer(key, key, Tier(name="test", **limits))  # type: ignore[arg-type]


def test_requests_a_minute_are_counted_before_texts_are_read() -> None:
    now = [1000.0]
    limits, one = Limits(lambda: now[0]), customer("one", requests_per_minute=3)

    async def read(who: Customer) -> None:
        async with limits.reading(who, running=0):
            now[0] += 1

    async def run() -> None:
        for _ in range(3):
            await read(one)
        with pytest.raises(RateError, match="the next one in 57 s") as refused:
            await read(one)
        assert refused.value.retry_after_s == 57
        await read(customer("two", requests_per_minute=3))
        now[0] = 1060.0
        await read(one)
        with pytest.raises(RateError):
            now[0] = 1060.5
            await read(one)

    asyncio.run(run())


def test_texts_of_a_user_are_read_one_after_the_other() -> None:
    async def run() -> None:
        limits, most = Limits(), dict[str, int]()
        here: dict[str, int] = {}

        async def read(who: Customer, running: int | None = 1) -> None:
            async with limits.reading(who, running):
                here[who.key_id] = here.get(who.key_id, 0) + 1
                most[who.key_id] = max(most.get(who.key_id, 0), here[who.key_id])
                most["all"] = max(most.get("all", 0), sum(here.values()))
                await asyncio.sleep(0.01)
                here[who.key_id] -= 1

        other_key = replace(customer("one"), key_id="one's second")  # of the same user
        both = customer("one"), customer("two", concurrent_requests=4), customer(LOCAL_ID)
        await asyncio.gather(*(read(who) for who in both for _ in range(3)))
        assert most == {"one": 1, "two": 1, LOCAL_ID: 3, "all": 5}
        work = [asyncio.ensure_future(read(both[1])) for _ in range(4)]
        told = await asyncio.gather(*work, return_exceptions=True)
        (refused,) = (error for error in told if error is not None)
        assert isinstance(refused, RateError) and "4 requests are running" in str(refused)
        most.clear()
        await asyncio.gather(*(read(both[1], None) for _ in range(9)))  # counting tokens
        assert most == {"two": 1, "all": 1}
        most.clear()
        await asyncio.gather(*(read(who, None) for who in (both[0], other_key) for _ in range(3)))
        assert most == {"one": 1, "one's second": 1, "all": 1}
        assert not limits._here and not limits._alone

    asyncio.run(run())


def test_who_is_over_its_rates_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, prepare = list[str](), Turns._prepare
    monkeypatch.setattr(
        Turns, "_prepare", lambda turns, *given: read.append(given[0]) or prepare(turns, *given)
    )
    gate = threading.Semaphore(0)
    made = scripted(lambda prompt: "Yes.", gate=gate)
    with live(tmp_path, made, needs_keys=True) as server:
        free, asking = server.key("free"), Asking(server)
        try:
            asking.ask(free)
            until(lambda: bool(server.service.everyone.running))
            status, said = call(server, CHAT, HELLO | {"max_tokens": 2}, free)
            assert status == 429 and "1 requests are running" in said["error"]["message"]
            assert not read, "one request runs, and one at once is allowed"
        finally:
            gate.release(10_000)
        assert asking.join() == [200]
        told = [call(server, CHAT, HELLO | {"max_tokens": 2}, free)[0] for _ in range(12)]
        assert told == [200] * 9 + [429] * 3 and len(read) == 9


def test_what_no_tokens_could_spell_is_not_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(tmp_path, scripted(lambda prompt: "Yes."), context=128) as server:
        turns = server.service.turns
        size = 128 * turns._token_bytes + 1
        said = HELLO | {"max_tokens": 2}
        assert call(server, CHAT, said)[0] == 200
        monkeypatch.setattr(Tokenizer, "_encode_plain", lambda *given: pytest.fail("tokenised"))
        said["messages"] = [{"role": "user", "content": "é" * (size // 2)}]
        asked: list[tuple[str, dict[str, Any]]] = [
            (CHAT, said),
            (COMPLETIONS, {"prompt": "x" * size}),
            (COMPLETIONS, {"prompt": "x" * (size // 2), "suffix": "x" * (size // 2 + 1)}),
        ]
        for path, body in asked:
            status, answer = call(server, path, body)
            assert status == 400 and "and so at least" in answer["error"]["message"]
            assert answer["error"]["code"] == "context_length_exceeded"


def test_an_answer_of_any_length_takes_what_is_left(tmp_path: Path) -> None:
    """What quota and balance cover is answered, whatever the default length is."""
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(LIMITED)
    with live(
        tmp_path, scripted(lambda prompt: "</think>Yes."), tiers=tiers, needs_keys=True
    ) as server:
        small, paid = server.key("small"), server.key("paid")
        for path, body in ((CHAT, HELLO | {"n": 2}), ("/v1/responses", {"input": "Hello"})):
            status, said = call(server, path, body, small)
            assert status == 200, said
        status, said = call(server, CHAT, HELLO | {"max_tokens": 5000}, small)
        assert status == 402 and "may take 50" in said["error"]["message"]
        status, said = call(server, CHAT, HELLO, paid)
        assert status == 402 and "the balance is 0" in said["error"]["message"]
        key_id = paid.split("-")[1]
        credit_key(server.database, key_id, 500_000)
        assert call(server, CHAT, HELLO, paid)[0] == 200
    assert not check_books(server.database)
