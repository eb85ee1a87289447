"""The `openai` client, unchanged, against a server: chat, streams, tools, responses, errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import NAME, Live, bundled, live, scripted

openai = pytest.importorskip("openai", reason="the openai client is not installed")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    "I should look.</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
FACT = "The color of Alice is green.\n\nWhat is the color of Alice?"


def script(prompt: str) -> str:
    if "get_weather" in prompt and "<tool_result>" not in prompt:
        return CALL
    if prompt.endswith("</think>"):
        return "Hello, world!"
    return "Let me think.</think>Hello, world!"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("scripted"), scripted(script)) as running:
        yield running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("bundled"), bundled(), profile="mini") as running:
        yield running


def client(server: Live, key: str = "none") -> Any:
    return server.client(openai.OpenAI, base_url=f"{server.url}/v1", api_key=key)


def ask(server: Live, text: str = "Hi", **fields: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client(server).chat.completions.create(model=NAME, messages=messages, **fields)


def test_a_chat_thinks_and_answers(server: Live) -> None:
    answer = ask(server)
    message, usage = answer.choices[0].message, answer.usage
    assert message.content == "Hello, world!"
    assert message.reasoning_content == "Let me think."
    assert answer.choices[0].finish_reason == "stop" and answer.object == "chat.completion"
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details.reasoning_tokens > 0
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens


def test_a_stream_is_the_same_answer(server: Live) -> None:
    whole = ask(server, "Stream it")
    chunks = list(ask(server, "Stream it", stream=True, stream_options={"include_usage": True}))
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    reasoning = "".join(
        getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices
    )
    assert (content, reasoning) == ("Hello, world!", "Let me think.")
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("off", [{"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}])
def test_thinking_can_be_switched_off(server: Live, off: dict[str, Any]) -> None:
    message = ask(server, extra_body=off).choices[0].message
    assert message.content == "Hello, world!"
    assert not getattr(message, "reasoning_content", None)


def test_tools_are_called_and_results_read(server: Live) -> None:
    first = ask(server, "Paris?", tools=[WEATHER])
    assert first.choices[0].finish_reason == "tool_calls"
    call = first.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    history = [
        {"role": "user", "content": "Paris?"},
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    second = client(server).chat.completions.create(model=NAME, messages=history, tools=[WEATHER])
    assert second.choices[0].message.content == "Hello, world!"


def test_a_streamed_tool_call_keeps_its_index_and_its_id(server: Live) -> None:
    chunks = list(ask(server, "Paris, streamed?", tools=[WEATHER], stream=True))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert {delta.index for delta in deltas} == {0}
    assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    arguments = "".join(delta.function.arguments for delta in deltas)
    assert json.loads(arguments) == {"city": "Paris", "days": 3}


def test_tools_can_be_forbidden(server: Live) -> None:
    answer = ask(server, "Paris, none?", tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_required_call_is_held_by_the_grammar(trained: Live, choice: Any, seed: int) -> None:
    """The trained model knows no tools: only the grammar makes it call one."""
    tool = {"type": "function", "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "required": ["city", "sure"], "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}}},
    }}  # fmt: skip
    answer = ask(trained, tools=[tool], tool_choice=choice, max_tokens=400, seed=seed)
    choice = answer.choices[0]
    assert choice.finish_reason in ("tool_calls", "length")
    if choice.finish_reason == "tool_calls":
        for call in choice.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "get_weather"
            assert arguments["city"] in ("Paris", "Rome")
            assert isinstance(arguments["sure"], bool)


@pytest.mark.parametrize("thinking", ["disabled", "enabled"])
def test_a_json_schema_is_held(server: Live, trained: Live, thinking: str, seed: int) -> None:
    """The script does not answer JSON; under the grammar it must."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "sure": {"type": "boolean"}},
        "required": ["name", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "who", "schema": schema}}
    for where in [server] if thinking == "enabled" else [server, trained]:
        answer = ask(
            where, response_format=form, seed=seed, max_tokens=300,
            extra_body={"thinking": {"type": thinking}},
        )  # fmt: skip
        found = json.loads(answer.choices[0].message.content)
        assert found["name"] in ("Ada", "Bob") and isinstance(found["sure"], bool)


