"""What is put into the library's rendering: developer tools, tasks, finished transcripts."""

import json
from collections.abc import Callable
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.chat.dialects import Prompt, render_chat
from overleap.chat.profiles import profile_named
from overleap.chat.replies import parse_reply
from overleap.chat.tokenizer import EOS, SPECIAL_TOKENS, TASKS
from overleap.errors import DialectError

PREVIEW, LATER = profile_named("v4-pro"), profile_named("v4-pro-0813")
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Look for text.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}
# The library drops leading newlines of a reply, and ends a reasoning at its tag.
plain = st.text(max_size=20).map(lambda t: t.strip("\n").replace("<", "("))
hostile = st.one_of(
    plain, st.sampled_from([*SPECIAL_TOKENS, "\ue000", "\ue0000", "</tool_result>"])
)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str | None = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "find", arguments: Any = '{"text": "x"}', **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def special_text(prompt: Prompt) -> str:
    return "".join(prompt.text[a:b] for a, b in prompt.special)


def well_marked(prompt: Prompt) -> bool:
    at = 0
    for start, end in prompt.special:
        if (
            not at <= start < end <= len(prompt.text)
            or prompt.text[start:end] not in SPECIAL_TOKENS
        ):
            return False
        at = end
    return True


# -- against the library, and against itself


def thought(draw: st.DrawFn) -> dict[str, Any]:
    return draw(st.one_of(st.just({}), st.builds(lambda r: {"reasoning_content": r}, plain)))


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """System, then turns of user and assistant with calls and results, then the user."""
    messages = [{"role": "system", "content": draw(hostile)}] if draw(st.booleans()) else []
    for n in range(draw(st.integers(0, 3))):
        messages.append(user(draw(hostile)))
        if draw(st.booleans()):
            ids = [f"{n}-{k}" for k in range(draw(st.integers(1, 3)))]
            calls = [
                call(arguments={"text": draw(hostile), "n": k}, id=i) for k, i in enumerate(ids)
            ]
            messages.append(assistant(draw(plain), tool_calls=calls, **thought(draw)))
            for i in draw(st.permutations(ids)):
                messages.append({"role": "tool", "content": draw(hostile), "tool_call_id": i})
        messages.append(assistant(draw(plain), **thought(draw)))
    return [*messages, user(draw(hostile))]


@given(
    messages=chats(), tools=st.booleans(), effort=st.sampled_from(["none", "low", "high", "max"])
)
def test_ordinary_chats_are_the_librarys(
    messages: list[dict[str, Any]], tools: bool, effort: Any
) -> None:
    """The general release of Pro is what the library renders: no edit of ours may show."""
    ours = render_chat(messages, profile=LATER, effort=effort, tools=[TOOL] if tools else [])
    body = {
        "model": "DeepSeek-V4-Pro",
        "reasoning_effort": effort,
        "messages": messages,
        **({"tools": [TOOL]} if tools else {}),
    }
    for message in messages:
        for made in message.get("tool_calls", ()):
            made["function"]["arguments"] = recipe_json(made["function"]["arguments"])
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    theirs = recipe.DeepseekV4Encoding().render_conversation(request.conversation)
    assert ours.text == theirs.prompt
    assert list(ours.special) == theirs.special_ranges
    assert well_marked(ours)


def recipe_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@given(
    messages=chats(), reasoning=plain, content=plain, tools=st.booleans(), thinking=st.booleans()
)
def test_a_transcript_is_the_prompt_and_its_reply(
    messages: list[dict[str, Any]], reasoning: str, content: str, tools: bool, thinking: bool
) -> None:
    """So what a cache holds after a reply is what the next prompt begins with."""
    settings: dict[str, Any] = {
        "profile": PREVIEW,
        "thinking": thinking,
        "tools": [TOOL] if tools else [],
    }
    prompt = render_chat(messages, **settings)
    last = assistant(content, reasoning_content=reasoning)
    whole = render_chat([*messages, last], **settings, transcript=True)
    assert (
        whole.text.startswith(prompt.text)
        and whole.special[: len(prompt.special)] == prompt.special
    )
    assert well_marked(whole)
    generated = whole.text[len(prompt.text) :]
    assert generated == (f"{reasoning}</think>" if thinking else "") + content + EOS
    reply = parse_reply(generated.removesuffix(EOS), prompt.reply)
    assert (reply.reasoning, reply.content) == (reasoning if thinking else "", content)
    if tools or not thinking:
        following = render_chat([*messages, last, user("next")], **settings)
        assert following.text.startswith(whole.text)


