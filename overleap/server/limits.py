"""What one customer may take of what all share: the queue, and the threads that read texts.

Not what a key may spend (ledger.py), nor whose turn it is in the engine (engine/scheduler.py).
Read next: bridge.py, turns.py.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from overleap.engine.request import Request
from overleap.errors import RateError
from overleap.server.auth import Customer
from overleap.server.refusals import overloaded

MINUTE_S = 60.0


@dataclass(frozen=True)
class Promised:
    """What was let in and is not submitted yet: by flow, requests and tokens of their prompts."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def held(self, flow: str, requests: int, tokens: int) -> Iterator[None]:
        """A block inside which these are counted."""
        self.requests[flow] += requests
        self.tokens[flow] += tokens
        try:
            yield
        finally:
            for counts, count in ((self.requests, requests), (self.tokens, tokens)):
                counts[flow] -= count
                if not counts[flow]:
                    del counts[flow]


class There(Protocol):
    """A request in the queue or in the engine.

    unread  tokens of its prompt still to be read; began: None while it waits
    """

    request: Request
    began: float | None

    @property
    def unread(self) -> int: ...


def ahead(
    there: Iterable[There], flow: str, weight: float, tokens: int, requests: int
) -> tuple[float, float]:
    """What goes before the last of a flow's prompts: (tokens to be read, requests that wait).

    tokens    of that prompt and what else is on its way; requests: those
    weight    what the flow is due beside others

    All of its own flow goes before, and of the others what their weight lets them have meanwhile:
    each request that runs, as it has its share of every step, and each flow that waits.
    """
    others = list[There]()
    for one in there:
        if one.request.flow == flow:
            tokens += one.unread
            requests += one.began is None
        else:
            others.append(one)
    before, waiting = float(tokens), float(requests)
    unread, queued = Counter[tuple[str, float]](), Counter[tuple[str, float]]()
    for one in others:
        due = one.request.weight / weight
        if one.began is not None:
            before += min(one.unread, tokens * due)
        else:
            unread[one.request.flow, due] += one.unread
            queued[one.request.flow, due] += 1
    before += sum(min(count, tokens * due) for (_, due), count in unread.items())
    waiting += sum(min(count, requests * due) for (_, due), count in queued.items())
    return before, waiting


def check_share(own: int, free: int, what: str, retry_after_s: float) -> None:
    """Raise Refusal (503) where a flow would have more than it leaves free.

    own, free  what it would have, and what others could still have; what: of requests or tokens

    So one flow alone may have half, two a third each, and there is always some left for the next.
    """
    if own > free:
        raise overloaded(
            f"this user would have {own} {what} here and leave {max(0, free)} to others, who are "
            "to have as many",
            retry_after_s,
        )


class Limits:
    """Whose texts are read. Belongs to the loop.

    clock  seconds that only go forward

    Rates are kept here in memory, for this process, so that a text is not read for a request that
    is over them; the ledger counts what is let in, for all processes (books.py).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._came: dict[str, deque[float]] = {}  # by key: the latest requests, as many as allowed
        self._here = Counter[str]()  # by key: requests whose texts are read or wait for that
        self._alone: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by flow

    @asynccontextmanager
    async def reading(self, customer: Customer, running: int | None) -> AsyncIterator[None]:
        """A block that reads a text: one at a time of a user. Requests without one share freely.

        running  requests of the key in the engine; None for a text that no request comes of

        Raises RateError for more requests a minute or at once than the key's tier allows.
        """
        key, counts = customer.key_id, running is not None
        if running is not None:
            self._check(customer, running + self._here[key])
        self._here[key] += counts
        try:
            if not customer.flow:
                yield
                return
            # Kept as long as somebody holds it or waits for it.
            alone = self._alone.setdefault(customer.flow, asyncio.Lock())
            async with alone:
                yield
        finally:
            self._here[key] -= counts
            if not self._here[key]:
                del self._here[key]

    def _check(self, customer: Customer, at_once: int) -> None:
        tier, now = customer.tier, self._clock()
        if tier.concurrent_requests is not None and at_once >= tier.concurrent_requests:
            raise RateError(
                f"{at_once} requests are running, the tier {tier.name!r} allows "
                f"{tier.concurrent_requests} at once",
                retry_after_s=1,
            )
        most = tier.requests_per_minute
        if most is None:
            return
        came = self._came.setdefault(customer.key_id, deque(maxlen=most))
        if len(came) == most and now < came[0] + MINUTE_S:
            wait_s = math.ceil(came[0] + MINUTE_S - now)
            raise RateError(
                f"{most} requests a minute are allowed on the tier {tier.name!r}, the next one in "
                f"{wait_s} s",
                retry_after_s=wait_s,
            )
        came.append(now)
