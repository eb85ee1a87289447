"""/v1/completions: text or token ids continued; echo, suffix, log-probabilities, stop strings.

What the vendor's library does not have, so all of it is here. Not chat (openai.py).
Read next: app.py.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from overleap.chat.grammar import Wanted
from overleap.chat.tokenizer import Tokenizer
from overleap.engine.request import Finish, FinishReason, Progress, Request, Scores, Token
from overleap.errors import DialectError
from overleap.server import sse
from overleap.server.auth import Customer
from overleap.server.openai import running_of
from overleap.server.refusals import Refusal, overloaded, refusal_of
from overleap.server.reply import reply
from overleap.server.running import Admission, Running, refused
from overleap.server.schema import CompletionBody
from overleap.server.service import Service
from overleap.server.turns import Turns, parsed, sampling_of, user_id_of
from overleap.server.writers import chat_usage, prompt_progress

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
DEFAULT_TOKENS = 16  # as the API has it
Chunk = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A checked body: prompts as ids, one engine request for each of their `n` answers."""

    id: str
    created: int
    model: str
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    n: int
    stops: tuple[str, ...]
    echo: bool
    logprobs: int | None
    stream: bool
    include_usage: bool
    progress: bool
    wanted: Wanted | None


async def complete(http: HttpRequest, raw: bytes, customer: Customer, service: Service) -> Response:
    """Answer a request. Raises Refusal and what refusals.py makes one of."""
    arrived = time.monotonic()
    # Once without its tokens: what will be refused in any case is not tokenised first.
    admit = partial(
        service.bridge.admit,
        wait_s=service.settings.wait_s,
        flow=customer.flow,
        weight=float(customer.tier.priority),
    )
    admit(0, 1)
    asked = await service.turns.read(
        customer, running_of(customer, service), _asked, service.turns, raw, customer
    )
    requests = asked.requests
    if asked.wanted is not None:
        grammar = await service.turns.compile(asked.wanted)
        requests = tuple(replace(request, constraint=grammar) for request in requests)
    admit(sum(map(len, asked.prompts)), len(requests))
    admission = Admission(
        id=asked.id,
        customer=customer,
        dialect="completions",
        prompts=len(asked.prompts),
        streamed=asked.stream,
        arrived=arrived,
    )
    running = await service.begin(requests, admission)
    return await reply(
        http,
        running,
        lambda: _Talk(asked, running, service),
        silence_s=service.settings.silence_s,
        headers={"x-request-id": asked.id},
    )


