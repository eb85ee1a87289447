"""Settings of a chat and bodies of three APIs: the prompt they make, and how its reply is read."""

import json
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.chat.dialects import Api, ask_prompt, render_body, render_chat
from overleap.chat.profiles import profile_named, profiles
from overleap.chat.replies import ReplyFormat, parse_reply
from overleap.chat.tokenizer import SPECIAL_TOKENS, Tokenizer
from overleap.errors import DialectError

PREVIEW, LATER, MINI = (profile_named(name) for name in ("v4-flash", "v4-flash-0731", "mini"))
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
BOS = "<｜begin▁of▁sentence｜>"
THINKING = "<｜User｜>Hello<｜Assistant｜><think>"
ANSWERING = "<｜User｜>Hello<｜Assistant｜></think>"
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "", "parameters": {"type": "object"}},
}


def preamble(text: str) -> str:
    """The name of what stands between BOS and the first turn."""
    between = text.removeprefix(BOS).partition("<｜User｜>")[0]
    first = between.partition("\n")[0]
    return {
        "": "none",
        "Reasoning Effort: Absolute maximum with no shortcuts permitted.": "absolute",
        "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.": "beyond",
    }[first]


# -- effort and thinking


@pytest.mark.parametrize("name", [p.name for p in profiles().values() if p.thinks])
def test_every_level_renders_its_text(name: str) -> None:
    profile = profile_named(name)
    for level, expected in profile.efforts.items():
        prompt = render_chat(HELLO, profile=profile, effort=level)
        assert preamble(prompt.text) == expected
        assert prompt.text.endswith(THINKING) and prompt.reply.begins == "reasoning"
    bare = render_chat(HELLO, profile=profile)
    assert bare == render_chat(HELLO, profile=profile, effort=profile.default_effort)
    assert bare.text == BOS + THINKING


def test_the_texts_differ_in_length_as_known() -> None:
    """Three lines and a blank one; the text of the library is the only copy."""
    absolute = render_chat(HELLO, profile=LATER, effort="high").text
    assert absolute == render_chat(HELLO, profile=PREVIEW, effort="max").text
    assert absolute.removesuffix(THINKING).count("\n") == 4
    assert absolute.removesuffix(THINKING).endswith("left unchecked.\n\n")
    beyond = render_chat(HELLO, profile=LATER, effort="max").text
    assert beyond.removesuffix(THINKING).endswith("remains undiscovered.\n\n")


@pytest.mark.parametrize(
    "settings", [{"thinking": False}, {"effort": "none"}, {"thinking": False, "effort": "none"}]
)
def test_thinking_off(settings: dict[str, Any]) -> None:
    for profile in (PREVIEW, LATER):
        prompt = render_chat(HELLO, profile=profile, **settings)
        assert prompt.text == BOS + ANSWERING and prompt.reply == ReplyFormat("content")


def test_a_model_that_does_not_think() -> None:
    assert render_chat(HELLO, profile=MINI).text == BOS + ANSWERING
    assert render_chat(HELLO, profile=MINI, effort="none").text == BOS + ANSWERING
    with pytest.raises(DialectError, match="mini does not think aloud"):
        render_chat(HELLO, profile=MINI, thinking=True)
    with pytest.raises(DialectError, match="effort 'high' asks for thinking, which is off"):
        render_chat(HELLO, profile=MINI, effort="high")


def test_contradictions() -> None:
    with pytest.raises(DialectError, match="asks for thinking, which is off"):
        render_chat(HELLO, profile=PREVIEW, thinking=False, effort="max")
    with pytest.raises(DialectError, match="effort 'none' turns it off"):
        render_chat(HELLO, profile=PREVIEW, thinking=True, effort="none")
    with pytest.raises(DialectError, match="no effort level 'huge'"):
        render_chat(HELLO, profile=PREVIEW, effort="huge")


