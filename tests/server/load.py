"""A server in a process of its own, and load on it: raw sockets, every token's time noted.

Used by the slow tests, and by hand: `python -m tests.server.load mixed|overload|soak`. Everything
stays on this machine and is bounded in count and time. Not a benchmark of a model (eval/speed.py).
"""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def descriptors(self) -> int:
        return psutil.Process(self.process.pid).num_fds()


@contextmanager
def served(*options: str) -> Iterator[Served]:
    """`overleap serve` with the bundled model and a fresh ledger, until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "overleap.cli", "serve", "--port", "0", "--no-keep",
            "--ledger", f"{folder}/ledger.sqlite", *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert process.stderr is not None
        # A pipe that nobody reads is full after some hundred requests.
        reading = threading.Thread(target=process.stderr.read, daemon=True)
        try:
            port = 0
            for line in process.stderr:
                found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
                if found:
                    port = int(found[1])
                    break
            assert port, "the server did not start"
            reading.start()
            _wait_ready(port)
            yield Served(process, port)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
            if reading.is_alive():
                reading.join()
            process.stderr.close()


def _wait_ready(port: int) -> None:
    for _ in range(200):
        try:
            if asyncio.run(send(port, "GET", "/readyz"))[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server is not ready")


async def send(
    port: int, method: str, path: str, body: Any = None, key: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """A whole answer: status, headers, body."""
    reader, writer = await _open(port, method, path, body, key)
    try:
        status, headers = await _head(reader)
        return status, headers, await _rest(reader, headers)
    finally:
        writer.close()


async def _rest(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    return b"".join([piece async for piece in _chunks(reader)])


async def _open(
    port: int, method: str, path: str, body: Any, key: str = ""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(raw)}"]
    lines += ["Content-Type: application/json", "Connection: close"]
    lines += [f"Authorization: Bearer {key}"] if key else []
    writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
    await writer.drain()
    return reader, writer


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value for name, value in pairs}


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


@dataclass
class Told:
    """A streamed answer as its client saw it. Times are seconds since it was asked.

    ending  "done", "error" or "cut": how the stream ended
    """

    status: int = 0
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    took_s: float = 0.0
    ending: str = "cut"
    usage: dict[str, Any] = field(default_factory=dict)
    comments: int = 0


async def ask(
    port: int,
    text: str,
    max_tokens: int,
    *,
    leave_after: int | None = None,
    key: str = "",
    **fields: Any,
) -> Told:
    """Stream a completion. leave_after: close the connection after so many events."""
    body = {
        "model": "overleap-mini", "prompt": text, "max_tokens": max_tokens, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 1.0, **fields,
    }  # fmt: skip
    told, began = Told(), time.monotonic()
    reader, writer = await _open(port, "POST", "/v1/completions", body, key)
    try:
        told.status, headers = await _head(reader)
        if told.status != 200:
            await _rest(reader, headers)
            told.took_s, told.ending = time.monotonic() - began, "refused"
            return told
        last = began
        async for piece in _chunks(reader):
            now = time.monotonic()
            if piece.startswith(b":"):
                told.comments += 1
            elif piece.startswith(b"event: error"):
                told.ending = "error"
            elif piece.startswith(b"data: [DONE]"):
                told.ending = "done"
            else:
                event = json.loads(piece[6:])
                told.usage = event.get("usage") or told.usage
                if event["choices"] and event["choices"][0]["text"]:
                    told.tokens += 1
                    if told.tokens == 1:
                        told.first_s = now - began
                    else:
                        told.gaps_s.append(now - last)
                    last = now
            if leave_after is not None and told.tokens >= leave_after:
                return told
        told.took_s = time.monotonic() - began
        return told
    except (asyncio.IncompleteReadError, ConnectionError):
        return told
    finally:
        writer.close()


def words(draw: random.Random, count: int) -> str:
    return " ".join(
        draw.choices("def return import class self for in while not None".split(), k=count)
    )


@dataclass(frozen=True)
class Mixed:
    """Short chats alone and beside a long prompt. Seconds; medians but for the means."""

    alone_s: float
    beside_s: float
    mean_alone_s: float
    mean_beside_s: float
    first_alone_s: float
    first_beside_s: float
    read_tokens: int
    read_s: float
    read_alone_s: float


async def mixed(port: int, seed: int, *, long_tokens: int, chats: int = 8) -> Mixed:
    """The median time between tokens of short chats, alone and while a long prompt is read."""
    draw = random.Random(seed)

    async def short() -> list[Told]:
        prompts = [words(draw, 60) for _ in range(chats)]
        return await asyncio.gather(*(ask(port, p, 120, stop_ids=[]) for p in prompts))

    await short()
    alone = await short()
    began = time.monotonic()
    await ask(port, words(draw, long_tokens), 1)
    read_alone_s = time.monotonic() - began
    began = time.monotonic()
    reading = asyncio.ensure_future(ask(port, words(draw, long_tokens), 1))
    await asyncio.sleep(1.0)
    beside: list[Told] = []
    while not reading.done():
        found = await short()
        if not reading.done() or not beside:
            beside += found
    told = await reading
    alone += await short()  # before and after: the machine may have other things to do by now
    return Mixed(
        _median(alone), _median(beside), _mean(alone), _mean(beside),
        max(one.first_s for one in alone), max(one.first_s for one in beside),
        told.usage["prompt_tokens"], time.monotonic() - began, read_alone_s,
    )  # fmt: skip


def _median(told: list[Told]) -> float:
    return statistics.median(gap for one in told for gap in one.gaps_s)


def _mean(told: list[Told]) -> float:
    return statistics.mean(gap for one in told for gap in one.gaps_s)


@dataclass(frozen=True)
class Nominal:
    """What a server does when it is busy, and not too busy.

    capacity  requests a second that were answered when asked one after the other by many
    p99_s     of first tokens at four fifths of that
    """

    capacity: float
    p99_s: float


@dataclass(frozen=True)
class Overload:
    """Open-loop load: what came of it. Seconds."""

    accepted: int
    accepted_p99_s: float
    refused: int
    refused_p99_s: float
    statuses: dict[int, int]
    cut: int
    growth_bytes: int
    after_s: float


def _one(port: int, draw: random.Random) -> Any:
    return ask(port, words(draw, draw.randint(20, 200)), draw.randint(8, 40), stop_ids=[])


async def _open_loop(port: int, draw: random.Random, rate: float, seconds: float) -> list[Told]:
    asked, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        asked.append(asyncio.ensure_future(_one(port, draw)))
        await asyncio.sleep(draw.expovariate(rate))
    return await asyncio.gather(*asked)


async def nominal(port: int, seed: int, *, seconds: float) -> Nominal:
    """Measure a server that refuses nobody."""
    draw = random.Random(seed)

    async def closed_loop(count: int) -> None:
        for _ in range(count):
            await _one(port, draw)

    await closed_loop(10)
    began = time.monotonic()
    await asyncio.gather(*(closed_loop(10) for _ in range(16)))
    capacity = 160 / (time.monotonic() - began)
    told = await _open_loop(port, draw, 0.8 * capacity, seconds)
    return Nominal(capacity, _p99([one.first_s for one in told]))


def patience(found: Nominal) -> tuple[str, ...]:
    """Options of an operator who would rather refuse than be later than in usual times."""
    return ("--wait-seconds", f"{found.p99_s:.3f}")


async def overload(server: Served, seed: int, *, rate: float, seconds: float) -> Overload:
    """So many requests a second, however many are still there, and one after it is over."""
    draw = random.Random(seed)
    await _open_loop(server.port, draw, rate / 4, 5)  # it learns what requests take
    before = server.memory
    found = await _open_loop(server.port, draw, rate, seconds)
    growth = server.memory - before
    after = await _one(server.port, draw)
    answered = [told for told in found if told.status == 200]
    refused = [told for told in found if told.status != 200]
    statuses = [told.status for told in found]
    return Overload(
        len(answered), _p99([told.first_s for told in answered]),
        len(refused), _p99([told.took_s for told in refused]),
        {status: statuses.count(status) for status in set(statuses)},
        sum(told.ending != "done" for told in answered), growth, after.first_s,
    )  # fmt: skip


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))] if values else 0.0


@dataclass(frozen=True)
class Soak:
    """Many requests, some of them left: what is left of them."""

    requests: int
    left: int
    growth_bytes: int
    descriptors: int
    open_after: int


async def soak(server: Served, seed: int, *, requests: int, warm_up: int) -> Soak:
    """Mixed requests, one in five left by its client; memory is looked at after the warm-up."""
    draw, left = random.Random(seed), 0

    async def some(count: int) -> None:
        nonlocal left
        for _ in range(count):
            leave = draw.randint(0, 6) if draw.random() < 0.2 else None
            left += leave is not None
            prompt, tokens = words(draw, draw.randint(5, 150)), draw.randint(1, 24)
            await ask(server.port, prompt, tokens, leave_after=leave, temperature=draw.random() * 2)

    await asyncio.gather(*(some(warm_up // 8) for _ in range(8)))
    await asyncio.sleep(0.5)
    before, descriptors, left = server.memory, server.descriptors, 0
    await asyncio.gather(*(some(requests // 8) for _ in range(8)))
    await asyncio.sleep(0.5)
    status, _, raw = await send(server.port, "GET", "/status")
    assert status == 200
    state = json.loads(raw)
    return Soak(
        requests, left, server.memory - before, server.descriptors - descriptors,
        state["running"] + state["waiting"],
    )  # fmt: skip


def main() -> None:
    what, seed = sys.argv[1], int(time.time())
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    if what == "mixed":
        with served() as server:
            print(asyncio.run(mixed(server.port, seed, long_tokens=size or 131_072)))
    elif what == "overload":
        with served() as server:
            usual = asyncio.run(nominal(server.port, seed, seconds=(size or 60) / 2))
        print(usual)
        with served(*patience(usual)) as server:
            rate = 2 * usual.capacity
            print(asyncio.run(overload(server, seed, rate=rate, seconds=size or 60)))
    elif what == "soak":
        with served() as server:
            print(asyncio.run(soak(server, seed, requests=size or 2000, warm_up=500)))


if __name__ == "__main__":
    main()
