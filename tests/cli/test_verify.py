"""`--verify`: sound answers are said to be, others end the command; what proposing brought."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner, Result

from overleap.cli import app, main
from overleap.cli.session import _proposals, _why
from overleap.engine.request import Token
from overleap.engine.sampler import Draw, sample
from overleap.errors import StateError
from overleap.kernels.spec import Ops

FACTS = "The color of Alice is green.\nThe city is quiet.\nThe metal of Oscar is copper.\n"
DEMO = ("demo", "--tokens", 600, "--facts", 2, "--seed", 11)


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text, catch_exceptions=False)


def json_of(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "facts.txt"
    path.write_text("import os\n" * 150 + FACTS, "utf-8")
    return path


def test_ask_is_sound_cold_and_from_what_was_kept(document: Path, tmp_path: Path) -> None:
    command = ("ask", document, "What is the metal of Oscar?", "--verify")
    for known in (False, True):
        said = json_of(*command, "--cache-dir", tmp_path / "kept")
        assert (said["usage"]["cached_tokens"] > 256) == known
        assert said["verified"]["tokens"] == said["usage"]["generated_tokens"] > 0
        assert 0 <= said["verified"]["ties"] <= said["verified"]["tokens"]
    shown = run(*command)
    assert re.search(r"verified: computed from scratch in [\d.]+ s, all \d+ tokens", shown.stderr)
    assert re.search(r"scratch, [\d.]+ [KM]iB to verify", shown.stderr)
    plain = run(*command[:-1])
    assert "verif" not in plain.stderr and plain.stdout == shown.stdout
    assert json_of(*command[:-1])["verified"] is None


def test_generate_is_sound() -> None:
    for options in (("--temperature", 0), ("--temperature", 1, "--seed", 5, "--cache", "wide")):
        command = ("generate", "def main(", "--max-tokens", 20, *options)
        said = json_of(*command, "--verify")
        assert said["verified"]["tokens"] == said["usage"]["generated_tokens"]
        assert said["text"] == json_of(*command)["text"]


def test_every_turn_of_a_chat_is_checked() -> None:
    lines = f"{' '.join(FACTS.split())} What is the color of Alice?\nWhat is the metal of Oscar?\n"
    result = run("chat", "--temperature", 0, "--max-tokens", 4, "--verify", text=lines)
    assert result.exit_code == 0
    assert result.stderr.count("verified: computed from scratch") == 2


def test_every_answer_of_the_demo_is_checked() -> None:
    said = json_of(*DEMO, "--verify")
    given = [answer["usage"]["generated_tokens"] for answer in said["answers"]]
    assert said["verified"]["tokens"] == sum(given)
    assert said["predicted_peak_bytes"] > 0


def unlikely(logits_V: Tensor, draw: Draw, ops: Ops, allowed: bytes | None = None) -> Token:
    """A sampler that goes wrong at the second token of every answer."""
    if draw.index == 1:
        return Token(int(logits_V.argmin()))
    return sample(logits_V, draw, ops, allowed)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (("generate", "def main(", "--temperature", 0, "--max-tokens", 6), None),
        (("ask", "-", "What is the city?", "--max-tokens", 6), FACTS),
        (("chat", "--temperature", 0, "--max-tokens", 6), "Hello\nand again\n"),
        (DEMO, None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_answer_ends_the_command(
    command: Any, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overleap.engine.speculate.sample", unlikely)
    assert run(*command, text=text).exit_code == 0, "nobody looked"
    with pytest.raises(StateError, match=r"token 1 of the answer to request .* from scratch it is"):
        run(*command, "--verify", text=text)


def test_a_wrong_answer_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("overleap.engine.speculate.sample", unlikely)
    command = ["generate", "def main(", "--temperature", "0", "--verify", "--json"]
    monkeypatch.setattr(sys, "argv", ["overleap", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().out == "", "no document that claims an answer"


SAY: list[Callable[[], Any]] = [
    lambda: json_of("generate", "import os\n", "--max-tokens", 32, "--temperature", 0),
    lambda: json_of(*DEMO),
]


@pytest.mark.parametrize("say", SAY, ids=["generate", "demo"])
def test_what_proposing_brought_is_told(say: Callable[[], Any]) -> None:
    told = say()["speculation"]
    checked, accepted = sum(told["checked"]), sum(told["accepted"])
    assert 0 <= accepted <= checked
    assert told["state"] in ("trial", "on", "paused")
    assert told["acceptance"] == (accepted / checked if checked else None)
    assert 1 <= told["tokens_per_step"] <= 2
    assert told["why"]


@pytest.mark.parametrize(
    ("state", "gain", "words"),
    [
        ("none", None, "the model has no block to propose with"),
        ("off", None, "switched off"),
        ("trial", None, "too few answers yet"),
        ("on", 1.31, "on, 1.31 times the speed of plain decoding"),
        ("paused", 0.82, "does not pay, 0.82 times the speed"),
    ],
)
def test_why_proposals_are_made_or_not(state: str, gain: float | None, words: str) -> None:
    assert words in _why(state, gain)
    facts = {"checked": (0,), "acceptance": None, "tokens_per_step": 1.0, "why": _why(state, gain)}
    assert _proposals(facts).startswith("no proposals (")
    said = _proposals(facts | {"checked": (8,), "acceptance": 0.625, "tokens_per_step": 1.6})
    assert said.startswith("62% of 8 proposals right, 1.60 tokens a step (") and words in said