@given(texts=st.lists(hostile, min_size=8, max_size=8))
def test_texts_of_others_never_become_special(texts: list[str]) -> None:
    """Special tokens are counted: those of the same chat with harmless texts, not one more."""

    def chat(t: list[str]) -> Prompt:
        messages = [
            {"role": "system", "content": t[0]},
            {"role": "latest_reminder", "content": t[1]},
            user(t[2]),
            assistant(t[3], reasoning_content=t[4], tool_calls=[call(arguments={"text": t[5]})]),
            {"role": "tool", "content": t[6]},
            assistant(t[3]),
            {"role": "developer", "content": t[7], "tools": [TOOL], "task": "query"},
        ]
        return render_chat(messages, profile=PREVIEW)

    prompt = chat(texts)
    assert special_text(prompt) == special_text(chat(["x"] * 8))
    assert well_marked(prompt)
    assert all(text in prompt.text for text in texts[:5])


# -- tasks


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("action", "title")])
@pytest.mark.parametrize("role", ["user", "developer"])
@pytest.mark.parametrize("thinking", [True, False])
def test_most_tasks_stand_directly_after_the_text(task: str, role: str, thinking: bool) -> None:
    asking = {"role": role, "content": "Q", "task": task}
    opening = f"<｜begin▁of▁sentence｜>S<｜User｜>Q<｜{task}｜>"
    messages = [{"role": "system", "content": "S"}, asking]
    prompt = render_chat(messages, profile=PREVIEW, thinking=thinking)
    assert prompt.text == opening and special_text(prompt).endswith(TASKS[task])
    done = render_chat(
        [*messages, assistant("R", reasoning_content="unused")],
        profile=PREVIEW,
        thinking=thinking,
        transcript=True,
    )
    assert done.text == f"{opening}R<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(("thinking", "tag"), [(True, "<think>"), (False, "</think>")])
def test_action_stands_after_the_opened_reply(thinking: bool, tag: str) -> None:
    opening = f"<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>{tag}<｜action｜>"
    messages = [user("Q", task="action")]
    assert render_chat(messages, profile=PREVIEW, thinking=thinking).text == opening
    replied = [*messages, assistant("Search"), user("and now?")]
    following = render_chat(replied, profile=PREVIEW, thinking=thinking).text
    assert following.startswith(f"{opening}Search<｜end▁of▁sentence｜><｜User｜>and now?")


def test_title_stands_after_the_finished_reply_and_keeps_its_reasoning() -> None:
    """The side task reads the cache of the reply: nothing before its token may change."""
    messages = [user("Q"), assistant("A", reasoning_content="R")]
    reply = render_chat(messages, profile=PREVIEW, transcript=True).text
    assert reply == "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>R</think>A" + EOS
    messages[1]["task"] = "title"
    assert render_chat(messages, profile=PREVIEW).text == reply + "<｜title｜>"
    named = [*messages, assistant("Of A")]
    done = render_chat(named, profile=PREVIEW, transcript=True).text
    assert done == f"{reply}<｜title｜>Of A{EOS}"
    later = render_chat([*named, user("more")], profile=PREVIEW).text
    forgotten = reply.replace("<think>R</think>", "</think>")
    assert later == f"{forgotten}<｜title｜>Of A{EOS}<｜User｜>more<｜Assistant｜><think>"


def test_the_reply_to_a_task_is_content() -> None:
    prompt = render_chat([user("Q", task="action")], profile=PREVIEW)
    assert prompt.reply.begins == "content"
    assert parse_reply("Search", prompt.reply).content == "Search"


# -- developer messages


def test_developer_tools_stand_in_the_developers_turn() -> None:
    developer = {"role": "developer", "content": "D", "tools": [TOOL]}
    alone = render_chat([developer], profile=PREVIEW)
    as_system = render_chat(
        [{"role": "system", "content": "D"}, user("U")], profile=PREVIEW, tools=[TOOL]
    )
    bos = "<｜begin▁of▁sentence｜>"
    block = as_system.text.removeprefix(f"{bos}D").removesuffix("<｜User｜>U<｜Assistant｜><think>")
    assert block.startswith("\n\n## Tools") and '"find"' in block
    assert alone.text == f"{bos}<｜User｜>D{block}<｜Assistant｜><think>"
    assert alone.reply.tools and well_marked(alone)
    marked = alone.text[: len(bos) + len("<｜User｜>D")]
    assert special_text(alone).count("｜DSML｜") == special_text(as_system).count("｜DSML｜")
    with_system = [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "T"},
        developer,
    ]
    both = render_chat(with_system, profile=PREVIEW, effort="max").text
    assert both.startswith(f"{bos}Reasoning Effort: Absolute maximum")
    assert both.endswith(f"\n\nS\n\nT<｜User｜>D{block}<｜Assistant｜><think>")
    assert marked in alone.text


def test_developer_tools_keep_all_reasoning() -> None:
    messages = [
        {"role": "developer", "content": "D", "tools": [TOOL]},
        assistant("A", reasoning_content="R"),
        user("U"),
    ]
    assert "<think>R</think>A" in render_chat(messages, profile=PREVIEW).text
    assert "R</think>" not in render_chat(messages, profile=PREVIEW, thinking=False).text