@pytest.mark.parametrize("name", ["v4-flash-base", "v4-pro-base"])
def test_base_models_do_not_chat(name: str) -> None:
    for attempt in (
        lambda p: render_chat(HELLO, profile=p),
        lambda p: render_body("chat", {"messages": HELLO}, profile=p),
        lambda p: ask_prompt("text", "what?", p),
    ):
        with pytest.raises(DialectError, match="base model without a chat format") as caught:
            attempt(profile_named(name))
        assert caught.value.hint


# -- tools, formats, prefixes, transcripts


def test_tools_and_how_the_reply_is_read() -> None:
    offered = render_chat(HELLO, profile=PREVIEW, tools=[TOOL])
    assert '{"name": "find"' in offered.text
    assert offered.reply == ReplyFormat("reasoning", tools=True)
    withheld = render_chat(HELLO, profile=PREVIEW, tools=[TOOL], tool_choice="none")
    assert withheld == render_chat(HELLO, profile=PREVIEW)
    forced = render_chat(
        HELLO, profile=PREVIEW, tools=[TOOL], tool_choice="required", thinking=False
    )
    assert forced.text.endswith("</think>\n\n<｜DSML｜tool_calls>\n")
    assert forced.reply == ReplyFormat("tool calls", tools=True)
    with pytest.raises(DialectError, match="required, and thinking is on"):
        render_chat(HELLO, profile=PREVIEW, tools=[TOOL], tool_choice="required")
    with pytest.raises(DialectError, match="required, and there are no tools"):
        render_chat(HELLO, profile=PREVIEW, tool_choice="required", thinking=False)
    generated = '<｜DSML｜invoke name="find">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    assert [call.name for call in parse_reply(generated, forced.reply).calls] == ["find"]


def test_response_formats() -> None:
    plain = render_chat(HELLO, profile=PREVIEW)
    assert render_chat(HELLO, profile=PREVIEW, response_format={"type": "text"}) == plain
    lone = render_chat(HELLO, profile=PREVIEW, response_format={"type": "json_object"})
    assert "JSON object ONLY" in lone.text and lone.reply.json_only
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"title": "Ünï"}}}
    with_schema = render_chat(HELLO, profile=PREVIEW, response_format=schema)
    assert '{"title": "Ünï"}' in with_schema.text and not with_schema.reply.json_only
    pattern = render_chat(HELLO, profile=PREVIEW, response_format={"type": "regex", "regex": "a+"})
    assert pattern.text == plain.text
    for wrong in ({"type": "yaml"}, {}, {"type": "json_schema"}):
        with pytest.raises(DialectError, match="is not understood"):
            render_chat(HELLO, profile=PREVIEW, response_format=wrong)


@pytest.mark.parametrize(
    ("last", "ending", "begins"),
    [
        ({"content": "So"}, "<think></think>So", "content continued"),
        ({"content": "So", "reasoning_content": "R"}, "<think>R</think>So", "content continued"),
        ({"content": "", "reasoning_content": "R"}, "<think>R", "reasoning continued"),
        ({"content": ""}, "<think>", "reasoning"),
    ],
)
def test_a_prefix_is_continued(last: dict[str, Any], ending: str, begins: str) -> None:
    messages = [*HELLO, {"role": "assistant", "prefix": True, **last}]
    prompt = render_chat(messages, profile=PREVIEW)
    assert prompt.text.endswith(f"<｜Assistant｜>{ending}")
    assert prompt.reply.begins == begins


@pytest.mark.parametrize("last", ["user", "prefix"])
def test_a_transcript_ends_with_a_finished_reply(last: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "a", "prefix": True}]
    with pytest.raises(DialectError, match="finished transcript ends with"):
        render_chat(HELLO if last == "user" else messages, profile=PREVIEW, transcript=True)


def test_stop_strings_travel_with_the_prompt() -> None:
    prompt = render_chat(HELLO, profile=MINI, stop=["\n", "Q:"])
    assert prompt.reply.stop == ("\n", "Q:")
    assert parse_reply("an answer\nand more", prompt.reply).content == "an answer"


# -- one document, many questions


