"""Tokens of one answer -> the events of its API, over the vendor's library; true usage put in.

What the library lacks is added: log-probabilities, several answers, usage as the engine counted
it. Not here: HTTP (openai.py). Read next: chat/dialects.py.
"""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import deepseek_recipe as recipe

from overleap.chat.dialects import Api
from overleap.chat.replay import Said
from overleap.chat.tokenizer import END_THINK, Tokenizer
from overleap.engine.request import Finish, FinishReason, Progress, Token
from overleap.server.turns import Turn
from overleap.server.usage import Usage

_GENERATORS = {
    "chat": recipe.ChatCompletionRequest.chunk_generator,
    "responses": recipe.ResponsesRequest.chunk_generator,
    "messages": recipe.MessagesRequest.chunk_generator,
}
_ANSWERS = {
    "chat": recipe.ChatCompletionResponse,
    "responses": recipe.ResponsesResponse,
    "messages": recipe.MessagesResponse,
}
Chunk = dict[str, Any]
# Of Messages: what is not counted here, since it is not offered.
_NO_USAGE = {"cache_creation": None, "inference_geo": None, "server_tool_use": None}


@dataclass(eq=False)
class Writer:
    """One answer while it is generated.

    ids   tokens so far; reasoning_tokens: how many of them are reasoning
    done  a stop string came: generating can end
    """

    turn: Turn
    tokenizer: Tokenizer
    fingerprint: str
    index: int = 0
    ids: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        turn = self.turn
        generator: Any = _GENERATORS[turn.api](turn.read, turn.id, turn.model)
        if turn.echo is not None:
            generator = generator.with_echo(turn.echo)
        options = turn.read.parsing_options
        if turn.grammar is not None:
            options.parse_json_output = False  # held already; the library would only pad it
        self._processor = recipe.StreamProcessor(generator, options)
        self._decoder = self.tokenizer.decoder()
        self._answer: Any = None
        self._held: list[Chunk] = []
        self._logprobs: dict[str, list[Chunk]] = {}
        self._thinking = turn.prompt.reply.begins.startswith("reasoning")
        self._end_think = self.tokenizer.id_of(END_THINK)
        self._said = _Shown()

    @property
    def done(self) -> bool:
        return self._processor.finished

    def begin(self, progress: Progress) -> list[Chunk]:
        """The first events, once it is known how much of the prompt a cache had."""
        turn = self.turn
        self._answer = _ANSWERS[turn.api](
            turn.id, turn.model, turn.created, progress.total, progress.cached
        )
        usage = recipe.PromptUsage(
            prompt_tokens=progress.total, prompt_cache_hit_tokens=progress.cached
        )
        ready = recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint=self.fingerprint)
        return self._chunks(self._processor.push(ready))

    def push(self, token: Token) -> list[Chunk]:
        """The events that one more token completes."""
        self.ids.append(token.id)
        if token.logprob is not None:
            self._note_logprob(token)
        if self._thinking:
            self.reasoning_tokens += 1
            self._thinking = token.id != self._end_think
        if self.done:
            return []
        text = self._decoder.push(token.id)
        return self._text(text) if text else []

    def end(self, finish: Finish, usage: Usage) -> list[Chunk]:
        """The last events."""
        chunks: list[Chunk] = []
        if not self.done:
            rest = self._decoder.flush()
            chunks += self._text(rest) if rest else []
        if not self.done:
            length = finish.reason is FinishReason.LENGTH
            reasons = recipe.InferenceFinishReason
            end = recipe.InferenceChunk.finish(reasons.Length if length else reasons.Stop)
            chunks += self._chunks(self._processor.push(end))
            if not self._processor.finished:
                chunks += self._chunks(self._processor.finish())
        chunks += self._held
        self._held = []
        for chunk in chunks:
            self._put_usage(chunk, usage)
        return chunks

    def whole(self, usage: Usage) -> Chunk:
        """The answer as one object; after `end`."""
        found: Chunk = json.loads(self._answer.to_json())
        self._put_usage(found, usage)
        if self.turn.api == "chat":
            choice = found["choices"][0]
            choice["index"] = self.index
            choice["message"]["refusal"] = None
            if self.turn.sampling.logprobs is not None:
                choice["logprobs"] = self._said.logprobs
        self._fill(found)
        return found

    def said(self) -> Said:
        """What the client was shown."""
        shown = self._said
        calls = tuple((name, "".join(pieces)) for name, pieces in shown.calls)
        return Said("".join(shown.reasoning), "".join(shown.content), calls)

    def _text(self, text: str) -> list[Chunk]:
        chunks = self._chunks(self._processor.push(recipe.InferenceChunk.text(text, 1)))
        if self._processor.finished:
            # A stop string. Its events say what was used, which is known when the engine stopped.
            self._held = chunks
            return []
        return chunks

    def _chunks(self, events: list[Any]) -> list[Chunk]:
        chunks = []
        for event in events:
            chunk: Chunk = json.loads(event.to_json())
            self._answer.accumulate(event)
            self._said.note(self.turn.api, chunk)
            if self.turn.api == "chat":
                self._dress(chunk)
            self._fill(chunk)
            chunks.append(chunk)
        return chunks

    def _fill(self, found: Chunk) -> None:
        """Put in what an API's description demands, and the library leaves out or empty."""
        response = found.get("response", found)
        if self.turn.api == "responses" and response.get("object") == "response":
            response["text"]["verbosity"] = response["text"]["verbosity"] or "medium"
            response |= self.turn.repeated
        if self.turn.api == "messages":
            message = found.get("message", found)
            if message["type"] == "message":
                message |= {"container": None, "stop_details": None}
                message["usage"] |= _NO_USAGE
            for block in (*message.get("content", ()), found.get("content_block", {})):
                if block.get("type") == "text":
                    block["citations"] = None
                elif block.get("type") == "tool_use":
                    block["caller"] = {"type": "direct"}

    def _dress(self, chunk: Chunk) -> None:
        """What a chunk of Chat Completions says beyond the library's."""
        chunk["created"] = self.turn.created
        for choice in chunk["choices"]:
            choice["index"] = self.index
            if self._logprobs:
                choice["logprobs"] = {"content": [], **self._logprobs}
                for kind, entries in self._logprobs.items():
                    self._said.logprobs.setdefault(kind, []).extend(entries)
                self._logprobs = {}

    def _note_logprob(self, token: Token) -> None:
        kind = "reasoning_content" if self._thinking else "content"
        assert token.logprob is not None
        entry = self._logprob(token.id, token.logprob)
        entry["top_logprobs"] = [self._logprob(*pair) for pair in token.top_logprobs]
        self._logprobs.setdefault(kind, []).append(entry)

    def _logprob(self, token: int, logprob: float) -> Chunk:
        raw = self.tokenizer.token_bytes(token)
        return {
            "token": raw.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(raw),
        }

    def _put_usage(self, chunk: Chunk, usage: Usage) -> None:
        """The engine's counts into every usage that an event carries."""
        if self.turn.api == "chat":
            if chunk.get("usage") is not None:
                chunk["usage"] = chat_usage(usage, self.reasoning_tokens)
            return
        holder = chunk.get("response", chunk)
        if not isinstance(holder.get("usage"), dict):
            return
        if self.turn.api == "responses":
            holder["usage"] = {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cache_hit_tokens},
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.output_tokens,
            }
        else:
            holder["usage"] |= {
                "input_tokens": usage.cache_miss_tokens,
                "cache_read_input_tokens": usage.cache_hit_tokens,
                "output_tokens": usage.output_tokens,
                "output_tokens_details": {"thinking_tokens": self.reasoning_tokens},
            }