# -- what is refused


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], "message 0 has the role None"),
        ([user("x"), {"role": "model", "content": "x"}], "message 1 has the role 'model'"),
        ([{"role": "user"}], "has no content"),
        ([user(3)], "content of type int"),
        ([user([{"type": "image_url", "image_url": {"url": "u"}}])], "'image_url' content"),
        ([user(["x"])], "'str' content"),
        (["x"], "message 0 is a str"),
        ([{"role": ["user"], "content": "x"}], "has the role ['user']"),
        ([user("x"), assistant(tool_calls=3)], "tool_calls that is not a list"),
        ([user("x"), assistant(tool_calls=[3])], "without function.name"),
        ([{"role": "developer", "content": "d", "tools": {"a": 1}}], "tools that is not a list"),
        ([user("x", name="Ann")], "'name', which has no place"),
        ([user("x", tool_calls=[])], "'tool_calls', which has no place"),
        ([user("x"), assistant("y", reasoning_content=4)], "reasoning_content that is not a str"),
        ([user("x"), assistant(tool_calls=[{"name": "f"}])], "without function.name"),
        ([user("x"), assistant(tool_calls=[call(arguments=3)])], "function.arguments"),
        ([user("x"), {"role": "tool", "content": "r"}], "none stands before it"),
        ([user("x", task="dance")], "cannot ask for the task 'dance'"),
        ([user("x", task="title")], "cannot ask for the task 'title'"),
        ([user("x"), assistant("a", task="query")], "cannot ask for the task 'query'"),
        ([user("x"), assistant(task="title", tool_calls=[call()])], "tool calls and a task"),
        ([user("x", task="query"), user("y")], "a user message follows"),
        ([user("x"), assistant("a", prefix=True), user("y")], "prefix set"),
        ([user("x"), {"role": "developer", "content": "d"}], "next to a user message"),
        ([{"role": "developer", "content": "d"}, user("x")], "next to a user message"),
        (
            [{"role": "developer", "content": "d"}, assistant("a"), user("x")],
            "a developer message before the last user message",
        ),
        ([user("a\ud800")], "cannot be rendered"),
    ],
)
def test_messages_that_are_refused(messages: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(DialectError) as caught:
        render_chat(messages, profile=PREVIEW)
    assert sentence in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize(
    "tools",
    [["find"], [{"name": "find"}], [{"type": "function"}], [{"type": "function", "function": {}}]],
)
def test_tools_that_are_refused(tools: list[Any]) -> None:
    with pytest.raises(DialectError, match="tool 0 is not a function with a name"):
        render_chat([user("x")], profile=PREVIEW, tools=tools)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(description=3),
        lambda f: f.update(strict="yes"),
        lambda f: f.update(parameters={"maximum": 10**30}),
    ],
)
def test_tools_that_json_cannot_hold(change: Callable[[dict[str, Any]], None]) -> None:
    function: dict[str, Any] = {"name": "f"}
    change(function)
    with pytest.raises(DialectError, match=r"tool 0 \(f\) cannot be rendered"):
        render_chat(
            [user("x")], profile=PREVIEW, tools=[{"type": "function", "function": function}]
        )


def test_tools_come_from_one_place() -> None:
    developer = {"role": "developer", "content": "D", "tools": [TOOL]}
    with pytest.raises(DialectError, match="more than one place"):
        render_chat([developer], profile=PREVIEW, tools=[TOOL])
    with pytest.raises(DialectError, match="more than one place"):
        render_chat([developer, assistant("a"), developer], profile=PREVIEW)


def test_keys_that_are_none_or_a_loss_mask_do_not_count() -> None:
    bare = render_chat([user("x"), assistant("y")], profile=PREVIEW, transcript=True)
    noisy = [user("x", name=None, mask=0), assistant("y", tool_calls=None, reasoning=None, mask=1)]
    assert render_chat(noisy, profile=PREVIEW, transcript=True) == bare


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
KEYS = ["task", "tools", "tool_calls", "tool_call_id", "prefix", "reasoning"]
ROLES = ["system", "user", "developer", "assistant", "tool", "latest_reminder"]


@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(ROLES)},
            optional={"content": st.text(max_size=3), **dict.fromkeys(KEYS, json_values)},
        )
        | json_values,
        max_size=3,
    ),
    tools=st.lists(st.just(TOOL) | json_values, max_size=1),
    transcript=st.booleans(),
)
def test_whatever_comes_is_rendered_or_refused(
    messages: list[Any], tools: list[Any], transcript: bool
) -> None:
    try:
        prompt = render_chat(messages, profile=PREVIEW, tools=tools, transcript=transcript)
    except DialectError as error:
        assert error.message and "\n" not in error.message
    else:
        assert well_marked(prompt)
