"""Requests to prompts: chat messages and API bodies become text with marked special tokens.

What a request may say and which settings follow; the text itself is put together in rendering.py.
Read next: rendering.py, replies.py (the way back), tokenizer.py (encode_prompt).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import deepseek_recipe as recipe

from overleap.chat.profiles import Preamble, Profile
from overleap.chat.rendering import (
    UNREADABLE,
    Item,
    Level,
    check_messages,
    joined_text,
    render_messages,
    tool_definitions,
)
from overleap.chat.replies import Beginning, ReplyFormat
from overleap.errors import DialectError

Api = Literal["chat", "responses", "messages"]
ToolChoice = Literal["auto", "none", "required"]

# Parts of a message that hold others, and what in them is not text.
_PARTS = ("content", "output")
_UNREAD = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "file": "a file",
    "input_file": "a file",
}

# The vendor's library knows the levels of the general release; we use them to ask for a text.
_RENDERED_LEVEL: dict[Preamble, Level] = {
    "none": "low",
    "absolute": "high",
    "beyond": "max",
}


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    text      the whole prompt, BOS included
    special   ascending, disjoint (start, end) offsets into `text`, each one special token; all
              other text is plain, whatever it spells
    reply     how the text generated after it is to be read
    """

    text: str
    special: tuple[tuple[int, int], ...]
    reply: ReplyFormat


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    profile: Profile,
    thinking: bool | None = None,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: ToolChoice = "auto",
    response_format: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
    transcript: bool = False,
) -> Prompt:
    """Render messages in the shape of Chat Completions, as the checkpoint's own encoder does.

    messages         roles system, user, assistant, tool, latest_reminder, developer; an assistant
                     message may carry reasoning_content, tool_calls, prefix (continue it); a
                     developer message its own tools; user and developer messages a task
                     (action, query, authority, domain, read_url), assistant messages the task title
    thinking         None: what the profile does by default. Off: no reasoning is rendered
    effort           a level of the profile; None: its default. "none" turns thinking off
    tools            {"type": "function", "function": {"name", "description", "parameters"}}
    response_format  {"type": "text" | "json_object" | "json_schema" | "regex", ...}
    transcript       the messages are a finished conversation, ended by an assistant message: close
                     it and open no new reply (training data, test vectors)

    Without tools, reasoning before the last user message is left out, as the checkpoints were
    trained (report section 5.1.1).
    Raises DialectError.
    """
    level = _level(profile, thinking, effort)
    if tool_choice == "required" and (level is not None or not tools):
        raise DialectError(
            f"a tool call is required, and {'thinking is on' if tools else 'there are no tools'}",
            "the prompt opens the call, which needs tools, and thinking turned off",
        )
    checked = check_messages(messages)
    last = checked[-1]
    if transcript and (last["role"] != "assistant" or last.get("prefix")):
        ending = "a prefix to continue" if last.get("prefix") else f"a {last['role']} message"
        raise DialectError(
            f"a finished transcript ends with a finished assistant message, this one with {ending}"
        )
    items, conversation = render_messages(
        checked,
        level=level,
        tools=tool_definitions(tools),
        settings={"tool_choice": tool_choice, **_format_arguments(response_format)},
        transcript=transcript,
    )
    pending = transcript or last.get("task")
    begins = "content" if pending else _begins(conversation)
    return _prompt(items, _reply_format(conversation, begins, tuple(stop)))