def test_a_pattern_is_held(trained: Live, seed: int) -> None:
    form = {"type": "regex", "regex": "[0-9]{3}-(ja|nein)"}
    body = {"response_format": form}
    text = ask(trained, extra_body=body, seed=seed, max_tokens=50).choices[0].message.content
    number, _, word = text.partition("-")
    assert len(number) == 3 and number.isdigit() and word in ("ja", "nein")


def test_several_answers_and_their_log_probabilities(trained: Live, seed: int) -> None:
    answer = ask(
        trained, FACT, n=3, seed=seed, max_tokens=4, logprobs=True, top_logprobs=2, temperature=1.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        for entry in choice.logprobs.content:
            assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
            assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    again = ask(trained, FACT, n=3, seed=seed, max_tokens=4, temperature=1.5)
    texts = [[choice.message.content for choice in a.choices] for a in (answer, again)]
    assert texts[0] == texts[1], "the same seed, the same answers"
    streamed = list(ask(trained, FACT, n=3, seed=seed, max_tokens=4, temperature=1.5, stream=True))
    joined = [
        "".join(
            c.choices[0].delta.content or ""
            for c in streamed
            if c.choices and c.choices[0].index == index
        )
        for index in range(3)
    ]
    assert joined == texts[0]


def test_the_trained_model_finds_its_fact(trained: Live) -> None:
    answer = ask(trained, FACT, temperature=0)
    assert answer.choices[0].message.content.strip() == "green"
    assert answer.choices[0].finish_reason == "stop"


def test_stop_strings_end_an_answer_and_are_not_shown(server: Live) -> None:
    answer = ask(server, "Stop", stop=["wor"], extra_body={"thinking": {"type": "disabled"}})
    assert answer.choices[0].message.content == "Hello, "
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_end_an_answer(server: Live) -> None:
    answer = ask(server, "Short", max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_responses_whole_and_streamed(server: Live) -> None:
    whole = client(server).responses.create(
        model=NAME, input="Hi", instructions="Be kind.", store=True
    )
    assert whole.output_text == "Hello, world!" and whole.status == "completed"
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    events = list(client(server).responses.create(model=NAME, input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hello, world!"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_responses_call_tools(server: Live) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    answer = client(server).responses.create(model=NAME, input="Paris?", tools=[tool])
    call = next(item for item in answer.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Paris", "days": 3}


def test_completions_by_text_ids_and_lists(trained: Live) -> None:
    complete = client(trained).completions.create
    one = complete(model=NAME, prompt="import os", max_tokens=5, temperature=0)
    ids = [0, *trained.service.turns.model.tokenizer.encode("import os")]
    other = complete(model=NAME, prompt=ids, max_tokens=5, temperature=0)
    several = complete(model=NAME, prompt=["import os", "def "], max_tokens=5, temperature=0, n=2)
    assert one.choices[0].text == other.choices[0].text
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == one.choices[0].text
    stream = list(
        complete(model=NAME, prompt="import os", max_tokens=5, temperature=0, stream=True)
    )
    assert "".join(c.choices[0].text for c in stream if c.choices) == one.choices[0].text


def test_echoed_log_probabilities_are_those_of_the_model(trained: Live) -> None:
    """What lm-eval asks for: log-probabilities of a prompt equal those of generating it."""
    complete = client(trained).completions.create
    made = complete(model=NAME, prompt="import os", max_tokens=6, temperature=0, logprobs=1)
    tokenizer = trained.service.turns.model.tokenizer
    start = [0, *tokenizer.encode("import os")]
    answer = made.choices[0].logprobs
    ids = start + [_id_of(tokenizer, name) for name in answer.tokens]
    echoed = (
        complete(model=NAME, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True)
        .choices[0]
        .logprobs
    )
    assert echoed.token_logprobs[0] is None and len(echoed.tokens) == len(ids) + 1
    inside = slice(len(start), len(ids))
    assert echoed.tokens[inside] == answer.tokens
    assert echoed.token_logprobs[inside] == pytest.approx(answer.token_logprobs, abs=1e-9)
    tops = [max(top, key=top.get) for top in echoed.top_logprobs[inside]]
    assert tops == answer.tokens


def test_an_echo_alone_generates_nothing(trained: Live) -> None:
    """The other way to ask for the same scores: no token is made, and none is counted."""
    complete = client(trained).completions.create
    wanted = {"model": NAME, "prompt": "import os", "temperature": 0, "logprobs": 1, "echo": True}
    alone, more = complete(**wanted, max_tokens=0), complete(**wanted, max_tokens=1)
    choice, length = alone.choices[0], len(alone.choices[0].logprobs.tokens)
    assert choice.finish_reason == "length" and alone.usage.completion_tokens == 0
    assert choice.logprobs.token_logprobs == more.choices[0].logprobs.token_logprobs[:length]
    assert choice.text == complete(**wanted | {"logprobs": None}, max_tokens=0).choices[0].text
    assert length == alone.usage.prompt_tokens == more.usage.prompt_tokens
    stream = list(complete(**wanted, max_tokens=0, stream=True))
    assert "".join(c.choices[0].text for c in stream if c.choices) == choice.text


def test_a_chat_answer_has_a_token_at_least(server: Live) -> None:
    chat, respond = client(server).chat.completions.create, client(server).responses.create
    hello: Any = [{"role": "user", "content": "Hello"}]
    for refused in (
        lambda: chat(model=NAME, messages=hello, max_tokens=0),
        lambda: chat(model=NAME, messages=hello, max_completion_tokens=0),
        lambda: respond(model=NAME, input="Hello", max_output_tokens=0),
    ):
        with pytest.raises(openai.BadRequestError, match=r"tokens: .* greater than or equal to 1"):
            refused()


def _id_of(tokenizer: Any, name: str) -> int:
    found = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == name.encode()]
    assert len(found) == 1
    return int(found[0])


def test_a_suffix_goes_through_the_hole(server: Live) -> None:
    tokenizer = server.service.turns.model.tokenizer
    if "<｜fim▁hole｜>" not in tokenizer._added:
        pytest.skip("this tokenizer has no hole")
    answer = client(server).completions.create(
        model=NAME, prompt="def f(", suffix="): pass", max_tokens=2
    )
    assert answer.usage.prompt_tokens == 4 + len(tokenizer.encode("def f(")) + len(
        tokenizer.encode("): pass")
    )


def test_models_are_listed(server: Live) -> None:
    cards = list(client(server).models.list())
    assert [card.id for card in cards] == [NAME]
    assert client(server).models.retrieve(NAME).max_model_len == 2**16


@pytest.mark.parametrize(
    ("fields", "status", "part"),
    [
        ({"model": "other"}, 404, "not served here"),
        ({"temperature": 9}, 400, "temperature"),
        ({"n": 17}, 400, "less than or equal to 16"),
        ({"max_tokens": 2**17}, 400, "the context is 65536"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, 400, "alien"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"logit_bias": {"3": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"three": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, 400, "the vocabulary has"),
        ({"response_format": {"type": "regex", "regex": "("}}, 400, "regex"),
        (
            {
                "tool_choice": "required", "tools": [WEATHER],
                "extra_body": {"thinking": {"type": "enabled"}},
            }, 400, "hinking",
        ),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"extra_body": {"guided_regex": "[ab]"}}, 400, "response_format"),
        ({"functions": [{"name": "f"}]}, 400, "functions: "),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_client(
    server: Live, fields: dict[str, Any], status: int, part: str
) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "x"}], **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client(server).chat.completions.create(**body)
    assert caught.value.status_code == status
    assert part in caught.value.body["message"]
    assert caught.value.body["type"] and caught.value.body["code"]


def test_a_key_that_is_needed_and_not_given(tmp_path: Path) -> None:
    with live(tmp_path, scripted(script), needs_keys=True) as server:
        with pytest.raises(openai.AuthenticationError, match="not known"):
            client(server, "wrong").models.list()
        assert len(list(client(server, server.key()).models.list())) == 1
