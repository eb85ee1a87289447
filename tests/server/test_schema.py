"""Fields of other servers: refused by name where they would change an answer, else let through."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from overleap.server.refusals import Refusal
from overleap.server.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    MessagesBody,
    ResponsesBody,
    TokenizeBody,
)
from overleap.server.turns import parsed

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "m", "prompt": "Hi"}
RESPONSES = {"model": "m", "input": "Hi"}
BOTH = [
    ("structured_outputs", {"regex": "a"}, "response_format"),
    ("guided_json", {"type": "object"}, "response_format"),
    ("guided_regex", "[ab]", "response_format"),
    ("guided_choice", ["a", "b"], "response_format"),
    ("guided_grammar", "root ::= 'a'", "response_format"),
    ("repetition_penalty", 1.2, "frequency_penalty"),
]
REFUSED: list[tuple[type[Body], dict[str, Any], str, Any, str]] = [
    *((ChatBody, CHAT, *one) for one in BOTH),
    *((CompletionBody, COMPLETION, *one) for one in BOTH),
    (ChatBody, CHAT, "chat_template", "{{ messages }}", "own chat format"),
    (ChatBody, CHAT, "chat_template_kwargs", {"thinking": True}, "thinking is set with thinking"),
    (ChatBody, CHAT, "functions", [{"name": "f"}], "tools"),
    (ChatBody, CHAT, "function_call", {"name": "f"}, "tool_choice"),
    (ChatBody, CHAT, "modalities", ["text", "audio"], "text only"),
    (ChatBody, CHAT, "audio", {"voice": "a", "format": "mp3"}, "text only"),
    (ResponsesBody, RESPONSES, "previous_response_id", "resp_1", "nothing is stored"),
    (ResponsesBody, RESPONSES, "conversation", {"id": "conv_1"}, "nothing is stored"),
    (ResponsesBody, RESPONSES, "prompt", {"id": "pmpt_1"}, "no prompts are stored"),
    (ResponsesBody, RESPONSES, "background", True, "in the background"),
]


@pytest.mark.parametrize(("kind", "body", "name", "value", "words"), REFUSED)
def test_what_would_be_lost_is_refused_by_its_name(
    kind: type[Body], body: dict[str, Any], name: str, value: Any, words: str
) -> None:
    with pytest.raises(Refusal) as caught:
        parsed(kind, json.dumps({**body, name: value}).encode())
    refusal = caught.value
    assert (refusal.status, refusal.param) == (400, name)
    assert refusal.message.startswith(f"{name}: ") and words in refusal.message
    parsed(kind, json.dumps({**body, name: None}).encode())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, CHAT | {"repetition_penalty": 1, "modalities": ["text"], "functions": []}),
        (ChatBody, CHAT | {"function_call": "auto", "chat_template_kwargs": {}}),
        (ChatBody, CHAT | {"repetition_penalty": 1.0, "service_tier": "auto", "store": True}),
        (CompletionBody, COMPLETION | {"repetition_penalty": 1.0}),
        (ResponsesBody, RESPONSES | {"background": False, "store": True, "truncation": "auto"}),
        (ResponsesBody, RESPONSES | {"metadata": {"a": "b"}, "max_tool_calls": 3}),
    ],
)
def test_what_changes_nothing_is_let_through(kind: type[Body], body: dict[str, Any]) -> None:
    parsed(kind, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metadata", {f"k{n}": "v" for n in range(17)}),
        ("metadata", {"k" * 65: "v"}),
        ("metadata", {"k": "v" * 513}),
        ("metadata", {"k": 1}),
        ("truncation", "some"),
        ("max_tool_calls", 0),
        ("prompt_cache_key", "k" * 513),
        ("safety_identifier", "k" * 513),
    ],
)
def test_what_an_answer_repeats_is_bounded(name: str, value: Any) -> None:
    with pytest.raises(Refusal) as caught:
        parsed(ResponsesBody, json.dumps({**RESPONSES, name: value}).encode())
    assert caught.value.param is not None and caught.value.param.startswith(name)


MANY = 20_000
FAULTS: list[tuple[type[BaseModel], dict[str, Any], str, Any]] = [
    (CompletionBody, COMPLETION, "prompt", [-1] * MANY),
    (CompletionBody, COMPLETION, "prompt", [[-1] * MANY]),
    (CompletionBody, COMPLETION, "prompt", [None] * MANY),
    (CompletionBody, COMPLETION, "stop", [""] * MANY),
    (CompletionBody, COMPLETION, "logit_bias", {f"x{i}": 1 for i in range(MANY)}),
    (ChatBody, CHAT, "messages", [1] * MANY),
    (ChatBody, CHAT, "tools", [1] * MANY),
    (ChatBody, CHAT, "modalities", ["audio"] * MANY),
    (ChatBody, CHAT, "functions", [1] * MANY),
    (ResponsesBody, RESPONSES, "input", [1] * MANY),
    (ResponsesBody, RESPONSES, "metadata", {f"{i:099}": 1 for i in range(MANY)}),
    (MessagesBody, {**CHAT, "max_tokens": 1}, "system", [1] * MANY),
    (MessagesBody, {**CHAT, "max_tokens": 1}, "stop_sequences", [1] * MANY),
    (TokenizeBody, {}, "messages", [1] * MANY),
    (DetokenizeBody, {}, "tokens", [-1] * MANY),
]


@pytest.mark.parametrize(("kind", "body", "name", "value"), FAULTS)
def test_of_many_faults_one_is_told(
    kind: type[BaseModel], body: dict[str, Any], name: str, value: Any
) -> None:
    """Each that is found takes memory and holds everybody up: a body may have millions."""
    whole = {**body, name: value}
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(whole, strict=True)
    assert caught.value.error_count() <= 4, "one of each alternative"
    with pytest.raises(Refusal) as refused:
        parsed(kind, json.dumps(whole).encode())
    assert refused.value.status == 400 and refused.value.message.startswith(name)
