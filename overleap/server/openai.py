"""Chat Completions, Responses and Messages: one turn, three dialects, streamed or whole.

The wire is writers.py's, the engine's side running.py's. Read next: completions.py, app.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from overleap.chat.dialects import Api
from overleap.engine.request import Finish, FinishReason, Progress, Request, Sampling, Token
from overleap.server import sse
from overleap.server.auth import Customer
from overleap.server.ledger import patience
from overleap.server.refusals import Refusal, overloaded, refusal_of
from overleap.server.reply import reply
from overleap.server.running import Admission, Running, refused
from overleap.server.service import Service
from overleap.server.turns import Turn
from overleap.server.usage import Usage
from overleap.server.writers import Chunk, Writer, chat_usage, prompt_progress


async def converse(
    api: Api, http: HttpRequest, raw: bytes, customer: Customer, service: Service
) -> Response:
    """Answer a request of a chat API. Raises Refusal and what refusals.py makes one of."""
    arrived = time.monotonic()
    # Once without its tokens: what will be refused in any case is not tokenised first.
    admit = partial(
        service.bridge.admit,
        wait_s=service.settings.wait_s,
        flow=customer.flow,
        weight=float(customer.tier.priority),
    )
    admit(0, 1)
    turn = await service.turns.prepare(api, raw, customer, running_of(customer, service))
    if not turn.bounded:
        turn = await _within_means(turn, customer, service)
    admit(len(turn.ids), turn.n)
    admission = Admission(
        id=turn.id, customer=customer, dialect=api, streamed=turn.stream, arrived=arrived
    )
    running = await service.begin(
        [_request(turn, index, customer) for index in range(turn.n)], admission
    )
    return await reply(
        http,
        running,
        lambda: _Talk(turn, running, service),
        silence_s=service.settings.silence_s,
        headers={"x-request-id": turn.id, "request-id": turn.id},
    )


def running_of(customer: Customer, service: Service) -> int:
    """Requests of the customer's key in the engine; one whose answers have all ended is not."""
    return sum(
        one.admission.customer.key_id == customer.key_id
        and any(generation.finish is None for generation in one.generations)
        for one in service.everyone.running
    )