def _asked(turns: Turns, raw: bytes, customer: Customer) -> Asked:
    body, value = parsed(CompletionBody, raw)
    turns.check_model(body.model)
    tokenizer, user_id = turns.model.tokenizer, user_id_of(value)
    for prompt in _prompts(body.prompt):
        if isinstance(prompt, str):
            turns.check_size(prompt + (body.suffix or ""), customer, "prompt")
    prompts = [_ids(prompt, body.suffix, tokenizer) for prompt in _prompts(body.prompt)]
    longest = max(map(len, prompts))
    wanted_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    context = turns.context_of(customer)
    if longest + wanted_tokens > context:
        raise Refusal(
            400,
            f"the prompt has {longest} tokens and {wanted_tokens} for the answer, "
            f"the context is {context}",
            "context_length_exceeded",
            "prompt",
        )
    if body.echo and body.suffix is not None:
        raise Refusal(400, "echo shows a prompt, which a suffix is no part of", param="suffix")
    sampling = replace(
        sampling_of({**value, "logprobs": None}, wanted_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    id, n = f"cmpl-{uuid.uuid4().hex}", body.n or 1
    realms = [turns.isolation.realm(customer, ids, user_id) for ids in prompts]
    requests = [
        Request(
            prompt=ids,
            sampling=sampling
            if sampling.seed is None
            else replace(sampling, seed=(sampling.seed + number) % 2**63),
            id=f"{id}-{place}-{number}",
            salt=realms[place].salt,
            public_tokens=realms[place].public_tokens,
            flow=customer.flow,
            weight=float(customer.tier.priority),
        )
        for place, ids in enumerate(prompts)
        for number in range(n)
    ]
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Asked(
        id, int(time.time()), body.model, tuple(prompts), tuple(requests), n, stops,
        bool(body.echo), body.logprobs, bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
        bool(body.return_progress), _format(body.response_format),
    )  # fmt: skip


def _prompts(prompt: Any) -> list[Any]:
    """One prompt or several, as texts or as lists of ids."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def _ids(prompt: str | list[int], suffix: str | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of a prompt: a text gets the beginning of sequence, ids are taken as they are."""
    if suffix is None:
        if isinstance(prompt, str):
            return (tokenizer.bos_id, *tokenizer.encode(prompt))
        return tuple(prompt)
    if not isinstance(prompt, str):
        raise Refusal(400, "a suffix goes with a text as prompt", param="suffix")
    begin, hole, end = (tokenizer.id_of(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END))
    before, after = tokenizer.encode(prompt), tokenizer.encode(suffix)
    return (tokenizer.bos_id, begin, *before, hole, *after, end)


def _format(wanted: Mapping[str, Any] | None) -> Wanted | None:
    match wanted:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return Wanted("json", "")
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return Wanted("json", json.dumps(schema))
        case {"type": "regex", "regex": str(pattern)}:
            return Wanted("regex", pattern)
    raise DialectError(
        "response_format is not understood",
        "its type is text, json_object, json_schema (json_schema.schema) or regex (regex)",
    )


@dataclass(eq=False)
class _Piece:
    """One answer: its text so far, of which `shown` characters were sent."""

    asked: Asked
    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    text: str = ""
    shown: int = 0
    stopped: bool = False
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sent: int = 0  # tokens whose log-probabilities were sent
    length: int = 0  # of the tokens noted so far, in characters
    begins: int = 0  # where the answer begins in the text

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.decoder()
        self._noted = self.tokenizer.decoder()
        if self.asked.echo:
            self.text = self.tokenizer.decode(self.prompt)
            self.begins = len(self.text)
            if self.asked.logprobs is not None:
                self._note(Token(self.prompt[0]))

    def score(self, scores: Scores) -> None:
        """Log-probabilities of the prompt's tokens, from the second on."""
        for token in scores.tokens:
            self._note(token)

    def push(self, token: Token) -> None:
        """One more token of the answer."""
        if self.stopped:
            return
        if self.asked.logprobs is not None:
            self._note(token)
        self._add(self._decoder.push(token.id))

    def finish(self) -> None:
        if not self.stopped:
            self._add(self._decoder.flush())

    def _add(self, text: str) -> None:
        start = len(self.text)
        self.text += text
        # A stop string may have begun before this piece, but never in the prompt.
        places = [
            self.text.find(stop, max(start - len(stop) + 1, self.begins))
            for stop in self.asked.stops
        ]
        first = min((place for place in places if place >= 0), default=None)
        if first is not None:
            self.text, self.stopped = self.text[:first], True

    @property
    def ready(self) -> int:
        """Characters that may be shown: no stop string can begin in them any more."""
        if self.stopped:
            return len(self.text)
        held = 0
        for stop in self.asked.stops:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        return len(self.text) - held

    def _note(self, token: Token) -> None:
        self.tokens.append(self.tokenizer.token_bytes(token.id).decode("utf-8", "replace"))
        self.logprobs.append(None if token.logprob is None else max(token.logprob, -9999.0))
        self.offsets.append(self.length)
        self.length += len(self._noted.push(token.id))
        if token.logprob is None:
            self.tops.append(None)
            return
        top: dict[str, float] = {}
        for other, logprob in token.top_logprobs:
            name = self.tokenizer.token_bytes(other).decode("utf-8", "replace")
            top.setdefault(name, max(logprob, -9999.0))
        self.tops.append(top)

    def take(self, everything: bool) -> tuple[str, Chunk | None]:
        """What was not sent yet: text, and the log-probabilities of whole tokens."""
        end = len(self.text) if everything else self.ready
        text, self.shown = self.text[self.shown : end], max(self.shown, end)
        if self.asked.logprobs is None:
            return text, None
        first, self.sent = self.sent, len(self.tokens)
        return text, {
            "tokens": self.tokens[first:],
            "token_logprobs": self.logprobs[first:],
            "top_logprobs": self.tops[first:],
            "text_offset": self.offsets[first:],
        }


class _Talk:
    """All answers of one request."""

    def __init__(self, asked: Asked, running: Running, service: Service) -> None:
        self._asked, self._running, self._service = asked, running, service
        tokenizer = service.turns.model.tokenizer
        self._pieces = [
            _Piece(asked, tokenizer, asked.prompts[index // asked.n])
            for index in range(len(asked.requests))
        ]
        self._reasons: dict[int, str] = {}

    async def frames(self) -> AsyncIterator[bytes]:
        """The events of a streamed answer, errors included."""
        try:
            began = time.monotonic()
            async for index, event in self._events():
                if isinstance(event, Progress) and self._asked.progress:
                    yield sse.frame(self._body([]) | prompt_progress(event, began))
                if isinstance(event, Finish):
                    continue
                text, logprobs = self._pieces[index].take(False)
                if text or (logprobs and logprobs["tokens"]):
                    yield sse.frame(self._body([self._choice(index, text, logprobs, None)]))
            usage = await self._running.settle()
            for index in range(len(self._pieces)):
                text, logprobs = self._pieces[index].take(True)
                choice = self._choice(index, text, logprobs, self._reasons[index])
                yield sse.frame(self._body([choice]))
            if self._asked.include_usage:
                yield sse.frame(self._body([]) | {"usage": chat_usage(usage, 0)})
            yield sse.DONE
        except Exception as error:
            self._running.fail()
            yield sse.frame(refusal_of(error).body("chat", self._asked.id), "error")

    def alive(self) -> bytes:
        """What a stream says when there is nothing to say."""
        return sse.ALIVE

    async def whole(self) -> Chunk:
        """The answer as one object."""
        async for _ in self._events():
            pass
        usage = await self._running.settle()
        choices = [
            self._choice(index, *piece.take(True), self._reasons[index])
            for index, piece in enumerate(self._pieces)
        ]
        return self._body(choices) | {"usage": chat_usage(usage, 0)}

    async def _events(self) -> AsyncIterator[tuple[int, Any]]:
        async for index, event in self._running.events():
            piece = self._pieces[index]
            match event:
                case Scores():
                    piece.score(event)
                case Token():
                    piece.push(event)
                    if piece.stopped:
                        self._running.generations[index].cancel()
                case Finish():
                    refusal = refused(event)
                    if refusal is not None:
                        raise refusal
                    if event.reason is FinishReason.ABORT and not piece.stopped:
                        raise overloaded("the server stops, the answer is not whole", 5)
                    piece.finish()
                    length = event.reason is FinishReason.LENGTH and not piece.stopped
                    self._reasons[index] = "length" if length else "stop"
            yield index, event

    def _choice(self, index: int, text: str, logprobs: Chunk | None, reason: str | None) -> Chunk:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _body(self, choices: list[Chunk]) -> Chunk:
        return {
            "id": self._asked.id,
            "object": "text_completion",
            "created": self._asked.created,
            "model": self._asked.model,
            "system_fingerprint": self._service.turns.model.fingerprint,
            "choices": choices,
            "usage": None,
        }
