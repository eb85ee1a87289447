"""What one request may ask for, and what a server holds for all of them together."""

import asyncio
import json
import random
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overleap.server.bodies import ALL_SHARE, KEY_SHARE, Bodies
from overleap.server.refusals import Refusal
from tests.server import load
from tests.server.live import NAME, TOKENIZER, Live, live, scripted

HELLO = [{"role": "user", "content": "Hello"}]
WORDS = "naïve “words” – ☃ 🂡 and é"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("bounds")
    with live(folder, scripted(lambda prompt: WORDS), slots=4, queue=6) as running:
        yield running


def call(server: Live, path: str, body: Any) -> tuple[int, Any]:
    port = int(server.url.rpartition(":")[2])
    status, _, raw = asyncio.run(load.send(port, "POST", path, {"model": NAME} | body))
    return status, json.loads(raw)


def stream(server: Live, path: str, body: Any) -> list[Any]:
    """The frames of a streamed answer."""
    port = int(server.url.rpartition(":")[2])
    status, _, raw = asyncio.run(
        load.send(port, "POST", path, {"model": NAME, "stream": True} | body)
    )
    assert status == 200, raw
    lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 10**9}, {"n": "x"}, {"n": -1}, {"logprobs": True, "top_logprobs": 10**6},
        {"logit_bias": [1]}, {"min_p": "abc"}, {"stream_options": [1]}, {"seed": "x"},
        {"max_completion_tokens": "x"}, {"frequency_penalty": {}},
    ],
)  # fmt: skip
def test_fields_of_another_api_change_nothing(server: Live, more: dict[str, Any]) -> None:
    """Clients send many that mean nothing here; what was not checked is not used either."""
    for path, body in (
        ("/v1/messages", {"messages": HELLO, "max_tokens": 40}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 40}),
    ):
        status, plain = call(server, path, body)
        assert status == 200
        status, found = call(server, path, body | more)
        assert status == 200, (path, found)
        part = "content" if path == "/v1/messages" else "output"
        texts = [json.dumps(one[part], ensure_ascii=False) for one in (plain, found)]
        without_ids = [re.sub(r"[0-9a-f]{32}", "", text) for text in texts]
        assert without_ids[0] == without_ids[1] and WORDS in without_ids[0]


def test_more_answers_than_there_will_ever_be_room_for(server: Live) -> None:
    """Four places and a queue of six: ten answers at once, whatever they are to."""
    body = {"prompt": ["a\n"] * 5, "n": 2, "max_tokens": 4}
    assert call(server, "/v1/completions", body)[0] == 200
    status, said = call(server, "/v1/completions", body | {"n": 3})
    assert status == 400 and "asks for 15 answers, 10 at once" in said["error"]["message"]


def test_what_waits_is_counted_before_it_is_there(tmp_path: Path, seed: int) -> None:
    """One request with many answers does not go past the queue, and a prompt is read once."""
    gate, draw = threading.Semaphore(0), random.Random(seed)
    with live(tmp_path, scripted(lambda p: "Yes.", gate=gate), slots=2, queue=4) as server:
        bridge, port = server.service.bridge, int(server.url.rpartition(":")[2])
        prompt = [draw.randrange(3, 500) for _ in range(700)]
        told: list[int] = []

        def ask(n: int) -> None:
            body = {"model": NAME, "prompt": prompt, "n": n, "max_tokens": 2}
            told.append(asyncio.run(load.send(port, "POST", "/v1/completions", body))[0])

        try:
            first = threading.Thread(target=ask, args=(5,))
            first.start()
            until(lambda: len(bridge._live) == 5)
            assert sum(one.unread for one in bridge._live.values()) <= len(prompt)
            ask(2)
            assert told == [503], "one place of six is left"
            burst = [threading.Thread(target=ask, args=(1,)) for _ in range(8)]
            for thread in burst:
                thread.start()
            until(lambda: len(told) == 1 + len(burst) - 1)
            assert len(bridge._live) == 6
        finally:
            gate.release(10_000)
        for thread in (first, *burst):
            thread.join()
        assert sorted(told) == [200] * 2 + [503] * 8


