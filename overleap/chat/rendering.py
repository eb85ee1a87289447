"""Messages to marked text: the vendor's library renders, and what it lacks is put in afterwards.

Not settings or API bodies: dialects.py. How it is put in: a *mark*, a string that nobody could have
written, goes where the library expects plain text; in the rendered prompt, the marks are replaced.
Read next: dialects.py, tokenizer.py (what the ranges are for).
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import deepseek_recipe as recipe

from overleap.chat.tokenizer import ASSISTANT, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER
from overleap.errors import DialectError

_KEYS = {
    "system": {"content"},
    "user": {"content", "task"},
    "developer": {"content", "task", "tools"},
    "latest_reminder": {"content"},
    "tool": {"content", "tool_call_id"},
    "assistant": {"content", "reasoning_content", "reasoning", "tool_calls", "prefix", "task"},
}
_TYPES: dict[str, type] = {
    "task": str,
    "tools": list,
    "tool_calls": list,
    "tool_call_id": str,
    "prefix": bool,
    "reasoning": str,
    "reasoning_content": str,
}
_ALWAYS = {"role", "mask"}  # mask: which turns a training loss counts; no part of the text
# What the library raises for values that it cannot read.
UNREADABLE = (TypeError, ValueError, OverflowError, RecursionError)
_TURNS = {USER, ASSISTANT, LATEST_REMINDER}

# What we ask of the library's own table of efforts (that of the general release).
Level = Literal["low", "high", "max"]


class Item(NamedTuple):
    """A piece of a rendered prompt: plain text, a special token, or a mark by its name."""

    kind: Literal["plain", "special", "mark"]
    text: str


_TOOLS_COME_OUT = Item("mark", "tools come out here")
_TOOLS_GO_IN = Item("mark", "tools go in here")
_REPLY_TO_TASK = Item("mark", "reply to the task")
_NOT_EMPTY = Item("mark", "not empty")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with text content and no unknown parts. Raises DialectError naming one."""
    checked = [_checked(message, f"message {i}") for i, message in enumerate(messages)]
    if not checked:
        raise DialectError("a chat needs at least one message")
    calls_open = False
    for i, message in enumerate(checked):
        role, before = message["role"], checked[i - 1]["role"] if i else ""
        after = checked[i + 1]["role"] if i + 1 < len(checked) else ""
        calls_open = calls_open or bool(message.get("tool_calls"))
        if role == "tool" and not calls_open:
            raise DialectError(f"message {i} answers a tool call, and none stands before it")
        crowd = {before, after} & {"user", "tool", "developer"}
        if role == "developer" and crowd:
            raise DialectError(
                f"message {i} is a developer message next to a {min(crowd)} message",
                "a developer message is the whole turn of its user",
            )
        if message.get("prefix") and (after or message.get("task")):
            raise DialectError(
                f"message {i} has prefix set and cannot be continued",
                "only the last message can be, and only without a task",
            )
        if message.get("task") and after not in ("", "assistant"):
            raise DialectError(
                f"message {i} asks for the task {message['task']!r} and a {after} message follows",
                "the reply to a task comes directly after it",
            )
    return checked


