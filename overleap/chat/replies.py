"""Generated text to events: reasoning, content, tool calls, finish; in a stream or at once.

The vendor's library splits; here its chunks become plain events, and a malformed reply is named
instead of dropped. Not an API's wire format. Read next: dialects.py.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import deepseek_recipe as recipe

from overleap.errors import DialectError

# Where a reply begins. "continued" keeps leading newlines: it goes on in the middle of a text.
Beginning = Literal[
    "reasoning", "reasoning continued", "content", "content continued", "tool calls"
]
EndOfText = Literal["stop", "length"]
FinishReason = Literal["stop", "length", "tool_calls"]

_STAGES = {
    "reasoning": recipe.ThinkingInitialStage.ReasoningStart,
    "reasoning continued": recipe.ThinkingInitialStage.ReasoningContinuation,
    "content continued": recipe.ThinkingInitialStage.ContentContinuation,
}
_ENDINGS = {
    "stop": recipe.InferenceFinishReason.Stop,
    "length": recipe.InferenceFinishReason.Length,
}
_BLOCK_OPENS = "<｜DSML｜"
_BLOCK_CLOSES = "</｜DSML｜tool_calls>"
_NAMELESS_CALL = re.compile('<｜DSML｜invoke(?! name="[^"])')


@dataclass(frozen=True)
class ReplyFormat:
    """What to expect in a generated text; every rendered prompt carries its own.

    begins     what the text starts with, given how the prompt ended
    tools      read tool-call markup; off, it is content
    json_only  the reply is one JSON value: fences and text around it are left out
    stop       strings that end the content, not part of it
    """

    begins: Beginning = "content"
    tools: bool = False
    json_only: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A tool call begins: its place in the reply (from 0), a fresh id, and the tool's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call's arguments, a piece of JSON text."""

    index: int
    arguments: str


@dataclass(frozen=True)
class Finish:
    """The reply is over, exactly once per reply.

    problems  what in the reply does not follow the format, one sentence each; () if all does
    """

    reason: FinishReason
    problems: tuple[str, ...] = ()


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | Finish