async def _within_means(turn: Turn, customer: Customer, service: Service) -> Turn:
    """With answers no longer than quota and balance leave: the client named no length.

    They keep a token at least, for which the ledger says what is missing.
    """
    tier, prompt = customer.tier, len(turn.ids)
    async with patience():
        standing = await asyncio.to_thread(service.reports.standing, customer)
    left = [turn.sampling.max_tokens * turn.n]
    for tokens in (standing.tokens_today, standing.tokens_this_month):
        left += [] if tokens is None else [tokens - prompt]
    if tier.prepaid and tier.price.output:
        left.append((standing.balance - tier.price.worst(prompt, 0)) // tier.price.output)
    most = max(1, min(left) // turn.n)
    return replace(turn, sampling=replace(turn.sampling, max_tokens=most))


def _request(turn: Turn, index: int, customer: Customer) -> Request:
    sampling = turn.sampling
    if index and sampling.seed is not None:
        sampling = _reseeded(sampling, index)
    return Request(
        prompt=turn.ids,
        sampling=sampling,
        id=f"{turn.id}-{index}",
        salt=turn.realm.salt,
        public_tokens=turn.realm.public_tokens,
        branches=turn.branches,
        flow=customer.flow,
        weight=float(customer.tier.priority),
        constraint=turn.grammar,
        choices=turn.choices,
    )


def _reseeded(sampling: Sampling, index: int) -> Sampling:
    """Another answer of the same request: its own seed, still the same every time."""
    assert sampling.seed is not None
    seed = (sampling.seed + index * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63
    return replace(sampling, seed=seed)


class _Talk:
    """One turn and its answers, in the dialect of its API."""

    def __init__(self, turn: Turn, running: Running, service: Service) -> None:
        self._turn, self._running, self._service = turn, running, service
        model = service.turns.model
        self._writers = [
            Writer(turn, model.tokenizer, model.fingerprint, index) for index in range(turn.n)
        ]
        self._begun = False
        self._number = 0  # of the next event of Responses

    def alive(self) -> bytes:
        """What a stream says when there is nothing to say."""
        return sse.PING if self._turn.api == "messages" and self._begun else sse.ALIVE

    async def frames(self) -> AsyncIterator[bytes]:
        """The events of a streamed answer, errors included."""
        try:
            async for chunk in self._chunks():
                yield self._frame(chunk)
            if self._turn.api == "chat":
                yield sse.DONE
        except Exception as error:
            self._running.fail()
            yield self._failure(refusal_of(error))

    async def whole(self) -> Chunk:
        """The answer as one object."""
        async for _ in self._chunks():
            pass
        usage = self._running.usage
        answers = [writer.whole(usage) for writer in self._writers]
        first = answers[0]
        if self._turn.api == "chat":
            first["choices"] = [choice for answer in answers for choice in answer["choices"]]
            reasoning = sum(writer.reasoning_tokens for writer in self._writers)
            first["usage"] = chat_usage(usage, reasoning)
            first["created"] = self._turn.created
        return first

    async def _chunks(self) -> AsyncIterator[Chunk]:
        began = time.monotonic()
        finishes: dict[int, Finish] = {}
        started: set[int] = set()
        async for index, event in self._running.events():
            writer = self._writers[index]
            match event:
                case Progress():
                    if index not in started:
                        started.add(index)
                        for chunk in writer.begin(event):
                            yield chunk
                        self._begun = True
                    if self._turn.progress and self._turn.api == "chat":
                        yield self._bare() | prompt_progress(event, began)
                case Token():
                    for chunk in writer.push(event):
                        yield chunk
                    if writer.done:
                        self._running.generations[index].cancel()
                case Finish():
                    self._check(event, writer)
                    finishes[index] = event
                    if event.chosen and self._turn.api == "chat" and not index:
                        yield self._bare() | {"chosen": [asdict(one) for one in event.chosen]}
        usage = await self._running.settle()
        for index, finish in sorted(finishes.items()):
            writer = self._writers[index]
            stopped = writer.done  # by a stop string: what came with it and behind it was not shown
            chunks = writer.end(finish, usage)  # which show what the library had held back
            if not stopped:
                self._remember(writer, finish)
            for chunk in chunks:
                yield self._without_usage(chunk)
        if self._turn.api == "chat" and self._turn.include_usage:
            yield self._usage_chunk(usage)

    def _check(self, finish: Finish, writer: Writer) -> None:
        """Raise Refusal for an answer that is not whole."""
        refusal = refused(finish)
        if refusal is not None:
            raise refusal
        if finish.reason is FinishReason.ABORT and not writer.done:
            raise overloaded("the server stops, the answer is not whole", 5)

    def _remember(self, writer: Writer, finish: Finish) -> None:
        """Answers that ended by themselves may come back as history."""
        begins = self._turn.prompt.reply.begins
        if finish.reason is FinishReason.STOP and not begins.endswith("continued"):
            self._service.turns.replay.remember(
                self._turn.ids, writer.ids, writer.said(), self._turn.realm.salt
            )

    def _without_usage(self, chunk: Chunk) -> Chunk:
        """With include_usage, or several answers, usage comes in a chunk of its own."""
        turn = self._turn
        if turn.api == "chat" and (turn.include_usage or turn.n > 1):
            chunk["usage"] = None
        return chunk

    def _bare(self) -> Chunk:
        turn = self._turn
        return {
            "id": turn.id,
            "object": "chat.completion.chunk",
            "created": turn.created,
            "model": turn.model,
            "system_fingerprint": self._service.turns.model.fingerprint,
            "choices": [],
            "usage": None,
        }

    def _usage_chunk(self, usage: Usage) -> Chunk:
        reasoning = sum(writer.reasoning_tokens for writer in self._writers)
        return self._bare() | {"usage": chat_usage(usage, reasoning)}

    def _frame(self, chunk: Mapping[str, Any]) -> bytes:
        self._number = chunk.get("sequence_number", 0) + 1
        return sse.frame(chunk, None if self._turn.api == "chat" else str(chunk["type"]))

    def _failure(self, refusal: Refusal) -> bytes:
        body = refusal.body(self._turn.api, self._turn.id)
        if self._turn.api == "responses":
            # Clients of this API wait for a response object, whatever happened.
            body = {
                "type": "response.failed",
                "sequence_number": self._number,
                "response": {
                    "id": self._turn.id,
                    "object": "response",
                    "created_at": self._turn.created,
                    "model": self._turn.model,
                    "status": "failed",
                    "output": [],
                    "error": {"code": body["error"]["code"], "message": refusal.message},
                },
            }
            return sse.frame(body, "response.failed")
        return sse.frame(body, "error")
