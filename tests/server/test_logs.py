"""Logs: one line of JSON an event, and none of the secrets that were put into them."""

import asyncio
import io
import json
import logging
import random
import secrets
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from overleap.server.logs import configure, redacted
from tests.server import load
from tests.server.live import NAME, live, scripted


def lines_of(**fields: Any) -> str:
    stream = io.StringIO()
    logger = configure(stream)
    logger.info("request", extra=fields)
    return stream.getvalue()


def test_a_line() -> None:
    line = lines_of(key="abc", tokens=5, seconds=0.25, cached=True, none=None)
    assert line.count("\n") == 1
    event = json.loads(line)
    assert event.pop("time").endswith("Z")
    assert event == {
        "level": "info", "event": "request", "key": "abc", "tokens": 5,
        "seconds": 0.25, "cached": True, "none": None,
    }  # fmt: skip


def test_a_value_cannot_begin_a_line() -> None:
    line = lines_of(path='/v1\n{"event": "forged"}\r\x1b[31m\u2028')
    assert line.count("\n") == 1 and line.isascii() and "\x1b" not in line


def test_nothing_secret_is_told(seed: int) -> None:
    """Canaries in every place a careless caller could put them."""
    draw = random.Random(seed)
    secret = secrets.token_urlsafe(32)
    key = f"ol-{'a1' * 6}-{secret}"
    text = f"a canary {draw.getrandbits(64):x} in a prompt"
    places: list[dict[str, Any]] = [
        {"headers": {"Authorization": f"Bearer {key}", "X-Api-Key": key, "Cookie": secret}},
        {"authorization": secret}, {"note": f"they sent Bearer {secret}"}, {"note": key},
        {"note": [key, {"deep": f"bearer  {secret}"}]}, {"url": f"/x?key={key}&y=1"},
        {"where": f"postgresql://user:{secret}@host/name"}, {"note": f"Basic {secret}"},
        {"note": f"sk-{secret}"}, {"prompt": text}, {"messages": [{"content": text}]},
        {"request": {"input": text, "system": [text]}}, {"body": text.encode()},
    ]  # fmt: skip
    for fields in places:
        line = lines_of(**fields)
        assert secret not in line and text not in line, line
    assert "ol-a1a1a1a1a1a1-..." in lines_of(note=key)


def test_an_error_tells_where_but_no_secret() -> None:
    stream = io.StringIO()
    logger = configure(stream)
    key = f"ol-{'a1' * 6}-{secrets.token_urlsafe(32)}"
    try:
        raise ValueError(f"cannot use {key}")
    except ValueError:
        logger.exception("failed %s", key)
    event = json.loads(stream.getvalue())
    assert key not in stream.getvalue() and event["error"].startswith("ValueError: cannot use ol-")
    assert "test_logs.py" in event["trace"][-1]


def test_a_request_leaves_a_line_without_its_text(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure(stream)
    with live(tmp_path, scripted(lambda prompt: "hm</think>An answer.")) as server:
        said = [{"role": "user", "content": "A question"}]
        body = {"model": NAME, "messages": said, "max_tokens": 20, "user": "CANARY"}
        port = int(server.url.rpartition(":")[2])
        status, _, raw = asyncio.run(load.send(port, "POST", "/v1/chat/completions", body))
        assert status == 200
    (event,) = [e for e in map(json.loads, stream.getvalue().splitlines()) if "request" in e]
    usage = json.loads(raw)["usage"]
    assert event["request"] == json.loads(raw)["id"] and event["key"] == "local"
    assert event["output_tokens"] == usage["completion_tokens"]
    assert event["cache_hit_tokens"] + event["cache_miss_tokens"] == usage["prompt_tokens"]
    assert not any(text in stream.getvalue() for text in ("question", "answer.", "CANARY"))


@pytest.mark.parametrize("name", ["uvicorn.error", "asyncio"])
def test_what_the_server_stands_on_tells_no_secret(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A statement that fails quotes its values, on several lines; so do tasks nobody waited for."""
    stream, secret = io.StringIO(), secrets.token_urlsafe(32)
    configure(stream)
    values = {"key": secret, "note": "two\nlines"}
    with (
        sa.create_engine("sqlite://").connect() as connection,
        pytest.raises(sa.exc.OperationalError) as caught,
    ):
        connection.execute(sa.text("SELECT :key, :note FROM missing"), values)
    assert secret in str(caught.value), "the error itself tells it"
    logging.getLogger(name).error("failed: %s", caught.value, exc_info=caught.value)
    logging.getLogger(name).info("Started server process")
    event = json.loads(stream.getvalue())
    assert secret not in stream.getvalue() and "lines" not in event["error"]
    assert "no such table: missing" in event["error"] and "no such table" in event["event"]
    assert capfd.readouterr().err == ""


def test_of_a_text_its_length_is_told() -> None:
    assert json.loads(lines_of(prompt="a question"))["prompt"] == "(10 left out)"


def test_long_values_are_cut() -> None:
    assert len(lines_of(note="x" * 10**6)) < 5000


def test_handlers_do_not_pile_up() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(first)
    configure(second).info("once")
    assert first.getvalue() == "" and second.getvalue().count("\n") == 1
    assert not logging.getLogger("overleap.server").propagate


@pytest.mark.parametrize(
    "text", ["a bear walks in", "basic facts", "ol-shown", "https://host:80/x@y", "task-12345678"]
)
def test_plain_words_stay(text: str) -> None:
    assert redacted(text).replace("basic ...", text) == text
