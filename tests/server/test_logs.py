"""Logs: one line of JSON an event, and none of the secrets that were put into them."""

import io
import json
import logging
import random
import secrets
from typing import Any

import pytest

from overleap.server.logs import configure, redacted


def lines_of(*, texts: bool = False, **fields: Any) -> str:
    stream = io.StringIO()
    logger = configure(stream, texts=texts)
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


def test_texts_only_when_asked_for() -> None:
    assert json.loads(lines_of(prompt="a question"))["prompt"] == "(10 left out)"
    assert json.loads(lines_of(texts=True, prompt="a question"))["prompt"] == "a question"


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