def test_ask_puts_the_document_first() -> None:
    prompt = ask_prompt("The text.", "What?", MINI)
    assert prompt.text == f"{BOS}<｜User｜>The text.\n\nWhat?<｜Assistant｜></think>"
    assert ask_prompt("The text.", "What?", PREVIEW).text.endswith("What?<｜Assistant｜><think>")
    high = ask_prompt("The text.", "What?", PREVIEW, effort="max").text
    assert preamble(high) == "absolute"


def test_prompts_about_one_document_share_its_tokens(tokenizer: Tokenizer) -> None:
    document = Path(__file__).read_text("utf-8") + " ".join(SPECIAL_TOKENS)
    prompts = [ask_prompt(document, q, MINI) for q in ("What is it?", "Who?", "Why <｜User｜>?")]
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    document_ids = len(tokenizer.encode(document))
    shared = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    assert shared >= 2 + document_ids - 1
    special = {tokenizer.id_of(token) for token in SPECIAL_TOKENS}
    for prompt, encoded in zip(prompts, ids, strict=True):
        assert [i for i in encoded if i in special] == [
            tokenizer.id_of(prompt.text[a:b]) for a, b in prompt.special
        ]
        assert tokenizer.decode(encoded, control=True) == prompt.text


# -- bodies of the three APIs


def body(api: Api, **more: Any) -> dict[str, Any]:
    base: dict[Api, dict[str, Any]] = {
        "chat": {"messages": HELLO},
        "responses": {"input": "Hello"},
        "messages": {"messages": HELLO, "max_tokens": 100},
    }
    return {"model": "any-name", **base[api], **more}


def with_effort(api: Api, effort: str) -> dict[str, Any]:
    fields: dict[Api, dict[str, Any]] = {
        "chat": {"reasoning_effort": effort},
        "responses": {"reasoning": {"effort": effort}},
        "messages": {"output_config": {"effort": effort}},
    }
    return body(api, **fields[api])


APIS: list[Api] = ["chat", "responses", "messages"]


@pytest.mark.parametrize("api", APIS)
def test_bodies_render_as_chats(api: Api) -> None:
    for profile in (PREVIEW, LATER, MINI):
        prompt, request = render_body(api, body(api), profile=profile)
        assert prompt == render_chat(HELLO, profile=profile)
        assert request.conversation.thinking_mode == profile.thinks
    without_model = {k: v for k, v in body(api).items() if k != "model"}
    assert render_body(api, without_model, profile=MINI)[0] == render_chat(HELLO, profile=MINI)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("effort", ["low", "high", "max"])
def test_bodies_name_the_effort_of_the_checkpoint(api: Api, effort: str) -> None:
    for profile in (PREVIEW, LATER):
        prompt, _ = render_body(api, with_effort(api, effort), profile=profile)
        assert prompt == render_chat(HELLO, profile=profile, effort=effort)


def test_chat_bodies_know_every_level() -> None:
    for profile in (PREVIEW, LATER):
        for level in profile.efforts:
            prompt, _ = render_body("chat", with_effort("chat", level), profile=profile)
            assert prompt == render_chat(HELLO, profile=profile, effort=level)


@pytest.mark.parametrize(
    ("api", "off"),
    [
        ("chat", {"thinking": {"type": "disabled"}}),
        ("chat", {"reasoning_effort": "none"}),
        ("responses", {"reasoning": {"effort": "none"}}),
        ("messages", {"thinking": {"type": "disabled"}}),
    ],
)
def test_bodies_turn_thinking_off(api: Api, off: dict[str, Any]) -> None:
    prompt, _ = render_body(api, body(api, **off), profile=LATER)
    assert prompt.text == BOS + ANSWERING and prompt.reply.begins == "content"


