"""The engine in its thread, the requests in their event loop, and what goes between.

Not here: text (turns.py), who may ask (auth.py). Read next: engine/engine.py.

One thread owns the engine and steps it while there is work. Coroutines put commands into a queue,
which the thread empties before every step: so a request that nobody waits for any more is out of
the engine within one step. Events come back in one call per step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from overleap.engine.request import (
    Event,
    Finish,
    FinishReason,
    Handle,
    Progress,
    Request,
    Stats,
    Token,
    Usage,
)
from overleap.errors import BackendError, RequestError
from overleap.server.limits import Promised, ahead, check_share
from overleap.server.refusals import Refusal, overloaded

log = logging.getLogger("overleap.server")

SMOOTH = 0.1  # weight of the latest request in what one takes
# And in how much later than expected a first token comes: upwards as above, downwards slowly, so
# that about nineteen of twenty come within what is told.
SMOOTH_DOWN = 0.005


class Steps(Protocol):
    """What the bridge needs of an engine."""

    def submit(self, request: Request) -> Handle: ...
    def abort(self, handle: Handle) -> None: ...
    def step(self) -> bool: ...
    def stats(self) -> Stats: ...


@dataclass(eq=False)
class Generation:
    """A request that the engine has. Belongs to the loop.

    tokens  of its prompt; none where another answer to the same prompt has it read
    read    prompt tokens read so far; cached: of those, found and not computed
    began   when it left the queue, None before
    finish  its last event, once it is there
    expected_s  for its first token, as it was foreseen; None once that has come
    """

    request: Request
    bridge: "Bridge"
    tokens: int = 0
    handle: Handle | None = None
    expected_s: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    began: float | None = None
    read: int = 0
    cached: int = 0
    finish: Finish | None = None
    _coming: deque[Event] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def events(self) -> AsyncIterator[Event]:
        """The events as they come, up to Finish."""
        while True:
            while self._coming:
                event = self._coming.popleft()
                yield event
                if isinstance(event, Finish):
                    return
            self._news.clear()
            await self._news.wait()

    def cancel(self) -> None:
        """Take it out of the engine before its next step. Twice is harmless."""
        if self.finish is None:
            self.bridge.cancel(self)

    @property
    def unread(self) -> int:
        """Prompt tokens still to be read."""
        return max(0, self.tokens - self.read)

    async def ended(self) -> Finish:
        """Wait for the last event, whoever reads the events."""
        while self.finish is None:
            self._news.clear()
            await self._news.wait()
        return self.finish

    def take(self, events: list[Event]) -> None:
        """Events from the engine's thread, in the loop."""
        for event in events:
            if isinstance(event, Progress):
                self.began = self.began or time.monotonic()
                self.read, self.cached = event.done, event.cached
            elif isinstance(event, Finish):
                self.finish = event
        self._coming.extend(events)
        self._news.set()


