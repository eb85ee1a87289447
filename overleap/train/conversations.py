"""Conversations in JSONL: read, written as the model is talked to, and what of them is learned.

Not here: which stand together in a row (data.py). Read next: chat/dialects.py.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from overleap.chat.dialects import render_chat
from overleap.chat.profiles import Profile
from overleap.chat.rendering import check_messages
from overleap.chat.tokenizer import ASSISTANT, END_THINK, TASKS, THINK, Tokenizer
from overleap.errors import DialectError, TrainingError
from overleap.train.shards import EOS_ID


@lru_cache(maxsize=4)
def conversations(path: str) -> list[tuple[int, dict[str, Any]]]:
    """Conversations and the lines that they stand in. Raises TrainingError."""
    talks = []
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            talk = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise TrainingError(f"{path} line {number} is not JSON: {error}") from None
        if talk is None:
            continue
        if not isinstance(talk, dict) or not isinstance(talk.get("messages"), list):
            raise TrainingError(f"{path} line {number} has no list `messages`")
        if not isinstance(talk.get("tools") or [], list):
            raise TrainingError(f"{path} line {number} has `tools` that are no list")
        talks.append((number, talk))
    if not talks:
        raise TrainingError(f"{path} holds no conversation")
    return talks


def spoken(
    talk: Mapping[str, Any], tokenizer: Tokenizer, profile: Profile
) -> tuple[list[int], list[bool]]:
    """A finished conversation as ids, and where the next token is the assistant's to learn.

    Written with thinking where reasoning stands in a message of which it is kept (render_chat),
    else without. Of a message whose `mask` is false or 0 nothing is learned.
    Raises TrainingError for what cannot be written, and where nothing is learned.
    """
    tools = talk.get("tools") or ()
    try:
        checked = check_messages(talk["messages"])
        prompt = render_chat(
            talk["messages"],
            profile=profile,
            thinking=_has_reasoning(checked, bool(tools)),
            tools=tools,
            transcript=True,
        )
    except DialectError as error:
        raise TrainingError(f"a conversation cannot be written: {error.message}") from None
    ids = tokenizer.encode_prompt(prompt)
    replies = _replies(ids, tokenizer)
    said = [message for message in checked if message["role"] == "assistant"]
    if len(replies) != len(said):
        raise TrainingError(
            f"{len(said)} assistant messages are written as {len(replies)} replies, so which are "
            "learned is not known"
        )
    learn = [False] * len(ids)
    for (first, end), message in zip(replies, said, strict=True):
        if message.get("mask", True):
            learn[first:end] = [True] * (end - first)
    if True not in learn:
        raise TrainingError(
            "a conversation has nothing to learn: every assistant message is masked"
        )
    return ids, learn


def _has_reasoning(checked: Sequence[Mapping[str, Any]], tools: bool) -> bool:
    """Whether any reasoning is kept: all of it beside tools, else what the last user asked for."""
    kept = list(checked)
    if not tools and not any(message.get("tools") for message in checked):
        asked = [i for i, m in enumerate(checked) if m["role"] in ("user", "developer")]
        kept = kept[asked[-1] if asked else 0 :]
    return any(message.get("reasoning_content") for message in kept)


def _replies(ids: Sequence[int], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Positions whose next token is a reply's, of every reply.

    The first token after <Assistant> opens or closes thinking, and one may name a task: these are
    the prompt's. Nor is it the reply's that nothing was thought.
    """
    assistant, think, end_think = map(tokenizer.id_of, (ASSISTANT, THINK, END_THINK))
    tasks = {tokenizer.id_of(token) for token in TASKS.values()}
    found: list[tuple[int, int]] = []
    first: int | None = None
    for i, token in enumerate(ids):
        if token in tasks or (i and ids[i - 1] == assistant):
            first = i
            if token == think and ids[i + 1] == end_think:
                first = i + 1
        elif token == EOS_ID and first is not None:
            found.append((first, i))
            first = None
    return found