def test_thinking_asked_of_a_model_that_does_not() -> None:
    asked = body("chat", thinking={"type": "enabled"})
    with pytest.raises(DialectError, match="mini does not think aloud"):
        render_body("chat", asked, profile=MINI)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"thinking": {"type": "disabled"}},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "required", "thinking": {"type": "disabled"}},
        {"stop": ["a", "b"]},
        {
            "messages": [{"role": "user", "content": "json"}],
            "response_format": {"type": "json_object"},
        },
        {"messages": [*HELLO, {"role": "assistant", "content": "x", "prefix": True}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "", "prefix": True}]},
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": "", "reasoning_content": "r", "prefix": True},
            ]
        },
    ],
)
def test_replies_are_read_as_the_library_would(more: dict[str, Any]) -> None:
    prompt, request = render_body("chat", body("chat", **more), profile=LATER)
    theirs = request.parsing_options
    stages = {
        None: None,
        "reasoning": recipe.ThinkingInitialStage.ReasoningStart,
        "reasoning continued": recipe.ThinkingInitialStage.ReasoningContinuation,
        "content continued": recipe.ThinkingInitialStage.ContentContinuation,
    }
    assert prompt.reply.tools == theirs.parse_tool_calls
    assert (prompt.reply.begins == "tool calls") == theirs.starts_in_tool_calls
    assert stages.get(prompt.reply.begins) == theirs.thinking_initial_stage
    assert prompt.reply.json_only == theirs.parse_json_output
    assert list(prompt.reply.stop) == theirs.stop_sequences


def test_both_names_of_reasoning_are_read() -> None:
    last = {"role": "assistant", "content": "x", "prefix": True}
    for name in ("reasoning", "reasoning_content"):
        given = body("chat", messages=[*HELLO, {**last, name: "because"}])
        assert render_body("chat", given, profile=LATER)[0].text.endswith("because</think>x")
        chat = [*HELLO, {**last, name: "because"}]
        assert render_chat(chat, profile=LATER).text.endswith("because</think>x")


@pytest.mark.parametrize(
    ("api", "more", "sentence"),
    [
        ("chat", {"messages": []}, "Empty input messages"),
        ("chat", {"messages": "hello"}, "expected a sequence"),
        ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, "unknown variant"),
        ("chat", {"reasoning_effort": "huge"}, "unknown variant `huge`"),
        ("chat", {"n": 2}, "Invalid n value"),
        ("chat", {"stop": object()}, ""),
        ("messages", {"messages": []}, "at least one message"),
        ("responses", {"input": None}, "input"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "reads text only",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "reads text only",
        ),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
            "reads text only",
        ),
    ],
)
def test_bodies_that_are_refused(api: Api, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DialectError) as caught:
        render_body(api, body(api, **more), profile=LATER)
    assert sentence in caught.value.message


@pytest.mark.parametrize("reasoning_content", [None, ""])
def test_an_empty_name_of_reasoning_does_not_hide_the_other(reasoning_content: str | None) -> None:
    last = {"role": "assistant", "content": "x", "prefix": True, "reasoning": "because"}
    given = body("chat", messages=[*HELLO, {**last, "reasoning_content": reasoning_content}])
    assert render_body("chat", given, profile=LATER)[0].text.endswith("because</think>x")


def test_a_developer_is_the_system() -> None:
    texts = [
        render_body(
            "chat",
            body("chat", messages=[{"role": role, "content": "Be brief."}, *HELLO]),
            profile=LATER,
        )[0].text
        for role in ("developer", "system")
    ]
    assert texts[0] == texts[1] and "Be brief." in texts[0]


TEXT = {"type": "text", "text": "The text."}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "eA=="}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"source": {"type": "text", "media_type": "text/plain", "data": "It."}}, "It."),
        ({"source": {"type": "content", "content": "It."}}, "It."),
        ({"source": {"type": "content", "content": [TEXT, TEXT]}}, "The text.\n\nThe text."),
        (
            {"source": {"type": "content", "content": [TEXT]}, "title": "T", "context": "C"},
            "T\n\nC\n\nThe text.",
        ),
    ],
)
def test_documents_of_text_are_read(document: dict[str, Any], text: str) -> None:
    block = {"type": "document", **document}
    use = {"type": "tool_use", "id": "t", "name": "find", "input": {}}
    for around in (
        [{"role": "user", "content": [block, {"type": "text", "text": "What?"}]}],
        [
            *HELLO,
            {"role": "assistant", "content": [use]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [block]}],
            },
        ],
    ):
        prompt, _ = render_body("messages", body("messages", messages=around), profile=LATER)
        assert text in prompt.text and "Unsupported" not in prompt.text


