"""What a turn asks of its answer, and how the answer comes back as history, in all three APIs."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.dialects import Api
from overleap.server.bridge import Generation
from tests.server import load
from tests.server.live import NAME, TOKENIZER, Live, live, scripted

PATHS: dict[Api, str] = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1]}},
    "required": ["a"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"input": {"type": "string"}}}
CALLS = "\n\n<｜DSML｜tool_calls>\n{}</｜DSML｜tool_calls>"
INVOKE = (
    '<｜DSML｜invoke name="{}">\n<｜DSML｜parameter name="input" string="{}">{}'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
)
# What the client asks for -> the answer. The last words of a prompt choose.
ANSWERS = {
    "a format": 'hm</think>{"b": 2}',
    "a call": "hm</think>" + CALLS.format(INVOKE.format("find", "true", "x")),
    # Blanks that the template does not write, so that sampled tokens are known from rendered ones.
    "two calls": "hm</think>" + CALLS.format(INVOKE.format("find", "false", ' "x"') * 2),
    "a space": "hm</think>" + CALLS.format(INVOKE.format("ns__find", "false", ' "x"')),
    "a patch": "hm</think>" + CALLS.format(INVOKE.format("apply_patch", "false", ' "x"')),
    "an end": "hm</think>  So a <",
    "a stop": "hm</think>  So it is. And on",
}


def script(prompt: str) -> str:
    return next(answer for words, answer in ANSWERS.items() if prompt.rfind(words) > 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("turns"), scripted(script)) as running:
        yield running


def call(server: Live, path: str, body: Any) -> tuple[int, Any]:
    port = int(server.url.rpartition(":")[2])
    status, _, raw = asyncio.run(load.send(port, "POST", path, {"model": NAME} | body))
    return status, json.loads(raw)


def asked(api: Api, words: str, **more: Any) -> dict[str, Any]:
    tool: dict[str, Any] = {"name": "find", "parameters": PARAMETERS}
    if api == "chat":
        tool = {"type": "function", "function": tool}
    elif api == "responses":
        tool |= {"type": "function"}
    else:
        tool = {"name": "find", "input_schema": PARAMETERS}
    said = [{"role": "user", "content": f"By {api}: {words}"}]
    limit = "max_output_tokens" if api == "responses" else "max_tokens"
    body = {"input" if api == "responses" else "messages": said, limit: 300, "tools": [tool]}
    return body | {"temperature": 0} | more


def ids_of(server: Live, api: Api, body: dict[str, Any]) -> tuple[int, ...]:
    """The prompt of a body, with the answers that are remembered."""
    turns, customer = server.service.turns, server.service.auth.identify(None)
    raw = json.dumps({"model": NAME} | body).encode()
    return turns._prepare(api, raw, customer)[0].ids


def shown(api: Api, answer: Any) -> tuple[str, int]:
    """The text of an answer, and how many tools it calls."""
    if api == "chat":
        message = answer["choices"][0]["message"]
        return message["content"] or "", len(message.get("tool_calls") or ())
    parts = answer["content" if api == "messages" else "output"]
    calls = sum(part["type"] in ("tool_use", "function_call") for part in parts)
    if api == "responses":
        parts = [one for part in parts if part["type"] == "message" for one in part["content"]]
    return "".join(part["text"] for part in parts if part["type"].endswith("text")), calls


JSON_SCHEMA = {"type": "json_schema", "name": "n", "schema": SCHEMA}
FORMATS: list[tuple[Api, dict[str, Any]]] = [
    ("chat", {"response_format": {"type": "json_schema", "json_schema": JSON_SCHEMA}}),
    ("chat", {"response_format": {"type": "regex", "regex": '[{]"a": 1[}]'}}),
    ("responses", {"text": {"format": JSON_SCHEMA}}),
    ("messages", {"output_config": {"format": JSON_SCHEMA}}),
    ("messages", {"output_format": JSON_SCHEMA}),
]


@pytest.mark.parametrize("tools", [True, False])
@pytest.mark.parametrize(("api", "format"), FORMATS)
def test_a_format_is_held_beside_tools_too(
    server: Live, api: Api, format: dict[str, Any], tools: bool
) -> None:
    more = format if tools else format | {"tools": []}
    status, answer = call(server, PATHS[api], asked(api, "a format", **more))
    assert status == 200 and shown(api, answer) == ('{"a": 1}', 0), answer
    if tools:
        status, answer = call(server, PATHS[api], asked(api, "a call", **format))
        assert status == 200 and shown(api, answer) == ("", 1), answer


def test_a_json_object_is_held_beside_tools_too(server: Live) -> None:
    format = {"response_format": {"type": "json_object"}}
    body = asked("chat", "json, not a format", **format)
    status, answer = call(server, PATHS["chat"], body)
    assert status == 200 and json.loads(shown("chat", answer)[0]) == {"b": 2}
    raw = json.dumps({"model": NAME} | body).encode()
    customer = server.service.auth.identify(None)
    wanted = server.service.turns._prepare("chat", raw, customer)[1]
    assert wanted is not None and (wanted.kind, wanted.source) == ("json", "") and wanted.tools


def test_a_format_is_held_where_the_model_has_more_ids_than_the_tokenizer(tmp_path: Path) -> None:
    ids = TOKENIZER.vocab_size + 500
    with live(tmp_path, scripted(script, vocab_size=ids), vocab_size=ids) as server:
        body = asked("chat", "a format", **FORMATS[0][1])
        status, answer = call(server, PATHS["chat"], body)
    assert status == 200 and shown("chat", answer) == ('{"a": 1}', 0), answer


@pytest.mark.parametrize("format", [{"type": "yaml"}, {"type": "json_schema"}, "json"])
def test_another_output_format_of_messages_is_refused(server: Live, format: Any) -> None:
    body = asked("messages", "a format", output_config={"format": format})
    status, answer = call(server, PATHS["messages"], body)
    assert status == 400 and "the output format is not understood" in answer["error"]["message"]


def chat_history(answer: Any) -> list[dict[str, Any]]:
    message = answer["choices"][0]["message"]
    content = (message["content"] or "").strip()
    results = [
        {"role": "tool", "tool_call_id": one["id"], "content": "done"}
        for one in message.get("tool_calls") or ()
    ]
    again = {key: message[key] for key in ("role", "reasoning_content", "tool_calls") if
             message.get(key)}  # fmt: skip
    return [again | {"content": content}, *(results or [{"role": "user", "content": "More."}])]


def messages_history(answer: Any) -> list[dict[str, Any]]:
    parts = [
        part | ({"text": part["text"].strip()} if part["type"] == "text" else {})
        for part in answer["content"]
    ]
    results = [
        {"type": "tool_result", "tool_use_id": part["id"], "content": "done"}
        for part in parts
        if part["type"] == "tool_use"
    ]
    more = results or [{"type": "text", "text": "More."}]
    return [{"role": "assistant", "content": parts}, {"role": "user", "content": more}]


def responses_history(answer: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = answer["output"]
    for item in items:
        if item["type"] == "message":
            item["content"][0]["text"] = item["content"][0]["text"].strip()
    results = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "done"}
        for item in items
        if item["type"].endswith("_call")
    ]
    return [*items, *(results or [{"role": "user", "content": "More."}])]


HISTORIES = {
    "chat": chat_history,
    "messages": messages_history,
    "responses": responses_history,
}
SPACE = {
    "type": "namespace",
    "name": "ns",
    "description": "A space.",
    "tools": [{"type": "function", "name": "find", "parameters": PARAMETERS}],
}


def again(api: Api, body: dict[str, Any], answer: Any) -> dict[str, Any]:
    """The request that follows an answer."""
    field = "input" if api == "responses" else "messages"
    return body | {field: [*body[field], *HISTORIES[api](answer)]}


@pytest.mark.parametrize(
    ("api", "words", "more"),
    [
        *((api, words, {}) for api in PATHS for words in ("two calls", "an end")),
        ("responses", "a space", {"tools": [SPACE]}),
        ("responses", "a patch", {"tools": [{"type": "custom", "name": "apply_patch"}]}),
    ],
)
def test_an_answer_comes_back_as_it_was_sampled(
    server: Live, api: Api, words: str, more: dict[str, Any]
) -> None:
    body = asked(api, words, **more)
    known = [*ids_of(server, api, body), *TOKENIZER.encode(ANSWERS[words], special=True)]
    status, answer = call(server, PATHS[api], body)
    assert status == 200
    ids = ids_of(server, api, again(api, body, answer))
    assert list(ids[: len(known)]) == known


def test_what_came_behind_a_stop_string_is_not_remembered(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's end may come with the string, before the engine hears that it is enough."""
    monkeypatch.setattr(Generation, "cancel", lambda generation: None)
    body = asked("chat", "a stop", stop=[" is."])
    status, answer = call(server, PATHS["chat"], body)
    assert status == 200 and shown("chat", answer)[0].strip() == "So it"
    ids = ids_of(server, "chat", again("chat", body, answer))
    assert "And on" not in TOKENIZER.decode(ids)


