"""Over the wire: keys at every route, malformed requests, deadlines, leaving, draining."""

import asyncio
import io
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overleap.server import app
from overleap.server.auth import Access, revoke_key
from overleap.server.logs import configure
from tests.server import load
from tests.server.live import NAME, Live, live, scripted

LONG = "one two three four five six seven " * 60


def script(prompt: str) -> str:
    return LONG if "long" in prompt else "Yes."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("wire")
    with live(
        folder, scripted(script), needs_keys=True, header_s=1.0, body_s=1.0, idle_s=2.0,
        body_bytes=100_000,
    ) as running:  # fmt: skip
        yield running


def port_of(server: Live) -> int:
    return int(server.url.rpartition(":")[2])


def call(server: Live, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    status, headers, raw = asyncio.run(load.send(port_of(server), method, path, body, key))
    kind = headers.get("content-type", "")
    return status, json.loads(raw) if kind.startswith("application/json") else raw


def raw_call(server: Live, data: bytes, wait_s: float = 3.0) -> bytes:
    """What a socket that sends these bytes reads until it is closed or nothing comes."""
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        connection.settimeout(wait_s)
        found = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                found += piece
        except (TimeoutError, ConnectionError):
            pass
        return found


def test_every_route_asks_for_the_key_that_it_declares(server: Live) -> None:
    plain, admin = server.key("standard"), server.key("admin")
    revoked = server.key("standard", user="gone")
    revoke_key(server.database, revoked)
    routes = app._routes(server.service, None)  # type: ignore[arg-type]
    for route in routes:
        path = route.path.replace("{model:path}", NAME)
        for key, known, is_admin in (
            ("", False, False), ("ol-wrong", False, False), (revoked, False, False),
            (plain, True, False), (admin, True, True),
        ):  # fmt: skip
            if route.access is Access.PUBLIC and route.path == "/openapi.json":
                continue
            status, _ = call(server, route.method, path, {} if route.takes else None, key)
            wanted = route.access is Access.PUBLIC or (
                known and (is_admin or route.access is Access.KEY)
            )
            refused = 403 if known else 401
            assert (status == refused) != wanted, (route.method, path, key[:6], status)


def test_the_table_is_all_there_is(server: Live) -> None:
    key = server.key("admin")
    status, described = call(server, "GET", "/openapi.json")
    assert status == 200 and len(described["paths"]) > 25
    for path in ("/docs", "/redoc", "/v1/embeddings", "//v1/models", "/v1/../v1/models",
                 "/v1/models/../../status",
                 "/%2e%2e/etc/passwd", "/v1/chat/completions/"):  # fmt: skip
        status, body = call(server, "GET", path, key=key)
        assert status in (404, 405), path
        assert body["error"]["message"]


def test_three_hundred_malformed_requests_break_nothing(server: Live, seed: int) -> None:
    draw = random.Random(seed)
    key = server.key()
    good = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    ).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    known = [
        b"\r\n\r\n", b"\x00" * 50, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff\xfe" * 40,
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        post + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        post + b"Content-Length: -1\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        good.replace(b"{}", b"[]"), good.replace(b"{}", b"\xff\xff"), good.replace(b"{}", b'"x'),
        good.replace(b"application/json", b"text/plain"), good[:-1],
    ]  # fmt: skip
    answers = []
    for number in range(300):
        if number < len(known):
            data = known[number]
        else:
            mutated = bytearray(draw.choice([*known, good]))
            for _ in range(draw.randint(1, 8)):
                place = draw.randint(0, len(mutated))
                mutated[place : place + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
            data = bytes(mutated)
        answers.append(raw_call(server, data[:60_000], wait_s=0.15))
    statuses = [int(found.split()[1]) for found in answers if found.startswith(b"HTTP/1.1 ")]
    assert [status for status in statuses if status >= 500 and status not in (501, 505)] == []
    assert not any(b"Traceback" in found for found in answers)
    assert call(server, "GET", "/readyz")[0] == 200
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}]}
    assert call(server, "POST", "/v1/chat/completions", body, key)[0] == 200


def test_slow_heads_slow_bodies_and_idle_connections_are_closed(server: Live) -> None:
    head = f"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.key()}\r\n"
    typed = head + "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    idle = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for data, most_s in ((b"GET / HTT", 2.0), (typed.encode(), 2.0), (idle, 3.5)):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
            connection.settimeout(6)
            connection.sendall(data)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionError:
                pass
        assert time.monotonic() - began < most_s, data[:20]


