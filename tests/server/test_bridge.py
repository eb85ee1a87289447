"""Between the loop and the engine's thread, where that thread ends though nobody told it to."""

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server import load
from tests.server.live import NAME, Live, live, scripted

HELLO = [{"role": "user", "content": "Hello"}]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asking(
    server: Live, told: dict[str, tuple[int, bytes]], method: str, path: str, **body: Any
) -> threading.Thread:
    """A client in a thread of its own; what it is told stands under its path."""
    port = int(server.url.rpartition(":")[2])

    def ask() -> None:
        sent = {"model": NAME} | body if body else None
        status, _, raw = asyncio.run(load.send(port, method, path, sent))
        told[path] = status, raw

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("place", ["between steps", "in a step"])
def test_nobody_waits_for_an_engine_that_has_ended(tmp_path: Path, place: str) -> None:
    """One answer runs, one waits for a place, and three ask a thread that hears nobody."""
    gate, told = threading.Semaphore(0), dict[str, tuple[int, bytes]]()
    made = scripted(lambda prompt: "Yes. " * 50, slots=1, gate=gate)
    with live(tmp_path, made, slots=1) as server:
        bridge = server.service.bridge
        try:
            chat, messages = "/v1/chat/completions", "/v1/messages"
            asked = [asking(server, told, "POST", chat, messages=HELLO, stream=True)]
            until(lambda: len(bridge._live) == 1)
            asked += [asking(server, told, "POST", messages, messages=HELLO, max_tokens=9)]
            until(lambda: len(bridge._live) == 2)
            gate.release()
            until(lambda: len(bridge._handles) == 2 and bridge.running == 1)
            if place == "between steps":
                bridge._commands.put(sys.exit)
            else:
                bridge._engine.model.logits = sys.exit  # type: ignore[attr-defined]
            before = bridge._commands.qsize()
            asked += [asking(server, told, "POST", "/v1/completions", prompt="a", max_tokens=1)]
            asked += [asking(server, told, "GET", path) for path in ("/metrics", "/status")]
            until(lambda: bridge._commands.qsize() == before + 3)
        finally:
            gate.release(1000)
        for thread in asked:
            thread.join(20)
        assert len(told) == len(asked), f"only {sorted(told)} were told anything"
        status, raw = told[chat]
        assert status == 200 and b"[DONE]" not in raw
        assert b'"code":"model_error"' in raw.rpartition(b"event: error")[2].replace(b": ", b":")
        status, raw = told[messages]
        assert status == 500 and json.loads(raw)["error"]["type"] == "api_error"
        for path in ("/v1/completions", "/metrics", "/status"):
            status, raw = told[path]
            assert status == 503 and json.loads(raw)["error"]["code"] == "engine_ended", path
        until(lambda: not server.service.everyone.running)
        asking(server, told, "POST", "/v1/completions", prompt="b", max_tokens=1).join(20)
        asking(server, told, "GET", "/readyz").join(20)
        asking(server, told, "GET", "/livez").join(20)
        assert {told[path][0] for path in ("/v1/completions", "/readyz", "/livez")} == {503}
    assert bridge.running == bridge.waiting == 0
