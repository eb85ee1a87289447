"""The official encoding vectors of the preview, byte for byte, and where the library differs.

They are not part of this repository: without them beside the checkout, these tests are skipped.
"""

import json
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import pytest
from tokenizers import Tokenizer as HfTokenizer

from overleap.chat.dialects import Prompt, render_chat
from overleap.chat.profiles import profile_named
from overleap.chat.replies import parse_reply
from overleap.chat.tokenizer import EOS, Tokenizer

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors" / "encoding"
pytestmark = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="the official vectors are not at ../shared/vectors/encoding"
)
# Which mode each vector was made in shows in its output: the fourth closes thinking at once.
THINKING = {1: True, 2: True, 3: True, 4: False}


def vector(number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Messages, tools and the expected text."""
    raw = json.loads((VECTORS / f"input_{number}.json").read_text("utf-8"))
    expected = (VECTORS / f"output_{number}.txt").read_text("utf-8")
    return (
        (raw, [], expected) if isinstance(raw, list) else (raw["messages"], raw["tools"], expected)
    )


def rendered(number: int, profile: str, effort: str | None = None) -> Prompt:
    messages, tools, _ = vector(number)
    return render_chat(
        messages,
        profile=profile_named(profile),
        thinking=THINKING[number],
        effort=effort,
        tools=tools,
        transcript=True,
    )


@pytest.mark.parametrize("number", THINKING)
def test_the_preview_renders_the_vector(number: int) -> None:
    assert rendered(number, "v4-pro").text == vector(number)[2]
    assert rendered(number, "v4-flash").text == vector(number)[2]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_effort_is_all_that_changed_after_the_preview(number: int) -> None:
    """The general releases render the vectors at their lowest level, and with a text above it."""
    expected = vector(number)[2]
    assert rendered(number, "v4-pro-0813", "low").text == expected
    high = rendered(number, "v4-pro-0813", "high").text
    assert high != expected
    bos = expected.index(">") + 1
    assert high[:bos] == expected[:bos] and high.endswith(expected[bos:])
    assert rendered(number, "v4-pro", "max").text == high


@pytest.mark.parametrize("number", THINKING)
def test_marked_tokens_are_the_tokens_of_the_text(
    number: int, tokenizers: dict[str, Tokenizer], references: dict[str, HfTokenizer]
) -> None:
    """The vectors hold no spelled-out tokens, so reading all of them as tokens is right here."""
    ids = tokenizers["released"].encode_prompt(rendered(number, "v4-pro"))
    assert ids == references["released"].encode(vector(number)[2], add_special_tokens=False).ids


@pytest.mark.parametrize("number", THINKING)
def test_the_last_reply_is_asked_for_and_read_back(number: int) -> None:
    messages, tools, expected = vector(number)
    prompt = render_chat(
        messages[:-1], profile=profile_named("v4-pro"), thinking=THINKING[number], tools=tools
    )
    assert expected.startswith(prompt.text)
    reply = parse_reply(expected[len(prompt.text) :].removesuffix(EOS), prompt.reply)
    assert reply.content == messages[-1]["content"]
    assert reply.reasoning == messages[-1].get("reasoning_content", "")
    assert reply.calls == ()


@pytest.mark.parametrize("number", [1, 3])
def test_the_tool_call_is_asked_for_and_read_back(number: int) -> None:
    messages, tools, expected = vector(number)
    at = next(i for i, m in enumerate(messages) if m.get("tool_calls"))
    prompt = render_chat(messages[:at], profile=profile_named("v4-pro"), tools=tools)
    generated = expected[len(prompt.text) :]
    reply = parse_reply(generated[: generated.index(EOS)], prompt.reply)
    assert expected.startswith(prompt.text)
    function = messages[at]["tool_calls"][0]["function"]
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [
        (function["name"], json.loads(function["arguments"]))
    ]
    assert reply.reasoning == messages[at]["reasoning_content"]
    assert reply.finish.reason == "tool_calls"


# -- where the library and a vector differ by design: it serves requests, vectors are transcripts


def by_the_library(number: int, **more: Any) -> str:
    messages, tools, _ = vector(number)
    body = {"model": "DeepSeek-V4-Pro", "messages": messages, "reasoning_effort": "low", **more}
    if tools:
        body["tools"] = tools
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    return recipe.DeepseekV4Encoding().render_conversation(request.conversation).prompt


def test_the_library_opens_a_reply_after_a_finished_one() -> None:
    assert by_the_library(1) == vector(1)[2] + "<｜Assistant｜><think>"


def test_the_library_forgets_the_last_reasoning_as_a_new_reply_follows() -> None:
    expected = vector(2)[2]
    reasoning = f"<think>{vector(2)[0][-1]['reasoning_content']}</think>"
    assert by_the_library(2) == expected.replace(reasoning, "</think>") + "<｜Assistant｜><think>"


def test_the_library_has_no_developer_role() -> None:
    """It belongs to the vendor's search agent, which no public API offers."""
    with pytest.raises(ValueError, match="unknown variant `developer`"):
        by_the_library(3)


def test_the_library_has_no_tasks() -> None:
    """So has `task`: the key is ignored, and the reply stands without its token."""
    expected = vector(4)[2].replace("<｜action｜>", "") + "<｜Assistant｜></think>"
    assert by_the_library(4, thinking={"type": "disabled"}, reasoning_effort=None) == expected