def unread(server: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection that has asked, and whose client has not read yet. Little fits into its way."""
    for listening in server.server.servers[0].sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port_of(server)))
    raw = json.dumps({"model": NAME, **body}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


TOKENS = {"prompt": "word another " * 30_000, "return_token_strs": True}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", TOKENS),
        ("/tokenize", {"prompt": "word another " * 3000}),
        ("/v1/completions", {"prompt": "long\n", "max_tokens": 400, "stream": True}),
    ],
    ids=["whole", "whole and small", "stream"],
)
def test_a_client_that_never_reads_is_cut_off(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    told = io.StringIO()
    configure(told, level="WARNING")
    with live(tmp_path, scripted(script), slow_reader_s=0.5) as server:
        connections = server.server.server_state.connections
        with unread(server, path, body):
            until(lambda: len(connections) == 1, "it did not come")
            until(lambda: not connections, "its connection is still there")
        until(lambda: server.service.bridge.running == 0, "its answer is still there")
    assert told.getvalue() == "", "that is no error of the server"


def test_a_client_that_reads_slowly_reads_all(tmp_path: Path) -> None:
    """It takes longer than the deadline in all, and what it must in each."""
    with live(tmp_path, scripted(script), slow_reader_s=0.7) as server:
        found, began = b"", time.monotonic()
        with unread(server, "/tokenize", TOKENS) as connection:
            connection.settimeout(10)
            while piece := connection.recv(4096):
                if len(found) // 2**17 != (len(found) + len(piece)) // 2**17:
                    time.sleep(0.3)
                found += piece
        assert time.monotonic() - began > 0.7
    head, _, answer = found.partition(b"\r\n\r\n")
    assert b" 200 " in head and json.loads(answer)["count"] > 10_000


def test_large_bodies_are_refused_unread(server: Live) -> None:
    key = server.key()
    status, body = call(server, "POST", "/tokenize", {"prompt": "a" * 150_000}, key)
    assert status == 413 and "100000 bytes are the most" in body["error"]["message"]
    status, body = call(
        server, "POST", "/v1/messages",
        {"model": NAME, "max_tokens": 1, "messages": [{"role": "user", "content": "a" * 150_000}]},
        key,
    )  # fmt: skip
    assert status == 413 and body["type"] == "error"


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it. The time is only for what never comes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_request_whose_client_left_is_gone_before_the_next_step(
    tmp_path: Path, seed: int
) -> None:
    """The test grants every step, so it knows in which one the client's leave was heard of."""
    draw, gate = random.Random(seed), threading.Semaphore(0)
    with live(tmp_path, scripted(script, gate=gate), drain_s=0) as server:
        bridge = server.service.bridge
        steps = bridge._engine.model.steps  # type: ignore[attr-defined]
        body = json.dumps({"model": NAME, "prompt": "long\n", "max_tokens": 400, "stream": True})
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def gone() -> bool:
            return bridge.running + bridge.waiting == 0

        try:
            for _ in range(20):
                steps.clear()
                with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
                    connection.sendall((head + body).encode())
                    until(lambda: bridge.waiting == 1, "the request did not come")
                    granted = draw.randint(1, 9)
                    gate.release(granted)
                    until(lambda count=granted: len(steps) == count, "a step did not run")
                until(lambda: bridge._commands.qsize() > 0 or gone(), "nobody heard of the leave")
                gate.release(100)
                until(gone, "the request is still there")
                assert len(steps) <= granted + 1, "only the step that had begun went on"
                while gate.acquire(blocking=False):
                    pass
        finally:
            gate.release(1000)


def test_clients_that_leave_at_any_time_leave_nothing_behind(server: Live, seed: int) -> None:
    draw, key = random.Random(seed), server.key()

    async def leave() -> None:
        told = await load.ask(
            port_of(server), "long\n", 400, leave_after=draw.randint(0, 5), key=key, model=NAME
        )
        assert told.status == 200

    async def many() -> None:
        for _ in range(25):
            await asyncio.gather(*(leave() for _ in range(8)))

    before = len(asyncio.all_tasks(server.loop))
    asyncio.run(many())
    service = server.service
    until(lambda: len(asyncio.all_tasks(server.loop)) <= before, "a task is still there")
    until(lambda: not service.everyone.running and not service.bridge.running, "one is still there")
    assert service.bridge.waiting == 0
    standing = service.reports.standing(service.auth.identify(key))
    assert standing.requests_at_once == 64, "the books still count a request that is gone"


def test_silence_is_broken_by_comments(tmp_path: Path) -> None:
    def slow(prompt: str) -> str:
        time.sleep(0.7)
        return "Yes."

    with live(tmp_path, scripted(slow), silence_s=0.2) as server:
        told = asyncio.run(load.ask(port_of(server), "x", 3, model=NAME))
        assert told.comments >= 2 and told.ending == "done"


def test_a_server_that_is_told_to_stop_ends_every_stream_properly(tmp_path: Path) -> None:
    with live(tmp_path, scripted(script, delay_s=0.02), drain_s=1.5) as server:

        async def streams() -> list[load.Told]:
            asked = [
                asyncio.ensure_future(load.ask(port_of(server), f"{n} long\n", 400, model=NAME))
                for n in range(8)
            ]
            await asyncio.sleep(0.4)
            server.stop()
            await asyncio.sleep(0.2)
            refused = await load.ask(port_of(server), "late", 3, model=NAME)
            assert refused.status == 503
            return await asyncio.gather(*asked)

        began = time.monotonic()
        told = asyncio.run(streams())
    assert time.monotonic() - began < 8
    assert all(one.ending in ("done", "error") for one in told), [one.ending for one in told]
    assert any(one.ending == "error" for one in told), "the streams were too short to be cut"


@pytest.mark.slow
def test_sigterm_ends_the_process_in_time() -> None:
    with load.served("--drain-seconds", "2") as server:

        async def streams() -> list[load.Told]:
            asked = [
                asyncio.ensure_future(load.ask(server.port, f"x {n}", 4000, stop_ids=[]))
                for n in range(8)
            ]
            await asyncio.sleep(2)
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

        began = time.monotonic()
        told = asyncio.run(streams())
        assert server.process.wait(20) == 0, "it drained, and did not end by the signal"
        took = time.monotonic() - began
    assert all(one.ending in ("done", "error") for one in told)
    assert took < 2 + 2 + 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_requests_leave_nothing_behind(seed: int) -> None:
    with load.served() as server:
        found = asyncio.run(load.soak(server, seed, requests=2000, warm_up=500))
    print(found)
    assert found.growth_bytes < 20e6 and abs(found.descriptors) <= 2 and found.open_after == 0