@dataclass(frozen=True)
class ToolCall:
    """A finished call. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]
    finish: Finish


class ReplyStream:
    """Splits one reply while it is generated. Pushing by tokens or by characters gives the same.

    The text must not hold the end-of-sentence token (Tokenizer.decode leaves it out).
    """

    def __init__(self, format: ReplyFormat) -> None:
        self._format = format
        request = recipe.ConversationRequest(
            recipe.Conversation([]), recipe.ModelVersion.DeepseekV4Pro
        )
        # Chat Completions chunks are the plainest of the library's streams; ids and usage unused.
        chunks = recipe.ChatCompletionRequest.chunk_generator(request, "", "")
        self._processor = recipe.StreamProcessor(
            chunks,
            recipe.ParsingOptions(
                parse_tool_calls=format.tools,
                starts_in_tool_calls=format.begins == "tool calls",
                parse_json_output=format.json_only,
                thinking_initial_stage=_STAGES.get(format.begins),
                stop_sequences=format.stop,
            ),
        )
        self._processor.push(recipe.InferenceChunk.ready())
        self._raw: list[str] = []  # only where tools are read: problems show in the raw text alone
        self._names: list[str] = []
        self._arguments: list[list[str]] = []
        self._spaces = ""  # held back while they may be the blanks around a JSON value
        self._json_began = False
        self._done = False

    @property
    def done(self) -> bool:
        """Whether Finish was given, for instance at a stop string: generating can end."""
        return self._done

    def push(self, text: str) -> list[Event]:
        """The events that more generated text completes; none once done."""
        if self._done or not text:
            return []
        if self._format.tools:
            self._raw.append(text)
        return self._events(self._processor.push(recipe.InferenceChunk.text(text)))

    def finish(self, reason: EndOfText = "stop") -> list[Event]:
        """The last events, when the model stopped by itself or by the length limit."""
        if self._done:
            return []
        end = recipe.InferenceChunk.finish(_ENDINGS[reason])
        events = self._events(self._processor.push(end))
        return events if self._done else events + self._events(self._processor.finish())

    def _events(self, chunks: Iterable[Any]) -> list[Event]:
        events: list[Event] = []
        for chunk in chunks:
            for choice in json.loads(chunk.to_json())["choices"]:
                events += self._from_delta(choice["delta"])
                if choice["finish_reason"] is not None:
                    self._done = True
                    problems = _problems(
                        "".join(self._raw),
                        self._format.begins == "tool calls",
                        [
                            (n, "".join(a))
                            for n, a in zip(self._names, self._arguments, strict=True)
                        ],
                    )
                    events.append(Finish(choice["finish_reason"], problems))
        return events

    def _from_delta(self, delta: dict[str, Any]) -> list[Event]:
        events: list[Event] = []
        if delta.get("reasoning_content"):
            events.append(ReasoningDelta(delta["reasoning_content"]))
        content = self._content(delta.get("content") or "")
        if content:
            events.append(ContentDelta(content))
        for call in delta.get("tool_calls") or ():
            index, function = call["index"], call["function"]
            if "name" in function:
                self._names.append(function["name"])
                self._arguments.append([])
                events.append(ToolCallStart(index, call["id"], function["name"]))
            if function["arguments"]:
                self._arguments[index].append(function["arguments"])
                events.append(ToolCallDelta(index, function["arguments"]))
        return events

    def _content(self, text: str) -> str:
        """The content to give out now; without the blanks around a lone JSON value."""
        if not self._format.json_only:
            return text
        # The library writes a blank for each piece around the value: their number means nothing.
        held = self._spaces + text
        shown = held.rstrip()
        self._spaces = held[len(shown) :]
        began, self._json_began = self._json_began, self._json_began or bool(shown)
        return shown if began else shown.lstrip()


def collect(events: Iterable[Event]) -> Reply:
    """Join the events of one whole stream."""
    reasoning: list[str] = []
    content: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: list[list[str]] = []
    finish = None
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart():
                starts.append(event)
                arguments.append([])
            case ToolCallDelta(index, piece):
                arguments[index].append(piece)
            case Finish():
                finish = event
    assert finish is not None, "collect needs the events up to Finish"
    calls = (ToolCall(s.id, s.name, "".join(a)) for s, a in zip(starts, arguments, strict=True))
    return Reply("".join(reasoning), "".join(content), tuple(calls), finish)


def parse_reply(text: str, format: ReplyFormat, end: EndOfText = "stop") -> Reply:
    """Read a whole generated text. Raises DialectError if it does not follow the format."""
    stream = ReplyStream(format)
    reply = collect([*stream.push(text), *stream.finish(end)])
    if reply.finish.problems:
        raise DialectError(
            f"the generated text does not follow its format: {'; '.join(reply.finish.problems)}"
        )
    return reply


def _problems(raw: str, opened: bool, calls: list[tuple[str, str]]) -> tuple[str, ...]:
    """What is wrong with the tool calls of a reply, given its raw text and (name, arguments)."""
    if not opened and _BLOCK_OPENS not in raw:
        return ()
    found = []
    if not calls:
        found.append("a tool call block holds no call")
    if _NAMELESS_CALL.search(raw):
        found.append("a tool call has no name and was left out")
    for i, (name, arguments) in enumerate(calls):
        wrong = _wrong_arguments(arguments)
        if wrong:
            found.append(f"tool call {i} ({name}) {wrong}")
    _, closing, after = raw.partition(_BLOCK_CLOSES)
    if not closing:
        found.append("the tool call block is not closed")
    elif after.strip():
        found.append(f"{len(after.strip())} characters after the tool call block were left out")
    return tuple(found)


def _wrong_arguments(arguments: str) -> str:
    """What is wrong with the JSON text of a call's arguments, or ""."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in set(names) if names.count(name) > 1)
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(arguments, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return "has arguments that are not complete JSON"
    return f"gives {', '.join(sorted(repeated))} twice" if repeated else ""