def chat_usage(usage: Usage, reasoning_tokens: int) -> Chunk:
    """Usage of Chat Completions, with DeepSeek's names too."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_hit_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cache_hit_tokens,
        "prompt_cache_miss_tokens": usage.cache_miss_tokens,
    }


def prompt_progress(progress: Progress, began: float) -> Chunk:
    """How far a prompt is read; `began` is of time.monotonic."""
    told = {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.done,
        "time_ms": round((time.monotonic() - began) * 1000),
    }
    return {"prompt_progress": told}


@dataclass(eq=False)
class _Shown:
    """What the events so far have shown."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    logprobs: dict[str, list[Chunk]] = field(default_factory=lambda: {"content": []})

    def note(self, api: Api, chunk: Chunk) -> None:
        match api:
            case "chat":
                for choice in chunk["choices"]:
                    self._delta(choice["delta"])
            case "responses":
                self._response(chunk)
            case "messages":
                self._message(chunk)

    def _delta(self, delta: Chunk) -> None:
        self.reasoning.append(delta.get("reasoning_content") or "")
        self.content.append(delta.get("content") or "")
        for call in delta.get("tool_calls") or ():
            if call["function"].get("name"):
                self.calls.append((call["function"]["name"], []))
            self.calls[call["index"]][1].append(call["function"]["arguments"])

    def _response(self, event: Chunk) -> None:
        match event["type"]:
            case "response.reasoning_text.delta":
                self.reasoning.append(event["delta"])
            case "response.output_text.delta":
                self.content.append(event["delta"])
            case "response.output_item.done":
                self._item(event["item"])

    def _item(self, item: Chunk) -> None:
        """A call, as its history will name it (chat/replay.py)."""
        match item:
            case {"type": "function_call", "name": name, "arguments": arguments}:
                space = item.get("namespace")
                self.calls.append((f"{space}__{name}" if space else name, [arguments]))
            case {"type": "custom_tool_call", "name": name, "input": text}:
                self.calls.append((name, [json.dumps({"input": text})]))

    def _message(self, event: Chunk) -> None:
        match event:
            case {"type": "content_block_start", "content_block": {"type": "tool_use"} as block}:
                self.calls.append((block["name"], []))
            case {"type": "content_block_delta", "delta": {"type": "thinking_delta"} as delta}:
                self.reasoning.append(delta["thinking"])
            case {"type": "content_block_delta", "delta": {"type": "text_delta"} as delta}:
                self.content.append(delta["text"])
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta"} as delta}:
                self.calls[-1][1].append(delta["partial_json"])
