"""Generated text to events: any cut gives the same reply, and malformed replies are named."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.chat.replies import (
    ContentDelta,
    Finish,
    ReasoningDelta,
    Reply,
    ReplyFormat,
    ReplyStream,
    ToolCallStart,
    collect,
    parse_reply,
)
from overleap.errors import DialectError

D = "｜DSML｜"


def invoke(name: str, *parameters: tuple[str, str, str]) -> str:
    inner = "".join(
        f'<{D}parameter name="{key}" string="{string}">{value}</{D}parameter>\n'
        for key, string, value in parameters
    )
    return f'<{D}invoke name="{name}">\n{inner}</{D}invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


WEATHER = invoke("get_weather", ("city", "true", 'Tōkyō "x" \\ \n'), ("days", "false", "[1, 2.5]"))
FULL = "First I think.\n\n</think>\n\nThe answer 👍 <b> <｜ x" + block(WEATHER, invoke("ping"))
THINKING = ReplyFormat(begins="reasoning", tools=True)
PLAIN = ReplyFormat(tools=True)


def streamed(pieces: list[str], format: ReplyFormat, end: str = "stop") -> Reply:
    stream = ReplyStream(format)
    events = [event for piece in pieces for event in stream.push(piece)]
    events += stream.finish("length" if end == "length" else "stop")
    assert stream.done and stream.push("more") == [] == stream.finish()
    assert [type(e) for e in events].count(Finish) == 1 and isinstance(events[-1], Finish)
    return collect(events)


def said(reply: Reply) -> tuple[object, ...]:
    """All of a reply but the ids, which are drawn anew."""
    calls = [(call.name, call.arguments) for call in reply.calls]
    return reply.reasoning, reply.content, calls, reply.finish


def test_a_full_reply() -> None:
    reply = parse_reply(FULL, THINKING)
    assert reply.reasoning == "First I think."
    assert reply.content == "The answer 👍 <b> <｜ x"
    assert [(c.name, json.loads(c.arguments)) for c in reply.calls] == [
        ("get_weather", {"city": 'Tōkyō "x" \\ \n', "days": [1, 2.5]}),
        ("ping", {}),
    ]
    assert reply.finish == Finish("tool_calls")
    assert len({call.id for call in reply.calls}) == 2


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (FULL, THINKING),
        (FULL + "\n<｜not text", THINKING),
        ("ends like a tag <｜D" + block(WEATHER), PLAIN),
        ("Straight into a call" + block(WEATHER), THINKING),
        ("no tags at all < </ </thin <｜DSML", THINKING),
        ("content </think> with a stray end, and stop here", PLAIN),
        (block(WEATHER), PLAIN),
        ("ab STOP cd", ReplyFormat(stop=("STOP", "STOPPED"))),
        ('Sure:\n```json\n{"a": 1}\n```\n', ReplyFormat(json_only=True)),
        (block(WEATHER).removeprefix(f"\n\n<{D}tool_calls>\n"), ReplyFormat("tool calls", True)),
    ],
)
def test_every_cut_gives_the_same_reply(text: str, format: ReplyFormat) -> None:
    whole = said(streamed([text], format))
    assert said(streamed(list(text), format)) == whole
    for cut in range(len(text) + 1):
        assert said(streamed([text[:cut], text[cut:]], format)) == whole


def test_random_cuts_give_the_same_reply(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(FULL)), k=rng.randrange(12)))
        pieces = [FULL[a:b] for a, b in zip([0, *cuts], [*cuts, len(FULL)], strict=True)]
        assert said(streamed(pieces, THINKING)) == said(parse_reply(FULL, THINKING))


@given(reasoning=st.text(), content=st.text())
def test_any_reasoning_and_content_come_through(reasoning: str, content: str) -> None:
    # Leading and separating newlines belong to the format; the tags end the parts.
    reasoning = reasoning.strip("\n").replace("<", "(")
    content = content.strip("\n").replace("<", "(")
    reply = parse_reply(f"{reasoning}</think>{content}", THINKING)
    assert (reply.reasoning, reply.content, reply.calls) == (reasoning, content, ())


@given(value=st.text())
def test_any_string_argument_comes_through(value: str) -> None:
    value = value.replace("</", "< /")
    reply = parse_reply(block(invoke("f", ("a", "true", value))), PLAIN)
    assert json.loads(reply.calls[0].arguments) == {"a": value}


def test_events_come_as_soon_as_they_can() -> None:
    stream = ReplyStream(THINKING)
    assert stream.push("I th") == [ReasoningDelta("I th")]
    # A piece that may end in a tag waits for the next one.
    assert stream.push("ink</thi") == []
    assert stream.push("nk>So") == [ReasoningDelta("ink"), ContentDelta("So")]
    assert stream.push(f" it is\n\n<{D}tool_calls>\n") == [ContentDelta(" it is")]
    assert stream.push("") == []
    started = stream.push(f'<{D}invoke name="f">')
    assert [(type(e), e.name, e.index) for e in started if isinstance(e, ToolCallStart)] == [
        (ToolCallStart, "f", 0)
    ]
    assert not stream.done


@pytest.mark.parametrize(
    ("begins", "text", "reasoning", "content"),
    [
        ("reasoning", "\n\nr</think>\n\nc", "r", "c"),
        ("reasoning continued", "\n\nr</think>\n\nc", "\n\nr", "c"),
        ("content", "\n\nc", "", "c"),
        ("content continued", "\n\nc", "", "\n\nc"),
        ("reasoning", "never ends", "never ends", ""),
    ],
)
def test_where_a_reply_begins(begins: str, text: str, reasoning: str, content: str) -> None:
    reply = parse_reply(text, ReplyFormat(begins=begins))  # type: ignore[arg-type]
    assert (reply.reasoning, reply.content) == (reasoning, content)


def test_a_stop_string_ends_the_reply_at_once() -> None:
    stream = ReplyStream(ReplyFormat(begins="reasoning", stop=("END",)))
    assert collect([*stream.push("END is no stop here</think>a EN"), *stream.push("D b")]) == Reply(
        "END is no stop here", "a ", (), Finish("stop")
    )
    assert stream.done


def test_json_only_keeps_the_value_and_its_inner_spaces() -> None:
    json_only = ReplyFormat(begins="reasoning", json_only=True)
    for around in ('Sure:\n```json\n{"a": "  b  "}\n```\n done', '\n {"a": "  b  "} \n'):
        for pieces in ([f"r</think>{around}"], list(f"r</think>{around}")):
            assert streamed(pieces, json_only).content == '{"a": "  b  "}'


def test_markup_is_content_where_no_tools_were_offered() -> None:
    text = "x" + block(WEATHER)
    assert parse_reply(text, ReplyFormat(tools=False)).content == text


def test_the_length_limit_is_the_reason() -> None:
    assert streamed(["half of"], THINKING, "length").finish == Finish("length")
    cut = streamed([FULL[:-60]], THINKING, "length")
    assert cut.finish.reason == "length" and cut.finish.problems


# -- malformed tool calls


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (block(), "a tool call block holds no call"),
        (f"\n\n<{D}tool_calls>\nnothing\n</{D}tool_calls>", "holds no call"),
        (block(WEATHER).replace("[1, 2.5]", "[1, 2"), "tool call 0 (get_weather) has arguments"),
        (block(WEATHER).replace("[1, 2.5]", "NaN"), "not complete JSON"),
        (block(WEATHER).replace("[1, 2.5]", "[" * 100_000), "not complete JSON"),
        (block(WEATHER).replace('"days"', '"city"'), "(get_weather) gives city twice"),
        (block(WEATHER).replace('string="false"', "string='false'"), "not complete JSON"),
        (block(invoke("ok"), WEATHER).replace(' name="get_weather"', ""), "has no name"),
        (block(WEATHER).replace("get_weather", ""), "has no name"),
        (block(WEATHER).removesuffix(f"</{D}tool_calls>"), "is not closed"),
        (block(WEATHER)[:-80], "is not closed"),
        (block(WEATHER) + "\n and 12 words", "12 characters after the tool call block"),
        (block(WEATHER) + block(WEATHER), "characters after the tool call block"),
    ],
)
def test_malformed_calls_are_named(text: str, problem: str) -> None:
    for pieces in ([text], list(text)):
        finish = streamed(["Let me see.", *pieces], PLAIN).finish
        assert any(problem in found for found in finish.problems), finish.problems
    with pytest.raises(DialectError, match="does not follow its format"):
        parse_reply(text, PLAIN)


def test_a_call_cut_anywhere_is_never_silent() -> None:
    text = "Let me see." + block(WEATHER, invoke("ping"))
    begins = text.index("<｜") + len(f"<{D}")
    for cut in range(begins, len(text)):
        assert streamed([text[:cut]], PLAIN).finish.problems, text[:cut]
    assert not streamed([text], PLAIN).finish.problems


def test_good_calls_beside_a_bad_one_come_through() -> None:
    text = block(invoke("good", ("a", "false", "1")), invoke("bad", ("a", "false", "{")))
    reply = streamed([text], PLAIN)
    assert [call.name for call in reply.calls] == ["good", "bad"]
    assert json.loads(reply.calls[0].arguments) == {"a": 1}
    assert [p for p in reply.finish.problems if "good" in p] == []