def output_of(kind: str, part: dict[str, Any]) -> dict[str, Any]:
    """A Responses body whose tool has answered with this."""
    call = {"type": kind, "call_id": "c", "name": "find", "arguments": "{}", "input": ""}
    answer = {"type": f"{kind}_output", "call_id": "c", "output": [part]}
    return {"input": [{"role": "user", "content": "Hello"}, call, answer]}


@pytest.mark.parametrize(
    ("api", "more", "sentence"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "document", "source": PDF}]}]},
            "the source of a document is 'base64'",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "the source of a document is None",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
            "holds a file",
        ),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]},
            "holds a file",
        ),
        *(
            ("responses", output_of(kind, {"type": part, "file_id": "x"}), sentence)
            for kind in ("function_call", "custom_tool_call")
            for part, sentence in (("input_image", "an image"), ("input_file", "a file"))
        ),
        (
            "responses",
            {"input": [{"role": "user", "content": "x"}, {"type": "item_reference", "id": "x"}]},
            "nothing is stored here",
        ),
    ],
)
def test_what_is_not_text_is_refused(api: Api, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DialectError) as caught:
        render_body(api, body(api, **more), profile=LATER)
    assert sentence in caught.value.message


def test_what_is_nested_too_deep_is_refused() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    tool = {"type": "function", "function": {"name": "find", "parameters": deep}}
    format = {"type": "json_schema", "json_schema": {"name": "n", "schema": deep}}
    for more in ({"tools": [tool]}, {"response_format": format}):
        with pytest.raises(DialectError, match="nesting depth"):
            render_chat(HELLO, profile=LATER, **more)
        with pytest.raises(DialectError, match="nesting depth"):
            render_body("chat", body("chat", **more), profile=LATER)


def test_hostile_bodies_hold_no_more_special_tokens() -> None:
    text = " ".join(SPECIAL_TOKENS)
    for api in APIS:
        field: dict[str, Any] = (
            {"input": text}
            if api == "responses"
            else {"messages": [{"role": "user", "content": text}]}
        )
        hostile, _ = render_body(api, body(api, **field), profile=LATER)
        harmless, _ = render_body(api, body(api), profile=LATER)
        assert [hostile.text[a:b] for a, b in hostile.special] == [
            harmless.text[a:b] for a, b in harmless.special
        ]


def test_ids_equal_those_of_the_library(
    tokenizers: dict[str, Tokenizer], released_json: bytes
) -> None:
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_str(released_json.decode())
    )
    messages = [
        {"role": "system", "content": f"Beware of {' '.join(SPECIAL_TOKENS)}."},
        {"role": "user", "content": "naïve 文字 👍\n\n  <｜User｜>\t1234567"},
    ]
    given = body("chat", messages=messages, tools=[TOOL], reasoning_effort="high")
    prompt, request = render_body("chat", given, profile=LATER)
    assert tokenizers["released"].encode_prompt(prompt) == encoding.encode(request.conversation)
    assert json.dumps(messages[1]["content"])  # the body is left as it was given


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = [
    *("messages", "input", "tools", "tool_choice", "reasoning_effort", "reasoning", "thinking"),
    *("output_config", "response_format", "stop", "system", "model", "max_tokens", "instructions"),
]


@given(
    api=st.sampled_from(APIS),
    more=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
def test_whatever_body_comes_is_rendered_or_refused(api: Api, more: dict[str, Any]) -> None:
    try:
        prompt, _ = render_body(api, body(api, **more), profile=LATER)
    except DialectError as error:
        assert error.message
    else:
        assert prompt.text.startswith(BOS) and prompt.special