def _checked(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DialectError(f"{where} is a {type(message).__name__}, expected an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        raise DialectError(f"{where} has the role {role!r}", f"the roles are {', '.join(_KEYS)}")
    given = {key: value for key, value in message.items() if value is not None}
    unknown = set(given) - _KEYS[role] - _ALWAYS
    if unknown:
        raise DialectError(
            f"{where} ({role}) has {', '.join(sorted(map(repr, unknown)))}, "
            "which has no place in the prompt",
            f"a {role} message may have {', '.join(sorted(_KEYS[role]))}",
        )
    if role != "assistant" and "content" not in given:
        raise DialectError(f"{where} ({role}) has no content")
    for key, wanted in _TYPES.items():
        if not isinstance(given.get(key, wanted()), wanted):
            raise DialectError(f"{where} ({role}) has a {key} that is not a {wanted.__name__}")
    given["content"] = joined_text(given.get("content", ""), where)
    if role == "assistant":
        given.setdefault("reasoning_content", given.pop("reasoning", ""))
        given["tool_calls"] = [_tool_call(call, where) for call in given.get("tool_calls", ())]
    task = given.get("task")
    if task is not None and (task not in TASKS or (task == "title") != (role == "assistant")):
        raise DialectError(
            f"{where} ({role}) cannot ask for the task {task!r}",
            "assistant messages ask for title; user and developer messages for "
            + ", ".join(name for name in TASKS if name != "title"),
        )
    if task is not None and given.get("tool_calls"):
        raise DialectError(f"{where} has tool calls and a task: a task asks about an answer")
    return given


def joined_text(content: Any, where: str) -> str:
    """Text content: a string, or text blocks, which are joined by blank lines.

    Raises DialectError for what is not text, and names where it is.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        blocks = []
        for block in content:
            match block:
                case {"type": "text", "text": str(text)}:
                    blocks.append(text)
                case _:
                    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
                    raise DialectError(f"{where} holds {kind!r} content, and the model reads text")
        return "\n\n".join(blocks)
    raise DialectError(f"{where} has content of type {type(content).__name__}, expected text")


def _tool_call(call: Any, where: str) -> recipe.ToolCall:
    match call:
        case {"function": {"name": str(name), "arguments": str(arguments)}}:
            pass
        case {"function": {"name": str(name), "arguments": dict(values)}}:
            arguments = json.dumps(values, ensure_ascii=False)
        case _:
            raise DialectError(
                f"{where} has a tool call without function.name and function.arguments",
                "arguments is JSON text or an object",
            )
    return recipe.ToolCall(str(call.get("id") or ""), name, arguments)


def tool_definitions(tools: Sequence[Mapping[str, Any]]) -> list[recipe.ToolDefinition]:
    """Tools of Chat Completions as the library's. Raises DialectError naming the tool."""
    return [_tool_definition(tool, i) for i, tool in enumerate(tools)]


def _tool_definition(tool: Mapping[str, Any], number: int) -> recipe.ToolDefinition:
    match tool:
        case {"type": "function", "function": {"name": str(name), **rest}}:
            given: dict[str, Any] = {
                key: rest[key] for key in ("description", "parameters", "strict") if key in rest
            }
            try:
                return recipe.ToolDefinition(name, **given)
            except UNREADABLE as error:
                raise DialectError(f"tool {number} ({name}) cannot be rendered: {error}") from error
    raise DialectError(
        f"tool {number} is not a function with a name",
        'a tool is {"type": "function", "function": {"name": ..., "parameters": ...}}',
    )


def render_messages(
    checked: Sequence[Mapping[str, Any]],
    *,
    level: Level | None,
    tools: list[recipe.ToolDefinition],
    settings: Mapping[str, Any],
    transcript: bool,
) -> tuple[list[Item], recipe.Conversation]:
    """Render checked messages.

    level       the library's effort level; None: thinking is off
    settings    further arguments of the library's Conversation
    transcript  close the last message, an assistant's, instead of opening a reply
    returns     the pieces of the prompt without marks, and the library's conversation
    """
    # Drawn anew for each prompt, so that no text can hold a mark by chance or intent.
    nonce = "\ue000" + secrets.token_hex(8)
    own_tools = _developer_tools(checked, bool(tools))
    if own_tools and all(m["role"] != "system" for m in checked):
        checked = [{"role": "system", "content": ""}, *checked]
    _refuse_old_developers(checked, level is not None and not (tools or own_tools))
    try:
        conversation = recipe.Conversation(
            [
                _library_message(m, nonce)
                for m in _marked(checked, bool(own_tools), transcript, level)
            ],
            thinking_mode=level is not None,
            tools=tools or own_tools,
            reasoning_effort=level,
            **settings,
        )
    except UNREADABLE as error:  # lone surrogates, endless numbers, nested too deep
        raise DialectError(f"the messages cannot be rendered: {error}") from error
    items = _items(recipe.DeepseekV4Encoding().render_conversation(conversation), nonce)
    items = _put_tasks(_move_tools(items), level is not None)
    items = [item for item in items if item.kind != "mark"]
    if transcript and not checked[-1].get("task"):
        items.append(Item("special", EOS))
    return items, conversation


def _developer_tools(
    checked: Sequence[Mapping[str, Any]], tools_elsewhere: bool
) -> list[recipe.ToolDefinition]:
    """The tools of the one developer message that has any."""
    owners = [m for m in checked if m.get("tools")]
    if len(owners) + tools_elsewhere > 1:
        raise DialectError("tools are given in more than one place")
    return tool_definitions(owners[0]["tools"]) if owners else []


def _last_user(checked: Sequence[Mapping[str, Any]]) -> int:
    """Index of the message whose reply may still hold reasoning; tool results are the user's."""
    users = ("user", "developer", "tool")
    return max((i for i, m in enumerate(checked) if m["role"] in users), default=-1)


def _refuse_old_developers(checked: Sequence[Mapping[str, Any]], forgetful: bool) -> None:
    """The checkpoints' encoder leaves them out without their replies, which no chat should want."""
    last = _last_user(checked)
    if forgetful and any(m["role"] == "developer" for m in checked[: max(last, 0)]):
        raise DialectError(
            "a developer message before the last user message, in thinking mode and without tools",
            "leave it out together with its reply",
        )


class _Marked(NamedTuple):
    """A message and the marks around its text; `kept`: its reasoning stays, nothing follows it."""

    message: Mapping[str, Any]
    before: tuple[Item, ...] = ()
    after: tuple[Item, ...] = ()
    reasoning: str | None = None
    kept: bool = False


def _marked(
    checked: Sequence[Mapping[str, Any]],
    own_tools: bool,
    transcript: bool,
    level: Level | None,
) -> Iterator[_Marked]:
    last_user = _last_user(checked)
    last_system = max((i for i, m in enumerate(checked) if m["role"] == "system"), default=-1)
    for i, message in enumerate(checked):
        task = (Item("mark", message["task"]),) if message.get("task") else ()
        if message["role"] == "system":
            yield _Marked(
                message, after=(_TOOLS_COME_OUT,) if own_tools and i == last_system else ()
            )
        elif message["role"] != "assistant":
            yield _Marked(
                message, after=(*((_TOOLS_GO_IN,) if message.get("tools") else ()), *task)
            )
        else:
            answers_task = i > 0 and bool(checked[i - 1].get("task"))
            closed = transcript and i == len(checked) - 1
            yield _Marked(
                message,
                before=(_REPLY_TO_TASK,) if answers_task else (),
                after=task,
                reasoning=None if level is None else message["reasoning_content"],
                kept=closed or (bool(task) and i > last_user),
            )


def _library_message(marked: _Marked, nonce: str) -> recipe.Message:
    message = marked.message

    def text(items: Sequence[Item]) -> str:
        return "".join(f"{nonce}{item.text}{nonce}" for item in items)

    content = text(marked.before) + message["content"] + text(marked.after)
    match message["role"]:
        case "system":
            return recipe.SystemMessage(content)
        case "latest_reminder":
            return recipe.LatestReminderMessage(content)
        case "tool":
            return recipe.ToolMessage(content, message.get("tool_call_id"))
        case "assistant":
            calls, reasoning = message["tool_calls"] or None, marked.reasoning
            if not marked.kept:
                prefix = bool(message.get("prefix"))
                return recipe.AssistantMessage(content, reasoning, calls, prefix)
            # As a prefix, a message keeps its reasoning and gets no end; an empty part would make
            # the library continue in it.
            filler = text([_NOT_EMPTY])
            reasoning = None if reasoning is None else reasoning + filler
            return recipe.AssistantMessage(content + filler, reasoning, calls, True)
    return recipe.UserMessage(content)  # user, and developer, which stands in for one


def _items(rendered: recipe.RenderedPrompt, nonce: str) -> list[Item]:
    """Cut a rendered prompt at its special tokens and marks."""
    text, items, at = rendered.prompt, [], 0
    for start, end in [*rendered.special_ranges, (len(rendered.prompt), len(rendered.prompt))]:
        for i, piece in enumerate(text[at:start].split(nonce)):
            # Marks are name between nonces, so every second piece is one.
            if piece or i % 2:
                items.append(Item("mark" if i % 2 else "plain", piece))
        if end > start:
            items.append(Item("special", text[start:end]))
        at = end
    return items


def _move_tools(items: list[Item]) -> list[Item]:
    """Take the tool schemas out of the system text and put them into the developer message."""
    if _TOOLS_COME_OUT not in items:
        return items
    start = items.index(_TOOLS_COME_OUT)
    end = next(
        i
        for i in range(start, len(items))
        if items[i].kind == "special" and items[i].text in _TURNS
    )
    target = items.index(_TOOLS_GO_IN)
    return items[:start] + items[end:target] + items[start:end] + items[target:]


def _put_tasks(items: list[Item], thinking: bool) -> list[Item]:
    """Replace what the library puts between a task and its reply by what the task wants there."""
    done: list[Item] = []
    i = 0
    while i < len(items):
        if items[i].kind != "mark" or items[i].text not in TASKS:
            done.append(items[i])
            i += 1
            continue
        task = items[i].text
        opening = {
            "action": (ASSISTANT, THINK if thinking else END_THINK, TASKS[task]),
            "title": (EOS, TASKS[task]),
        }.get(task, (TASKS[task],))
        done += [Item("special", token) for token in opening]
        rest = range(i + 1, len(items))
        i = 1 + next((j for j in rest if items[j] == _REPLY_TO_TASK), len(items))
    return done
