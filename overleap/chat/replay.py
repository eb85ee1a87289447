"""Answers as they were sampled, put back where a client sends them in its own words.

A client returns an answer as it understood it: JSON written anew, blanks trimmed, reasoning left
out. Rendered again, its tokens differ from those in the cache, and everything after them would be
computed again. So the sampled tokens are remembered under a digest of what stood before the answer
and of what the client was shown, and stand in for the rendered ones.

Not here: what is in the cache (cache/prefix.py). Read next: dialects.py (`Prompt`).
"""

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe

from overleap.chat.dialects import Prompt
from overleap.chat.tokenizer import ASSISTANT, END_THINK, EOS, THINK, Tokenizer

ENTRY_BYTES, TOKEN_BYTES = 500, 8  # of memory for an answer and each of its tokens, about


@dataclass(frozen=True)
class Said:
    """What a client was shown of an answer. `calls`: name and arguments, as JSON text."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]

    def key(self) -> bytes:
        """The same for all ways to write the same: blanks around, JSON in other words."""
        calls = [[name, _plain(arguments)] for name, arguments in self.calls]
        return json.dumps([self.content.strip(), calls]).encode()


@dataclass(frozen=True)
class _Answer:
    """Sampled tokens without the stop token. `opened`: what the prompt had put before them."""

    opened: tuple[int, ...]
    ids: "array[int]"
    reasoning: str


class Replay:
    """Remembers answers, the most recently used ones up to so many bytes. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, *, max_bytes: int = 64 * 2**20) -> None:
        self._tokenizer, self._max_bytes = tokenizer, max_bytes
        self._answers: OrderedDict[bytes, _Answer] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def encode(self, prompt: Prompt, messages: Sequence[recipe.Message], tenant: str) -> list[int]:
        """The ids of a prompt: as `Tokenizer.encode_prompt`, with remembered answers put back.

        messages  those that the prompt was rendered from; tenant: whose answers may be used
        """
        said = [_said(message) for message in messages if message.role == "assistant"]
        turns = _turns(prompt)
        if len(turns) < len(said) or not said or messages[-1].prefix:
            return self._tokenizer.encode_prompt(prompt)
        ids: list[int] = []
        before, at, hashed = hashlib.sha256(), 0, 0
        for (start, end), answer in zip(turns, said, strict=False):
            ids += self._tokenizer.encode_prompt(_part(prompt, at, start))
            before.update(_packed(ids[hashed:]))
            hashed = len(ids)
            own = self._tokenizer.encode_prompt(_part(prompt, start, end))
            ids += self._sampled(_key(before.digest(), answer, tenant), answer, own) or own
            at = end
        return ids + self._tokenizer.encode_prompt(_part(prompt, at, len(prompt.text)))

    def remember(
        self, prompt_ids: Sequence[int], sampled: Sequence[int], said: Said, tenant: str
    ) -> None:
        """An answer has ended by itself.

        prompt_ids  what it followed, with what the template opens an answer with
        sampled     its tokens, the stop token left out
        """
        assistant = self._tokenizer.id_of(ASSISTANT)
        start = len(prompt_ids)
        while start and prompt_ids[start - 1] != assistant:
            start -= 1
        if not start:
            return
        before = hashlib.sha256(_packed(prompt_ids[:start])).digest()
        key = _key(before, said, tenant)
        answer = _Answer(tuple(prompt_ids[start:]), array("Q", sampled), said.reasoning)
        with self._lock:
            self._forget(key)
            self._answers[key] = answer
            self._bytes += _size(answer)
            while self._bytes > self._max_bytes:
                self._forget(next(iter(self._answers)))

    def _sampled(self, key: bytes, said: Said, own: list[int]) -> list[int] | None:
        """The remembered tokens for an answer that was rendered as `own`; None for none."""
        with self._lock:
            answer = self._answers.get(key)
            if answer is None:
                return None
            self._answers.move_to_end(key)
        if said.reasoning.strip() not in ("", answer.reasoning.strip()):
            return None  # the client changed it on purpose
        think, end_think = (self._tokenizer.id_of(token) for token in (THINK, END_THINK))
        ids = [*answer.opened, *answer.ids]
        if think in answer.opened and own[:1] != [think]:
            # The template leaves the reasoning of earlier turns out, and so do we.
            if end_think not in answer.ids:
                return None
            ids = ids[ids.index(end_think) :]
        return [*ids, self._tokenizer.eos_id]

    def _forget(self, key: bytes) -> None:
        answer = self._answers.pop(key, None)
        if answer is not None:
            self._bytes -= _size(answer)


def _size(answer: _Answer) -> int:
    return ENTRY_BYTES + TOKEN_BYTES * len(answer.ids) + len(answer.reasoning)


def _turns(prompt: Prompt) -> list[tuple[int, int]]:
    """The (start, end) of every finished answer: after its opening token, its end included."""
    turns, start = [], None
    for begin, end in prompt.special:
        token = prompt.text[begin:end]
        if token == ASSISTANT:
            start = end
        elif token == EOS and start is not None:
            turns.append((start, end))
            start = None
    return turns


def _part(prompt: Prompt, start: int, end: int) -> Prompt:
    """A piece of a prompt that is cut at special tokens: it has the same tokens alone."""
    special = tuple((a - start, b - start) for a, b in prompt.special if start <= a and b <= end)
    return Prompt(prompt.text[start:end], special, prompt.reply)


def _said(message: recipe.Message) -> Said:
    calls = tuple((call.name, call.arguments) for call in message.tool_calls or ())
    return Said(message.reasoning_content or "", message.content, calls)


def _plain(arguments: str) -> Any:
    """JSON text as its value, where it is JSON; keys keep no order."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments


def _packed(ids: Sequence[int]) -> bytes:
    return array("Q", ids).tobytes()


def _key(before: bytes, said: Said, tenant: str) -> bytes:
    digest = hashlib.sha256(before)
    for part in (tenant.encode(), said.key()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