def test_any_tool_has_to_be_called(server: Live) -> None:
    """As with a required call of Chat Completions: by a grammar, and not where thinking is on."""
    body = asked("messages", "a format", tool_choice={"type": "any"})
    body["tools"] = [body["tools"][0] | {"name": "other"}, *body["tools"]]
    prompt = TOKENIZER.decode(ids_of(server, "messages", body), control=True)
    assert "other" in prompt and prompt.endswith("tool_calls>\n"), "calls are begun"
    status, answer = call(server, PATHS["messages"], body)
    assert answer["content"][0]["name"] == body["tools"][1]["name"], "the model's own choice"
    assert status == 200 and answer["content"][0]["type"] == "tool_use"
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        status, answer = call(server, PATHS["messages"], body | {"thinking": thinking})
        assert status == 400
        assert "Thinking mode does not support this tool_choice" in answer["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "max"},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]},
    ],
)
def test_tokens_are_those_of_the_prompt(server: Live, more: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "How many?"}]} | more
    status, told = call(server, "/tokenize", body)
    assert status == 200 and tuple(told["tokens"]) == ids_of(server, "chat", body)


def test_a_schema_that_is_nested_too_deep_is_refused(server: Live) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(75):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    status, told = call(server, PATHS["chat"], asked("chat", "a call", tools=[tool]))
    assert status == 400 and "nesting depth" in told["error"]["message"]


def test_a_response_repeats_what_was_asked(server: Live) -> None:
    said = {
        "metadata": {"a": "b"},
        "truncation": "auto",
        "max_tool_calls": 3,
        "prompt_cache_key": "key",
        "safety_identifier": "who",
    }
    status, answer = call(server, PATHS["responses"], asked("responses", "an end", **said))
    assert status == 200, answer
    assert {name: answer[name] for name in said} == said
    status, answer = call(server, PATHS["responses"], asked("responses", "an end"))
    assert (answer["metadata"], answer["truncation"]) == ({}, "disabled")
