"""What does not fit is refused before torch is imported, with the largest context that does."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.cli import app
from overleap.cli.room import SLICE, Front, Room, open_front
from overleap.config import ModelConfig
from overleap.errors import CapacityError, OverleapError, RequestError

MIB = 2**20
FORMS = list(CacheFormat)


def refused(*arguments: object) -> tuple[str, str, bool]:
    """The error of a command in a process of its own, its hint, and whether torch was imported."""
    code = (
        "import json, sys\n"
        "from overleap.cli import app\n"
        "from overleap.errors import OverleapError\n"
        "try:\n    app(json.loads(sys.argv[1]), standalone_mode=False)\n"
        "except OverleapError as error:\n"
        "    print(json.dumps([error.message, error.hint, 'torch' in sys.modules]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps([str(a) for a in arguments])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    message, hint, torch = json.loads(done.stdout)
    return message, hint, torch


def test_a_demo_that_does_not_fit() -> None:
    message, hint, torch = refused("demo", "--tokens", 100_000_000, "--memory", "1GiB")
    assert not torch
    assert re.fullmatch(
        r"a context of 100000000 tokens needs [\d.]+ GiB of memory \([\d.]+ GiB of cache, "
        r"[\d.]+ MiB of weights at least\), 1\.0 GiB may be used",
        message,
    )
    found = re.fullmatch(r"a context of (\d+) tokens fits", hint)
    assert found and 100_000 < int(found[1]) <= 1_048_576


@pytest.mark.parametrize("command", ["ask", "generate"])
def test_a_text_that_does_not_fit(command: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("def main(argv):\n    return len(argv)\n" * 60_000, "utf-8")
    given: list[object] = [tmp_path / "long.txt", "What?"]
    if command == "generate":
        given = [(tmp_path / "long.txt").read_text("utf-8")[:100_000]]
    message, hint, torch = refused(command, *given, "--memory", "200MiB")
    assert not torch
    assert "200.0 MiB may be used" in message and hint == "no context fits beside the weights"


def test_a_conversation_that_does_not_fit() -> None:
    message, hint, torch = refused("chat", "--context", 1_000_000, "--memory", "300MiB")
    assert not torch and "a context of 1000000 tokens needs" in message
    message, hint, torch = refused("chat", "--context", 1_048_577)
    assert not torch and "1048577 positions, the model has 1048576" in message
    assert hint == "a context of 1048576 is the most"


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_hint_names_the_largest_that_fits(form: CacheFormat, verify: bool, seed: int) -> None:
    draw, config = random.Random(seed), ModelConfig.preset("v4-flash")
    resident = draw.randrange(10 * MIB, 3000 * MIB)
    for _ in range(6):
        least = resident + layout.scratch_bytes(config, 64)
        room = Room(form, least + draw.randrange(200 * MIB, 4000 * MIB), verify)
        with pytest.raises(CapacityError) as caught:
            room.fit(config, 20_000_000, resident)
        assert caught.value.hint is not None
        found = re.fullmatch(r"a context of (\d+) tokens fits", caught.value.hint)
        assert found, caught.value.hint
        largest = int(found[1])
        assert room.fit(config, largest, resident).peak_bytes <= (room.limit or 0)
        if largest < config.max_position_embeddings:
            with pytest.raises(CapacityError):
                room.fit(config, largest + layout.PAGE_TOKENS, resident)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_computation_is_part_of_the_budget(form: CacheFormat, seed: int) -> None:
    config, tokens = ModelConfig.preset("v4-flash"), random.Random(seed).randrange(1, 10**6)
    once = Room(form, 2**50, False).fit(config, tokens, 300 * MIB)
    twice = Room(form, 2**50, True).fit(config, tokens, 300 * MIB)
    assert once.chunk_tokens == twice.chunk_tokens
    second = layout.cache_bytes(config, tokens, form).total
    assert twice.peak_bytes - once.peak_bytes == second
    assert Room(form, once.peak_bytes, False).fit(config, tokens, 300 * MIB) == once
    with pytest.raises(CapacityError, match="the second computation of --verify included"):
        Room(form, once.peak_bytes - once.scratch_bytes, True).fit(config, tokens, 300 * MIB)


class Counting:
    """A tokenizer of one token for four characters, and how many characters it was asked for."""

    def __init__(self) -> None:
        self.seen = 0

    def encode(self, text: str) -> list[int]:
        self.seen += len(text)
        return [0] * -(-len(text) // 4)


def counting_front() -> tuple[Front, Counting]:
    mini, tokenizer = open_front("mini"), Counting()
    return Front(mini.folder, mini.config, tokenizer, mini.profile), tokenizer


def test_a_text_is_counted_only_as_far_as_needed() -> None:
    front, tokenizer = counting_front()
    room = Room(CacheFormat.RELEASE, 2**40, False)
    most = front.config.max_position_embeddings
    room.expect_text(front, "x" * (most - 10), 10)
    assert tokenizer.seen == 0, "so few characters cannot be too many tokens"
    room.expect_text(front, "x" * (2 * most), 10)
    assert tokenizer.seen == 2 * most
    tokenizer.seen = 0
    with pytest.raises(RequestError, match=r"the first [\d,]+ of 20,000,000 characters are too"):
        room.expect_text(front, "x" * 20_000_000, 10)
    assert 4 * most <= tokenizer.seen <= 4 * most + 2 * SLICE


def test_what_fits_is_let_through(seed: int) -> None:
    """Counting by pieces never refuses what the whole would not be refused for."""
    front, draw = open_front("mini"), random.Random(seed)
    words = ["\n", " ", "    ", "def", "main", "_", "(", "0", "é", "的", "=="]
    text = "".join(draw.choices(words, k=400_000))
    tokens = len(front.tokenizer.encode(text))
    config = front.config.__class__(**{**vars(front.config), "max_position_embeddings": tokens})
    narrow = Front(front.folder, config, front.tokenizer, front.profile)
    Room(CacheFormat.RELEASE, 2**40, False).expect_text(narrow, text, 0)
    with pytest.raises(RequestError):
        Room(CacheFormat.RELEASE, 2**40, False).expect_text(narrow, text * 2, 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--memory", "much"), "'much' is no amount of memory"),
        (("--cache", "narrow"), "--cache is 'narrow'"),
        (("--cache-space", "0"), "'0' is no amount of memory"),
    ],
)
def test_bad_options_are_refused_without_torch(options: Any, sentence: str) -> None:
    message, _, torch = refused("ask", "README.md", "What?", *options)
    assert sentence in message and not torch


def test_no_such_model() -> None:
    with pytest.raises(OverleapError, match="not a checkpoint folder"):
        CliRunner().invoke(app, ["generate", "x", "--model", ""], catch_exceptions=False)