def test_one_bad_prompt_of_a_list_leaves_nothing_behind(server: Live) -> None:
    status, said = call(server, "/v1/completions", {"prompt": [[5, 6], [4_000_000]], "n": 2})
    assert status == 400 and "4000000" in said["error"]["message"]
    until(lambda: not server.service.everyone.running)
    assert server.service.bridge.running + server.service.bridge.waiting == 0
    assert server.service.bridge.waiting_tokens == 0


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_log_probabilities_are_all_there(server: Live, echo: bool) -> None:
    """Tokens within a character, and those held back for a stop string, have theirs as well."""
    body = {
        "prompt": f"{WORDS} again\n", "max_tokens": 60, "logprobs": 2, "echo": echo,
        "stop": ["é and", "never"], "temperature": 0,
    }  # fmt: skip
    (whole,) = call(server, "/v1/completions", body)[1]["choices"]
    pieces = [c for f in stream(server, "/v1/completions", body) for c in f["choices"]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name in ("tokens", "text_offset", "token_logprobs"):
        joined = [value for piece in pieces for value in piece["logprobs"][name]]
        assert joined == whole["logprobs"][name], name
    tokens, offsets = (whole["logprobs"][name] for name in ("tokens", "text_offset"))
    assert any("\ufffd" in token for token in tokens), "no character was divided"
    for token, offset in zip(tokens, offsets, strict=True):
        if "\ufffd" not in token and not token.startswith("<｜"):
            assert whole["text"][offset : offset + len(token)] == token


def test_progress_of_completions(server: Live) -> None:
    body = {"prompt": "word " * 400 + "\n", "max_tokens": 2}
    assert not any("prompt_progress" in f for f in stream(server, "/v1/completions", body))
    told = stream(server, "/v1/completions", body | {"return_progress": True})
    progress = [frame["prompt_progress"] for frame in told if "prompt_progress" in frame]
    assert progress and progress[-1]["processed"] == progress[-1]["total"] > 400


def test_more_ids_than_the_context_are_not_made_text(server: Live) -> None:
    most = server.service.turns.model.context_tokens
    status, said = call(server, "/detokenize", {"tokens": [5] * (most + 1)})
    assert status == 400 and f"the context is {most}" in said["error"]["message"]
    ids = TOKENIZER.encode(WORDS)
    assert call(server, "/detokenize", {"tokens": ids})[1] == {"prompt": WORDS}


class Slow:
    """A request whose body comes in pieces, each when the test says so."""

    def __init__(self, pieces: int, size: int) -> None:
        self.headers = {"content-type": "application/json"}
        self.pieces, self.size, self.go = pieces, size, asyncio.Event()

    async def stream(self) -> AsyncIterator[bytes]:
        for _ in range(self.pieces):
            yield b"x" * self.size
        await self.go.wait()


def test_bodies_are_bounded_by_key_and_all_together() -> None:
    async def run() -> None:
        bodies, most = Bodies(1000), 1000
        held: list[tuple[Slow, asyncio.Task[int]]] = []

        async def read(key: str, slow: Slow) -> int:
            async with bodies.read(slow, key) as raw:  # type: ignore[arg-type]
                return len(raw)

        async def begin(key: str) -> Slow:
            slow = Slow(10, most // 10)
            held.append((slow, asyncio.create_task(read(key, slow))))
            await asyncio.sleep(0)
            return slow

        for number in range(ALL_SHARE):
            await begin(f"key {number // KEY_SHARE}")
        assert bodies.held.total() == ALL_SHARE * most
        for key, sentence in (("key 0", "this key's"), ("another", "bytes of requests")):
            with pytest.raises(Refusal, match=sentence) as refused:
                await read(key, Slow(1, 1))
            assert refused.value.status == 503
        for slow, _ in held:
            slow.go.set()
        assert [await task for _, task in held] == [most] * ALL_SHARE
        with pytest.raises(Refusal, match="1000 bytes are the most"):
            await read("key 0", Slow(11, most // 10))
        assert not bodies.held

    asyncio.run(run())


def test_a_command_that_fails_does_not_end_the_engine(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = server.service.bridge
    before = bridge.failures

    def fail() -> None:
        raise RuntimeError("no memory for what should be kept")

    bridge._commands.put(fail)
    until(lambda: bridge.failures == before + 1)
    assert call(server, "/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200


def test_a_server_whose_engine_has_ended_says_so(tmp_path: Path) -> None:
    with live(tmp_path, scripted(lambda p: "Yes.")) as server:
        port = int(server.url.rpartition(":")[2])
        assert asyncio.run(load.send(port, "GET", "/readyz"))[0] == 200
        server.service.bridge._commands.put(sys.exit)
        until(lambda: not server.service.bridge._thread.is_alive())
        assert asyncio.run(load.send(port, "GET", "/readyz"))[0] == 503
        assert call(server, "/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 503