class Bridge:
    """Owns the engine's thread. All methods are the loop's.

    make          opens the engine, in the thread that will use it, and closes it at the end
    slots         requests that the engine serves at once
    queue         requests, queue_tokens: prompt tokens that may wait for it
    """

    def __init__(
        self,
        make: Callable[[], AbstractContextManager[Steps]],
        *,
        slots: int,
        queue: int,
        queue_tokens: int,
    ) -> None:
        self._make = make
        self._engine: Steps
        self._slots, self._queue, self._queue_tokens = slots, queue, queue_tokens
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._live: dict[str, Generation] = {}
        self._promised = Promised()
        self._handles: dict[str, tuple[Handle, Generation]] = {}  # the thread's own
        self._answers: set[asyncio.Future[Any]] = set()  # that the thread owes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._each_s: float | None = None  # seconds in the engine of a request, lately
        self._rate: float | None = None  # prompt tokens read a second, lately
        self._late_s = 0.0  # how much later than expected first tokens come at most, as a rule
        self._delivered, self._unread_before = 0.0, 0
        self.ended = False
        self.stopping = False
        self.failures = 0

    async def start(self) -> None:
        """Begin to serve, in the running loop. Raises what opening the engine raises."""
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._thread.start()
        await self._opened

    async def stop(self) -> None:
        """End the thread. Requests still there end with an error."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- admission

    @property
    def running(self) -> int:
        """Requests that have a place in the engine."""
        return sum(one.began is not None for one in self._live.values())

    @property
    def waiting(self) -> int:
        """Requests in the queue, or on their way to it."""
        return len(self._live) + self._promised.requests.total() - self.running

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests in the queue."""
        waiting = sum(one.tokens for one in self._live.values() if one.began is None)
        return waiting + self._promised.tokens.total()

    def expected_wait_s(self, prompt_tokens: int, flow: str = "", weight: float = inf) -> float:
        """Seconds until the first token of a prompt that came now, as far as one can tell.

        It has its turn when one of the places is free, and what goes before it has been read.
        flow, weight  as the engine is told; not given, it has nothing here and goes first
        """
        tokens = prompt_tokens + self._promised.tokens.total()
        requests = self._promised.requests.total() + 1
        unread, waiting = ahead(self._live.values(), flow, weight, tokens, requests)
        reading = unread / self._rate if self._rate else 0.0
        turns = max(0.0, waiting + self.running - self._slots)
        return reading + (turns * self._each_s / self._slots if self._each_s else 0.0)

    def admit(
        self, prompt_tokens: int, requests: int, wait_s: float, flow: str = "", weight: float = inf
    ) -> None:
        """Raise Refusal (503) where the queue or the flow's share is full, or the wait too long.

        flow, weight  as the engine is told; not given, only what holds for any flow is checked
        Raises RequestError for more at once than there will ever be room for.
        """
        if self.ended:
            raise _engine_ended()
        if self.stopping:
            raise overloaded("the server is about to stop", 5)
        places = self._slots + self._queue
        most = max(self._slots, places // 2) if flow else places
        if requests > most:
            raise RequestError(
                f"the request asks for {requests} answers, {most} at once are the most",
                "fewer prompts, or a smaller n",
            )
        if flow and requests > self._slots and 2 * prompt_tokens > self._queue_tokens:
            raise RequestError(
                f"the prompts have {prompt_tokens} tokens, {self._queue_tokens // 2} may wait",
                "fewer prompts at once",
            )
        expected = self.expected_wait_s(prompt_tokens, flow, weight) + self._late_s
        there = len(self._live) + self._promised.requests.total()
        busy = there >= self._slots
        if there + requests > places:
            raise overloaded(f"{self.waiting} requests are waiting already", expected)
        if busy and self.waiting_tokens + prompt_tokens > self._queue_tokens:
            raise overloaded(f"{self.waiting_tokens} prompt tokens are waiting already", expected)
        self._check_share(flow, requests, prompt_tokens, expected)
        if self._live and expected > wait_s:
            raise overloaded(
                f"the first token would come after {expected:.1f} s, {wait_s:.1f} s are the most",
                expected - wait_s,
            )

    def _check_share(self, flow: str, requests: int, prompt_tokens: int, retry_s: float) -> None:
        """Raise Refusal (503) for a flow that would leave too little of the queue to others.

        What fits into the engine's places is let in, so is the one request of who has nothing here
        yet, and all of the flow "": it has nobody to share with.
        """
        own = [one for one in self._live.values() if one.request.flow == flow]
        there = len(self._live) + self._promised.requests.total() + requests
        had = len(own) + self._promised.requests[flow] + requests
        if not flow or there <= self._slots or had == 1:
            return
        free = self._slots + self._queue - there
        check_share(had, free, "requests", retry_s)
        waiting = sum(one.tokens for one in own if one.began is None)
        waiting += self._promised.tokens[flow] + prompt_tokens
        free = self._queue_tokens - self.waiting_tokens - prompt_tokens
        check_share(waiting, free, "prompt tokens waiting", retry_s)

    @contextmanager
    def promise(
        self, prompt_tokens: int, requests: int, wait_s: float, flow: str, weight: float
    ) -> Iterator[None]:
        """As `admit`; inside, others are let in as if the requests were there already."""
        self.admit(prompt_tokens, requests, wait_s, flow, weight)
        with self._promised.held(flow, requests, prompt_tokens):
            yield

    # -- requests

    async def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Hand requests of one flow to the engine between two steps, all of them or none.

        Raises what `Engine.submit` raises, and Refusal (503) where the engine has ended.
        """
        assert self._loop is not None
        loop, generations = self._loop, list[Generation]()
        prompts = {id(request.prompt): len(request.prompt) for request in requests}
        answer: asyncio.Future[list[Handle]] = self._owed()
        for request in requests:
            # Answers to one prompt share the tuple, and the engine reads it once.
            tokens = prompts.pop(id(request.prompt), 0)
            generation = Generation(request, self, tokens)
            if self._rate is not None:  # else nothing was foreseen, and lateness is not learned
                wait_s = self.expected_wait_s(tokens, request.flow, request.weight)
                generation.expected_s = wait_s
            generations.append(generation)
            self._live[request.id] = generation

        def command() -> None:
            handles: list[Handle] = []
            try:
                for request in requests:
                    handles.append(self._engine.submit(request))
            except BaseException as error:
                for handle in handles:
                    self._engine.abort(handle)
                loop.call_soon_threadsafe(self._refused, requests, answer, error)
                return
            for request, handle, one in zip(requests, handles, generations, strict=True):
                self._handles[request.id] = handle, one
            loop.call_soon_threadsafe(_give, answer, handles)

        self._commands.put(command)
        try:
            for one, handle in zip(generations, await asyncio.shield(answer), strict=True):
                one.handle = handle
        except asyncio.CancelledError:
            for one in generations:
                self.cancel(one)
            raise
        return generations

    def _refused(
        self, requests: Sequence[Request], answer: "asyncio.Future[Any]", error: BaseException
    ) -> None:
        """The engine did not take these, whether or not somebody still waits to hear it."""
        for request in requests:
            self._live.pop(request.id, None)
        _fail(answer, error)

    def cancel(self, generation: Generation) -> None:
        """Have it aborted before the next step."""
        name = generation.request.id

        def command() -> None:
            found = self._handles.get(name)
            if found is not None:
                self._engine.abort(found[0])

        self._commands.put(command)

    def cancel_all(self) -> None:
        """Have everything aborted."""
        for generation in list(self._live.values()):
            generation.cancel()

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of the engine's thread, between two steps.

        Raises what the question raises, Refusal (503) where the engine has ended.
        """
        assert self._loop is not None
        loop = self._loop
        answer = self._owed()

        def command() -> None:
            try:
                loop.call_soon_threadsafe(_give, answer, question(self._engine))
            except BaseException as error:
                loop.call_soon_threadsafe(_fail, answer, error)

        self._commands.put(command)
        return await answer

    def _owed(self) -> "asyncio.Future[Any]":
        """What the thread is to answer with; it fails when the thread ends before that."""
        assert self._loop is not None
        if self.ended:
            raise _engine_ended()
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)
        return answer

    def _end(self) -> None:
        """The thread is gone: nothing comes from it any more."""
        self.ended = self.stopping = True
        self._live.clear()
        for answer in self._answers:
            _fail(answer, _engine_ended())

    # -- the thread

    def _run(self) -> None:
        assert self._loop is not None and self._opened is not None
        opened = False
        try:
            with self._make() as engine:
                self._engine = engine
                self._loop.call_soon_threadsafe(_give, self._opened, None)
                opened = True
                try:
                    self._serve()
                finally:
                    self._give_up()
        except BaseException as error:
            if opened:
                log.critical("the engine's thread has ended", exc_info=error)
            else:
                self._loop.call_soon_threadsafe(_fail, self._opened, error)

    def _give_up(self) -> None:
        """Let nobody wait for this thread: its requests end, and what it owes fails."""
        for handle, _ in self._handles.values():
            if handle.finish is None:
                handle.finish = Finish(
                    reason=FinishReason.ERROR,
                    usage=Usage(prompt_tokens=len(handle.request.prompt)),
                    seed=handle.seed,
                    error=BackendError("the engine's thread has ended"),
                )
                handle.events.append(handle.finish)
        self._send()
        self._tell(self._end)

    def _serve(self) -> None:
        busy = False
        while True:
            try:
                command = self._commands.get(block=not busy)
            except Empty:
                command = _nothing
            while command is not None:
                self._try(command)
                try:
                    command = self._commands.get_nowait()
                except Empty:
                    break
            if command is None:
                return
            busy = self._try(self._engine.step) is not False
            self._send()

    def _try(self, action: Callable[[], bool | None]) -> bool | None:
        """What it returns. Requests that it fails end with errors; the engine itself goes on."""
        try:
            return action()
        except Exception:
            log.exception("a step of the engine failed")
            self.failures += 1
            return True

    def _send(self) -> None:
        """Give the events of a step to the loop."""
        news: list[tuple[Generation, list[Event]]] = []
        for name, (handle, generation) in list(self._handles.items()):
            if handle.events:
                events = list(handle.events)
                handle.events.clear()
                news.append((generation, events))
            if handle.finish is not None:
                del self._handles[name]
        if news:
            self._tell(self._deliver, news)

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        """Have it called in the loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits
            self._handles.clear()

    def _deliver(self, news: list[tuple[Generation, list[Event]]]) -> None:
        now, unread = time.monotonic(), self._unread
        for generation, events in news:
            generation.take(events)
            if generation.expected_s is not None and any(isinstance(e, Token) for e in events):
                late_s = now - generation.submitted - generation.expected_s
                weight = SMOOTH if late_s > self._late_s else SMOOTH_DOWN
                self._late_s = max(0.0, self._late_s + weight * (late_s - self._late_s))
                generation.expected_s = None
            if generation.finish is not None:
                self._live.pop(generation.request.id, None)
                self._learn(generation)
        read = unread - self._unread
        if read > 0 and unread == self._unread_before:
            self._rate = _blend(self._rate, read / max(1e-4, now - self._delivered))
        self._delivered, self._unread_before = now, self._unread

    @property
    def _unread(self) -> int:
        """Prompt tokens that the engine has still to read."""
        return sum(
            one.unread
            for one in self._live.values()
            if one.began is not None and one.finish is None
        )

    def _learn(self, generation: Generation) -> None:
        """What a request takes, for the next prediction."""
        assert generation.finish is not None
        usage = generation.finish.usage
        if usage.generated_tokens:
            self._each_s = _blend(self._each_s, usage.prefill_s + usage.decode_s)


def _engine_ended() -> Refusal:
    return Refusal(503, "the engine has ended, the server has to be started again", "engine_ended")


def _nothing() -> None:
    pass


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTH * (new - old)


def _give(answer: "asyncio.Future[Any]", value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(answer: "asyncio.Future[Any]", error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