def render_body(
    api: Api, body: Mapping[str, Any], *, profile: Profile
) -> tuple[Prompt, recipe.ConversationRequest]:
    """Render the JSON body of an API request, read and checked by the vendor's library.

    api      "chat" (Chat Completions), "responses" or "messages" (Anthropic)
    returns  the prompt, and the library's request for what else it holds (sampling, limits, the
             event stream of that API)

    Ours are the effort level, which means what `profile` says, also where the body names none, and
    that no reasoning comes before a tool call that is demanded.
    Raises DialectError, with the library's sentence for what it refuses.
    """
    _require_chat(profile)
    model = str(body.get("model", profile.name))
    # A call that is demanded follows at once. Who asks for thinking as well is told of it.
    options = recipe.ConversionOptions(
        default_thinking_mode=profile.thinks and not _demands_call(body)
    ).with_model_versions_by_name({model: recipe.ModelVersion.DeepseekV4Pro})
    try:
        given = {**_readable(api, body), "model": model}
        match api:
            case "chat":
                request = recipe.ChatCompletionRequest(given).convert(options)
            case "responses":
                request = recipe.ResponsesRequest(given).convert(options)
            case "messages":
                request = recipe.MessagesRequest(given).convert(options)
    except (recipe.ConversionError, *UNREADABLE) as error:
        raise DialectError(str(error)) from error
    read = request.conversation
    if wants_any_tool(api, body) and read.thinking_mode:
        raise DialectError("Thinking mode does not support this tool_choice")
    asked = read.reasoning_effort if _named_effort(api, body) else None
    level = _level(profile, read.thinking_mode, asked if read.thinking_mode else None)
    conversation = recipe.Conversation(
        read.messages,
        thinking_mode=read.thinking_mode,
        tools=read.tools,
        tool_choice="required" if wants_any_tool(api, body) else read.tool_choice,
        reasoning_effort=level,
        **answer_format(api, read, body),
    )
    rendered = recipe.DeepseekV4Encoding().render_conversation(conversation)
    stop = tuple(request.parsing_options.stop_sequences)
    reply = _reply_format(conversation, _begins(conversation), stop)
    return Prompt(rendered.prompt, tuple(rendered.special_ranges), reply), request


def ask_prompt(
    document: str,
    question: str,
    profile: Profile,
    *,
    thinking: bool | None = None,
    effort: str | None = None,
) -> Prompt:
    """One question about one document, the document first.

    All prompts about one document begin with the same tokens, so that a cache of it serves every
    question. Raises DialectError for a base model.
    """
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    return render_chat([message], profile=profile, thinking=thinking, effort=effort)


def _prompt(items: Sequence[Item], reply: ReplyFormat) -> Prompt:
    ranges, at = [], 0
    for item in items:
        if item.kind == "special":
            ranges.append((at, at + len(item.text)))
        at += len(item.text)
    return Prompt("".join(item.text for item in items), tuple(ranges), reply)


# -- settings


def _level(profile: Profile, thinking: bool | None, effort: str | None) -> Level | None:
    """The library's level that renders what the profile means; None: thinking is off."""
    _require_chat(profile)
    if effort == "none":
        if thinking:
            raise DialectError("thinking is on, and effort 'none' turns it off: choose one")
        return None
    on = profile.thinks if thinking is None else thinking
    if on and not profile.thinks:
        raise DialectError(
            f"{profile.name} does not think aloud", "turn thinking off, or choose another model"
        )
    if not on:
        if effort is not None:
            raise DialectError(f"effort {effort!r} asks for thinking, which is off")
        return None
    return _RENDERED_LEVEL[profile.preamble(effort)]


def _require_chat(profile: Profile) -> None:
    if not profile.chat:
        raise DialectError(
            f"{profile.name} is a base model without a chat format",
            "give it plain text to continue (`overleap generate`)",
        )


def _begins(conversation: recipe.Conversation) -> Beginning:
    """What the reply to a rendered conversation starts with."""
    last = conversation.messages[-1]
    if last.prefix and last.content:
        return "content continued"
    if last.prefix and last.reasoning_content and conversation.thinking_mode:
        return "reasoning continued"
    if conversation.tools and conversation.tool_choice == "required":
        return "tool calls"
    return "reasoning" if conversation.thinking_mode else "content"


def _reply_format(
    conversation: recipe.Conversation, begins: Beginning, stop: tuple[str, ...]
) -> ReplyFormat:
    return ReplyFormat(
        begins=begins,
        tools=bool(conversation.tools) and conversation.tool_choice != "none",
        json_only=conversation.response_format == "json_object",
        stop=stop,
    )


def _format_arguments(response_format: Mapping[str, Any] | None) -> dict[str, Any]:
    """response_format of Chat Completions as arguments of the library's Conversation."""
    match response_format:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"response_format": "json_object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"response_schema": schema}
        case {"type": "regex", "regex": str(pattern)}:
            return {"response_regex": pattern}
    raise DialectError(
        f"response_format {json.dumps(response_format, default=str)} is not understood",
        "its type is text, json_object, json_schema (json_schema.schema) or regex (regex)",
    )


