"""A request in the engine: its answers, its place in the books, and its end, whatever happens.

Not here: what clients see of it (writers.py). Read next: bridge.py, ledger.py.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field

from overleap.engine.request import Event, Finish, FinishReason, Progress, Request, Token
from overleap.server.auth import Customer
from overleap.server.bridge import Bridge, Generation
from overleap.server.ledger import Ledger, Reservation
from overleap.server.metrics import Metrics
from overleap.server.refusals import Refusal, overloaded, refusal_of
from overleap.server.usage import Usage

log = logging.getLogger("overleap.server")


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a request comes with.

    id        names it in the ledger
    dialect   of its API, for metrics
    prompts   how many prompts there are: each is booked once, however many answers it gets
    streamed  the client is sent tokens as they come, not the whole answer at its end
    arrived   of time.monotonic
    """

    id: str
    customer: Customer
    dialect: str
    prompts: int = 1
    streamed: bool = False
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Running:
    """Requests that the engine has, booked as one. `close` ends them; twice is harmless."""

    admission: Admission
    reservation: Reservation
    metrics: Metrics
    generations: list[Generation]
    _stack: AsyncExitStack
    _ended: Callable[["Running"], None]
    _closing: "asyncio.Task[None] | None" = None
    _settled: Usage | None = None
    _failed: bool = False
    _sent: bool = False  # a token, as far as a stream goes
    _last_token: dict[int, float] = field(default_factory=dict)

    @classmethod
    async def begin(
        cls,
        requests: Sequence[Request],
        admission: Admission,
        *,
        bridge: Bridge,
        ledger: Ledger,
        metrics: Metrics,
        wait_s: float,
        ended: Callable[["Running"], None],
    ) -> "Running":
        """Let requests in and hand them to the engine.

        Raises Refusal (503), QuotaError, RateError, AccessError, CapacityError, RequestError; then
        nothing is left behind.
        """
        each = len(requests) // admission.prompts
        tokens = sum(len(request.prompt) for request in requests[::each])
        stack = AsyncExitStack()
        most = sum(request.sampling.max_tokens for request in requests)
        first = requests[0]
        with bridge.promise(tokens, len(requests), wait_s, first.flow, first.weight):
            reservation = await stack.enter_async_context(
                ledger.reserve(
                    admission.customer,
                    tokens,
                    most,
                    admission.id,
                    longest_tokens=max(request.total_tokens for request in requests),
                )
            )
        metrics.admitted(admission.customer.tier.name, tokens)
        running = cls(admission, reservation, metrics, [], stack, ended)
        try:
            running.generations += await bridge.submit(requests)
        except BaseException:
            await running.close()
            raise
        return running

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(which answer, event) of all answers as they come."""
        async for index, event in self._merged():
            self._measure(index, event)
            yield index, event
            self._sent = self._sent or isinstance(event, Token)

    def _measure(self, index: int, event: Event) -> None:
        tier, now = self.admission.customer.tier.name, time.monotonic()
        if isinstance(event, Progress) and index not in self._last_token:
            generation = self.generations[index]
            began = generation.began or now
            self._last_token[index] = -1.0
            self.metrics.started(tier, began - generation.submitted)
        elif isinstance(event, Token):
            if self._last_token.get(index, -1.0) < 0:
                self.metrics.first_token(tier, now - self.admission.arrived)
            else:
                self.metrics.next_token(tier, now - self._last_token[index])
            self._last_token[index] = now

    async def _merged(self) -> AsyncIterator[tuple[int, Event]]:
        if len(self.generations) == 1:
            async for event in self.generations[0].events():
                yield 0, event
            return
        streams = [generation.events() for generation in self.generations]
        pending = {asyncio.ensure_future(_next(s)): i for i, s in enumerate(streams)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: pending[task]):
                    index, event = pending.pop(task), task.result()
                    if not isinstance(event, Finish):
                        pending[asyncio.ensure_future(_next(streams[index]))] = index
                    yield index, event
        finally:
            for task in pending:
                task.cancel()

    @property
    def usage(self) -> Usage:
        """What all of it took. Exact once every answer has ended.

        A prompt is counted once, however many answers it gets; what was not read is not counted.
        """
        each = len(self.generations) // self.admission.prompts if self.generations else 1
        first = self.generations[::each]
        finished = [g.finish.usage for g in self.generations if g.finish is not None]
        return Usage(
            cache_hit_tokens=sum(g.cached for g in first),
            cache_miss_tokens=sum(max(0, g.read - g.cached) for g in first),
            output_tokens=sum(usage.generated_tokens for usage in finished),
            machine_s=sum(usage.machine_s for usage in finished),
        )

    async def settle(self) -> Usage:
        """Book what was used, once every answer has ended; only then tell the client."""
        return await self._settle(lambda: self.usage)

    async def _settle(self, due: Callable[[], Usage]) -> Usage:
        for generation in self.generations:
            await generation.ended()
        if self._settled is None:
            self._settled = due()
            await self.reservation.settle(self._settled)
        return self._settled

    def _due(self) -> Usage:
        """What an answer is charged that is not whole.

        Where the server is to blame, because it or the engine failed or a server that stops cut the
        answer, what the client was given: of a stream all of its usage so far, once a token of it
        was sent; of any other answer nothing. A client that left pays for its usage up to then.
        """
        failed = self._failed or any(
            g.finish is not None and g.finish.reason is FinishReason.ERROR for g in self.generations
        )
        sent = self.admission.streamed and self._sent
        return self.usage if sent or not failed else Usage()

    def fail(self) -> None:
        """Note that an answer broke off through the server's own fault."""
        self._failed = True

    def cut(self) -> None:
        """End its answers because the server stops; who reads them is told so."""
        self.fail()
        for generation in self.generations:
            generation.cancel()

    async def close(self) -> None:
        """Take what is left out of the engine, book what was used, give the place back."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for generation in self.generations:
            generation.cancel()
        booked = Usage()
        try:
            try:
                used = await self._settle(self._due)
            finally:
                await self._stack.aclose()
            booked = used
        finally:  # also where the ledger could not be written
            self._ended(self)
            self._tell(self.admission, booked)

    def _tell(self, admission: Admission, usage: Usage) -> None:
        """Count it in the metrics, and leave a line in the log: who, how much, no text."""
        seconds, tier = time.monotonic() - admission.arrived, admission.customer.tier.name
        self.metrics.finished(admission.dialect, tier, self._reason(), usage, seconds)
        fields = {
            "request": admission.id,
            "key": admission.customer.key_id,
            "tier": tier,
            "api": admission.dialect,
            "ended": self._reason(),
            "cache_hit_tokens": usage.cache_hit_tokens,
            "cache_miss_tokens": usage.cache_miss_tokens,
            "output_tokens": usage.output_tokens,
            "seconds": round(seconds, 3),
        }
        log.info("a request ended", extra=fields)

    def _reason(self) -> str:
        """How it ended: as its first answer did."""
        finishes = [g.finish for g in self.generations if g.finish is not None]
        return str(finishes[0].reason) if finishes else "error"


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


def refused(finish: Finish) -> Refusal | None:
    """Why an answer ended without being whole, or None."""
    if finish.reason is FinishReason.ERROR:
        assert finish.error is not None
        return refusal_of(finish.error)
    return None


@dataclass(eq=False)
class Everyone:
    """All that runs, so that a server that stops can wait for it or end it.

    draining  set when nobody is waited for any more: answers end with an error event
    coming    requests that are being let in: in the ledger or on their way to the engine
    """

    running: set[Running] = field(default_factory=set)
    draining: bool = False
    coming: int = 0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Let a request in inside of it: from its first moment on it is waited for."""
        self.coming += 1
        try:
            yield
        finally:
            self.coming -= 1
            self._ended.set()

    async def add(self, running: Running) -> None:
        """Know of it until it ends. Raises Refusal (503) for one that came in after the cut."""
        if self.draining:
            running.cut()
            await running.close()
            raise overloaded("the server is about to stop", 5)
        self.running.add(running)

    def remove(self, running: Running) -> None:
        self.running.discard(running)
        self._ended.set()

    async def wait(self) -> None:
        """Until nothing runs, and nothing is being let in."""
        while self.running or self.coming:
            self._ended.clear()
            await self._ended.wait()

    def cut(self) -> None:
        """End all answers now; who reads them is told why."""
        self.draining = True
        for running in self.running:
            running.cut()
