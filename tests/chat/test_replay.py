"""Sampled answers put back for what clients send: the same ids for every way to write the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.dialects import render_body
from overleap.chat.profiles import profile_named
from overleap.chat.replay import ENTRY_BYTES, Replay, Said
from overleap.chat.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[2] / "overleap" / "bundled" / "mini")
PROFILE = profile_named("v4-flash")
TOOL = {
    "type": "function",
    "function": {"name": "read", "parameters": {"type": "object", "properties": {
        "path": {"type": "string"}, "line": {"type": "integer"}}}},
}  # fmt: skip
USER = {"role": "user", "content": "Read it."}
ARGUMENTS = {"path": "a.py", "line": 3}
# What was sampled: blanks and a token that the template would not write like this.
SAMPLED = (
    "I  should read.</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="read">\n'
    '<｜DSML｜parameter name="line" string="false"> 3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="path" string="true">a.py</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
SAID = Said("I  should read.", "", (("read", json.dumps(ARGUMENTS)),))


def encode(replay: Replay, messages: list[dict[str, Any]], tenant: str = "t") -> list[int]:
    body = {"model": "m", "messages": messages, "tools": [TOOL]}
    prompt, read = render_body("chat", body, profile=PROFILE)
    return replay.encode(prompt, read.conversation.messages, tenant)


def answer(**changed: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {
        "name": "read", "arguments": changed.pop("arguments", json.dumps(ARGUMENTS))}}  # fmt: skip
    return {"role": "assistant", "content": "", "reasoning_content": "I  should read.",
            "tool_calls": [call], **changed}  # fmt: skip


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "three"}


@pytest.fixture
def sampled() -> list[int]:
    return TOKENIZER.encode(SAMPLED, special=True)


@pytest.fixture
def replay(sampled: list[int]) -> Replay:
    made = Replay(TOKENIZER)
    made.remember(encode(made, [USER]), sampled, SAID, "t")
    return made


def expected(sampled: list[int]) -> list[int]:
    """The first prompt, the answer as it was sampled, its end: what the cache has."""
    return [*encode(Replay(TOKENIZER), [USER]), *sampled, TOKENIZER.eos_id]


@pytest.mark.parametrize(
    "returned",
    [
        answer(),
        answer(arguments=json.dumps(dict(reversed(ARGUMENTS.items())), indent=4)),
        answer(content=" \n"),
        answer(content=None),
        answer(reasoning_content="I  should read.\n"),
    ],
)
def test_ways_to_write_the_same_give_the_sampled_tokens(
    replay: Replay, sampled: list[int], returned: dict[str, Any]
) -> None:
    known = expected(sampled)
    ids = encode(replay, [USER, returned, RESULT])
    assert ids[: len(known)] == known
    rendered = encode(Replay(TOKENIZER), [USER, returned, RESULT])
    assert rendered[: len(known)] != known, "the template writes it in another way"
    assert ids[len(known) :] == rendered[-len(ids[len(known) :]) :], "what follows is the same"


@pytest.mark.parametrize(
    ("returned", "tenant"),
    [
        (answer(), "another tenant"),
        (answer(content="Changed."), "t"),
        (answer(reasoning_content="Changed."), "t"),
        (answer(arguments='{"path": "b.py", "line": 3}'), "t"),
    ],
)
def test_what_was_changed_is_rendered_as_it_is(
    replay: Replay, returned: dict[str, Any], tenant: str
) -> None:
    messages = [USER, returned, RESULT]
    assert encode(replay, messages, tenant) == encode(Replay(TOKENIZER), messages)


def test_another_beginning_is_another_answer(replay: Replay) -> None:
    messages = [{"role": "user", "content": "Read that."}, answer(), RESULT]
    assert encode(replay, messages) == encode(Replay(TOKENIZER), messages)


def test_two_answers_in_a_row_are_both_put_back(replay: Replay, sampled: list[int]) -> None:
    first = [USER, answer(), RESULT]
    before = encode(replay, first)
    replay.remember(before, sampled, SAID, "t")
    ids = encode(replay, [*first, answer(content=" "), RESULT])
    known = [*before, *sampled, TOKENIZER.eos_id]
    assert ids[: len(known)] == known


def test_the_least_recently_used_answers_are_forgotten(seed: int) -> None:
    draw = random.Random(seed)
    replay = Replay(TOKENIZER, max_bytes=10 * ENTRY_BYTES + 2000)
    questions = [{"role": "user", "content": f"Question {n}"} for n in range(40)]
    for question in questions:
        words = " ".join(draw.choices(["a", "b", "c"], k=5))
        replay.remember(
            encode(replay, [question]), TOKENIZER.encode(f"so</think>{words} ", special=True),
            Said("so", f"{words} ", ()), "t",
        )  # fmt: skip
        question["answer"] = words

    def known(question: dict[str, Any]) -> bool:
        asked = {"role": "user", "content": question["content"]}
        said = {"role": "assistant", "content": question["answer"], "reasoning_content": "so"}
        messages = [asked, said, {"role": "user", "content": "more"}]
        return encode(replay, messages) != encode(Replay(TOKENIZER), messages)

    assert replay._bytes <= 10 * ENTRY_BYTES + 2000
    assert not any(known(question) for question in questions[:25])
    assert known(questions[-1]) and known(questions[-2])
