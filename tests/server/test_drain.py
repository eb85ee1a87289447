"""A server that is told to stop: who is waited for, who is refused, and what the rest is charged.

Streams of a server that stops, and SIGTERM itself: test_wire.py.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from overleap.chat.tokenizer import Decoder, Tokenizer
from overleap.engine.request import Request, Sampling, Token
from overleap.errors import RequestError
from overleap.server.database import entries
from overleap.server.running import Admission
from overleap.server.wire import drain
from overleap.server.writers import Writer
from tests.server import load
from tests.server.live import NAME, TOKENIZER, Live, live, scripted

LONG = "one two three four five six seven " * 60


def script(prompt: str) -> str:
    return LONG if "long" in prompt else "Yes."


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it. The time is only for what never comes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def port_of(server: Live) -> int:
    return int(server.url.rpartition(":")[2])


def in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """What it returns, once it is done."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


class Door:
    """Holds requests that are being let in at one place, until it is opened."""

    def __init__(self, server: Live, place: str) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()
        books, bridge = server.service.ledger._books, server.service.bridge
        reserve, submit = books.reserve, bridge.submit

        def slow_reserve(terms: Any) -> None:
            self._hold()
            reserve(terms)

        async def slow_submit(requests: Any) -> Any:
            await asyncio.to_thread(self._hold)
            return await submit(requests)

        if place == "reserve":
            books.reserve = slow_reserve  # type: ignore[method-assign]
        else:
            bridge.submit = slow_submit  # type: ignore[method-assign]

    def _hold(self) -> None:
        self.reached.set()
        assert self._opened.wait(60)

    def open(self) -> None:
        self._opened.set()


@pytest.mark.parametrize("place", ["reserve", "submit"])
def test_who_is_being_let_in_when_it_stops_is_waited_for(tmp_path: Path, place: str) -> None:
    with live(tmp_path, scripted(script), drain_s=60) as server:
        door = Door(server, place)
        told = in_thread(lambda: asyncio.run(load.ask(port_of(server), "a\n", 8, model=NAME)))
        assert door.reached.wait(60)
        drained = asyncio.run_coroutine_threadsafe(
            drain(server.service, asyncio.Event()), server.loop
        )
        with pytest.raises(TimeoutError):
            drained.result(0.3)
        door.open()
        assert told.result(60).ending == "done"
        drained.result(60)


@pytest.mark.parametrize("place", ["reserve", "submit"])
def test_who_is_let_in_after_the_cut_is_refused(tmp_path: Path, place: str) -> None:
    with live(tmp_path, scripted(script, delay_s=0.02), drain_s=0.1) as server:
        door = Door(server, place)
        told = in_thread(lambda: asyncio.run(load.ask(port_of(server), "long\n", 400, model=NAME)))
        assert door.reached.wait(60)
        server.stop()
        until(lambda: server.service.everyone.draining, "it does not cut")
        door.open()
        assert told.result(60).status == 503
    assert charges(server) == [("refunded", 0)]


PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "long\n"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "long"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "long"}]},
}


def fail_at(server: Live, token: int) -> None:
    """Have the engine's step fail that chooses this token of an answer, counted from 0."""
    model: Any = server.service.bridge._engine.model  # type: ignore[attr-defined]
    logits, chosen = model.logits, iter(range(token))

    def failing(ids: list[int]) -> Any:
        if next(chosen, None) is None:
            raise RuntimeError("no memory")
        return logits(ids)

    model.logits = failing


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_failed_is_not_charged(tmp_path: Path, seed: int, path: str) -> None:
    with live(tmp_path, scripted(script)) as server:
        fail_at(server, random.Random(seed).randint(0, 9))
        body = {"model": NAME, "max_tokens": 40} | PATHS[path]
        assert asyncio.run(load.send(port_of(server), "POST", path, body))[0] == 500
        assert charges(server) == [("refunded", 0)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_cannot_be_told_is_not_charged(
    tmp_path: Path, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(tmp_path, scripted(script)) as server:

        def fail(*given: Any) -> Any:
            raise RuntimeError("no words")

        monkeypatch.setattr(Decoder, "push", fail)
        monkeypatch.setattr(Writer, "push", fail)
        body = {"model": NAME, "max_tokens": 40, "stream": stream} | PATHS[path]
        status, _, raw = asyncio.run(load.send(port_of(server), "POST", path, body))
        assert status == 500 or (stream and b"error" in raw)
        until(lambda: not server.service.everyone.running, "it is still there")
        assert charges(server) == [("refunded", 0)]


def test_a_prompt_that_cannot_be_repeated_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(tmp_path, scripted(script)) as server:

        def fail(*given: Any) -> Any:
            raise RequestError("no such token")

        monkeypatch.setattr(Tokenizer, "decode", fail)
        body = {"model": NAME, "prompt": [5, 6], "echo": True, "max_tokens": 3}
        status, _, _ = asyncio.run(load.send(port_of(server), "POST", "/v1/completions", body))
        assert status == 400 and not server.service.everyone.running
        assert charges(server) == [("refunded", 0)]


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_was_cut_is_not_charged(tmp_path: Path, path: str) -> None:
    with live(tmp_path, scripted(script, delay_s=0.02), drain_s=0.1) as server:
        body = {"model": NAME, "max_tokens": 400} | PATHS[path]
        told = in_thread(lambda: asyncio.run(load.send(port_of(server), "POST", path, body)))
        steps = server.service.bridge._engine.model.steps  # type: ignore[attr-defined]
        until(lambda: len(steps) > 3, "no token came")
        server.stop()
        assert told.result(60)[0] in (503, 529)
    assert charges(server) == [("refunded", 0)]


@pytest.mark.parametrize("ending", ["failed", "cut"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_of_a_stream_that_was_broken_off_what_was_sent_is_charged(
    tmp_path: Path, ending: str, tokens: int
) -> None:
    gate, prompt = threading.Semaphore(0), tuple(TOKENIZER.encode("long\n"))
    with live(tmp_path, scripted(script, gate=gate)) as server:
        service = server.service

        async def read() -> int:
            admission = Admission(
                id="one", customer=service.auth.identify(None), dialect="chat", streamed=True
            )
            request = Request(prompt=prompt, sampling=Sampling(max_tokens=40), id="one-0")
            running, sent = await service.begin([request], admission), 0
            if tokens:
                gate.release(tokens)
            else:
                break_off()
            async for _, event in running.events():
                if isinstance(event, Token):
                    sent += 1
                    if sent == tokens:
                        break_off()
            await running.close()
            return sent

        def break_off() -> None:
            if ending == "cut":
                service.everyone.cut()
            else:
                fail_at(server, 0)
            gate.release(100)

        sent = asyncio.run_coroutine_threadsafe(read(), server.loop).result(60)
        assert sent - tokens in ((0,) if ending == "failed" else (0, 1)), "a step had begun"
        assert charges(server) == [("settled", len(prompt) + sent) if sent else ("refunded", 0)]


def charges(server: Live) -> list[tuple[str, int]]:
    """State and tokens of all entries, as they came."""
    found = sa.select(entries).order_by(entries.c.created_us)
    tokens = "cache_hit_tokens", "cache_miss_tokens", "output_tokens"
    with server.database.read() as connection:
        return [
            (row.state, sum(getattr(row, name) for name in tokens))
            for row in connection.execute(found)
        ]
