"""The `anthropic` client, unchanged, against a server: messages, thinking, tools, errors."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import NAME, Live, live, scripted

anthropic = pytest.importorskip("anthropic", reason="the anthropic client is not installed")

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
CALL = (
    "I should look.</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def script(prompt: str) -> str:
    if "get_weather" in prompt and "<tool_result>" not in prompt:
        return CALL.removeprefix("I should look.</think>") if prompt.endswith("</think>") else CALL
    thought = "" if prompt.endswith("</think>") else "Let me think.</think>"
    return f"{thought}Hello, world!"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("scripted"), scripted(script)) as running:
        yield running


def client(server: Live) -> Any:
    return server.client(anthropic.Anthropic, base_url=server.url, api_key="none")


def ask(server: Live, text: str = "Hi", **fields: Any) -> Any:
    fields = {"max_tokens": 500, "thinking": {"type": "disabled"}, **fields}
    messages = [{"role": "user", "content": text}]
    return client(server).messages.create(model=NAME, messages=messages, **fields)


def test_a_message(server: Live) -> None:
    answer = ask(server, system="Be kind.")
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Hello, world!"
    assert answer.stop_reason == "end_turn" and answer.role == "assistant"
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0


def test_thinking_comes_in_a_block_of_its_own(server: Live) -> None:
    answer = ask(server, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "Let me think."


def test_a_stream_is_the_same_answer(server: Live) -> None:
    messages = [{"role": "user", "content": "Stream it"}]
    with client(server).messages.stream(
        model=NAME, messages=messages, max_tokens=2000,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:  # fmt: skip
        names = [event.type for event in stream]
        answer = stream.get_final_message()
    assert names[0] == "message_start" and names[-1] == "message_stop"
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[1].text == "Hello, world!"
    whole = ask(server, "Stream it", thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_results_read(server: Live, stream: bool) -> None:
    question = {"role": "user", "content": "Paris?"}
    fields = {"model": NAME, "max_tokens": 500, "tools": [WEATHER]}
    if stream:
        with client(server).messages.stream(messages=[question], **fields) as events:
            first = events.get_final_message()
    else:
        first = client(server).messages.create(messages=[question], **fields)
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    assert call.name == "get_weather" and call.input == {"city": "Paris"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history = [
        question,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client(server).messages.create(messages=history, **fields)
    assert second.content[-1].text == "Hello, world!"
    assert second.usage.cache_read_input_tokens > 0


def test_stop_sequences_are_told(server: Live) -> None:
    answer = ask(server, stop_sequences=["wor"])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == "wor"
    assert answer.content[0].text == "Hello, "


def test_tokens_are_counted_before_they_are_sent(server: Live) -> None:
    messages = [{"role": "user", "content": "How many?"}]
    off = {"type": "disabled"}
    count = client(server).messages.count_tokens(model=NAME, messages=messages, thinking=off)
    usage = ask(server, "How many?").usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_have_the_shape_of_this_api(server: Live) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client(server).messages.create(
            model="other", max_tokens=5, messages=[{"role": "user", "content": "x"}]
        )
    assert missing.value.body["type"] == "error"
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ask(server, max_tokens=0)