def answer_format(
    api: Api, conversation: recipe.Conversation, body: Mapping[str, Any]
) -> dict[str, Any]:
    """The format that a body wants its answer in, as arguments of the library's Conversation.

    Raises DialectError for one that cannot be held.
    """
    if api == "messages":
        return _messages_format(body)
    match conversation.response_format:
        case "json_object":
            return {"response_format": "json_object"}
        case "json_schema":
            return {"response_schema": conversation.response_schema}
        case "regex":
            return {"response_regex": conversation.response_regex}
    return {}


def _messages_format(body: Mapping[str, Any]) -> dict[str, Any]:
    """Structured output of Messages, which the library does not know, by both of its names."""
    config = body.get("output_config")
    found = config.get("format") if isinstance(config, Mapping) else None
    match body.get("output_format") if found is None else found:
        case None:
            return {}
        case {"type": "json_schema", "schema": Mapping() as schema}:
            return {"response_schema": schema}
    raise DialectError(
        "the output format is not understood", 'it is {"type": "json_schema", "schema": {...}}'
    )


# -- API bodies


def _named_effort(api: Api, body: Mapping[str, Any]) -> bool:
    """Whether a body names an effort level; the library fills in its own where it does not."""
    if api == "chat":
        return body.get("reasoning_effort") is not None
    inner = body.get("reasoning" if api == "responses" else "output_config")
    return isinstance(inner, Mapping) and inner.get("effort") is not None


def _demands_call(body: Mapping[str, Any]) -> bool:
    """Whether the answer has to be a tool call, as any of the APIs says it."""
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        return choice.get("type") in ("function", "any", "tool")
    return choice == "required"


def _readable(api: Api, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body in the words that the library knows; refuses what it would drop or not hold."""
    given = dict(body)
    for field in ("messages", "input"):
        if isinstance(body.get(field), list):
            given[field] = [_known(api, _text_of(item)) for item in body[field]]
    return given


def wants_any_tool(api: Api, body: Mapping[str, Any]) -> bool:
    """Whether Messages demands a call of any of its tools, which the library reads as `auto`."""
    choice = body.get("tool_choice")
    asked = isinstance(choice, Mapping) and choice.get("type") == "any"
    return api == "messages" and asked and bool(body.get("tools"))


def _known(api: Api, message: Any) -> Any:
    """A message by names that the library knows: `reasoning` and `developer` are newer."""
    if not isinstance(message, Mapping):
        return message
    if message.get("type") == "item_reference":
        raise DialectError("nothing is stored here that an item_reference could name")
    known = dict(message)
    if isinstance(message.get("reasoning"), str):
        known["reasoning_content"] = message.get("reasoning_content") or message["reasoning"]
    if api == "chat" and message.get("role") == "developer":
        known["role"] = "system"
    return known


def _text_of(value: Any) -> Any:
    """A message or a part of it, documents that are text as text.

    The library writes a placeholder for what else there is; we say that it cannot be read.
    """
    if isinstance(value, list):
        return [_text_of(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.get("type") == "document":
        return {"type": "text", "text": _document(value)}
    unread = _UNREAD.get(str(value.get("type")))
    if unread:
        raise DialectError(f"this model reads text only, and the request holds {unread}")
    return {key: _text_of(part) if key in _PARTS else part for key, part in value.items()}


def _document(block: Mapping[str, Any]) -> str:
    """The text of a document of Messages, behind its title and context."""
    match block.get("source"):
        case {"type": "text", "data": str(text)}:
            pass
        case {"type": "content", "content": content}:
            text = joined_text(content, "a document")
        case source:
            kind = source.get("type") if isinstance(source, Mapping) else None
            raise DialectError(
                f"this model reads text only, and the source of a document is {kind!r}",
                "a document's source may be text, or content of text",
            )
    above = (block.get(key) for key in ("title", "context"))
    return "\n\n".join([*(part for part in above if isinstance(part, str) and part), text])
