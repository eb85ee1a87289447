"""What a key may spend and what it spent: reserve before, settle after, refund what was not used.

Each of the three is one transaction, so the books are right after any crash. A reservation belongs
to an owner, a process that holds a lock as long as it lives; what a dead owner left open is
refunded by whoever looks next. Not who asks (auth.py), nor sums over time (reports.py). Read next:
books.py, the transactions.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from overleap.errors import LedgerError
from overleap.server.auth import Customer
from overleap.server.books import Books, Terms
from overleap.server.costs import CostModel
from overleap.server.database import Database
from overleap.server.usage import Usage

__all__ = ["Ledger", "Reservation", "Usage"]

PATIENCE_S = 8.0  # that a request waits for the ledger before it is refused
CLOSE_S = 4.0  # that closing waits for what was begun


@asynccontextmanager
async def patience() -> AsyncIterator[None]:
    """A block that waits for the database. Raises LedgerError where it takes too long."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield
    except TimeoutError:
        raise LedgerError(f"the ledger did not answer within {PATIENCE_S:.0f} s") from None


class Ledger:
    """The ledger of one serving process, among any number on one database.

    costs  what a busy second costs the operator; None books no costs
    clock  seconds since 1970

    All transactions run one after the other in a thread of their own, so that what was begun is
    done, whatever becomes of the coroutine that asked for it. Raises LedgerError where the
    database cannot be used.
    """

    def __init__(
        self,
        database: Database,
        *,
        costs: CostModel | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._closed = False
        self._books = Books(database, costs, clock)
        try:
            self.refunded_at_start = self._thread.submit(self._books.open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was begun and refund what is still open. Twice is harmless.

        Where the database keeps it waiting, what is left open is for the next owner to refund.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._thread.submit(self._books.close).result(CLOSE_S)
        except TimeoutError:
            raise LedgerError(f"the ledger did not close within {CLOSE_S:.0f} s") from None
        finally:  # where it was late, nothing that waits in line is begun any more
            self._thread.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def reserve(
        self,
        customer: Customer,
        prompt_tokens: int,
        max_output_tokens: int,
        request_id: str | None = None,
        *,
        longest_tokens: int | None = None,
    ) -> AsyncIterator["Reservation"]:
        """Set aside the most a request can use; give back the rest when it ends.

        max_output_tokens  of all answers together
        request_id         names the entry in the ledger; unique, drawn where not given
        longest_tokens     prompt and answer that are longest together; not given, they are all
                           one text

        Raises AccessError for a longer text than the tier's context, RateError for too many
        requests a minute or at once, QuotaError where a day's or month's tokens or a prepaid
        balance do not cover it, AuthError for a key that was revoked meanwhile, LedgerError where
        the database does not let it in within PATIENCE_S.
        """
        terms = Terms(
            request_id or uuid.uuid4().hex,
            customer,
            prompt_tokens,
            max_output_tokens,
            longest_tokens or prompt_tokens + max_output_tokens,
        )
        reserving = self._thread.submit(self._books.reserve, terms)
        try:
            async with patience():
                await asyncio.shield(asyncio.wrap_future(reserving))
        except BaseException:
            # A transaction that was begun goes through regardless; this one runs after it.
            if not reserving.cancel():
                self._thread.submit(self._undo, reserving, terms)
            raise
        reservation = Reservation(terms, self)
        try:
            yield reservation
        finally:
            await reservation._leave()

    def _undo(self, reserving: "Future[None]", terms: Terms) -> None:
        if reserving.exception() is None:
            self._books.settle(terms, Usage())


@dataclass(eq=False)
class Reservation:
    """A request that was let in. What was noted is charged if it is left without being settled."""

    terms: Terms
    _ledger: Ledger
    _used: Usage = field(default_factory=Usage)
    _closing: "Future[None] | None" = None

    @property
    def id(self) -> str:
        """Its entry in the ledger."""
        return self.terms.id

    def note(self, usage: Usage) -> None:
        """What it has used so far; costs nothing, so call it as often as there is news."""
        assert self._closing is None and self.terms.cover(usage), (self.terms, usage)
        self._used = usage

    async def settle(self, usage: Usage) -> None:
        """Charge what was used and give back the rest, for good; twice with the same is harmless.

        When this returns it is on disk: only now may the client be told what was used. Raises
        LedgerError where others found this process dead meanwhile and refunded all of it.
        """
        if self._closing is None:
            self.note(usage)
        assert usage == self._used, (usage, self._used)
        await self._leave()

    async def _leave(self) -> None:
        if self._closing is None:
            ledger, terms, usage = self._ledger, self.terms, self._used
            self._closing = ledger._thread.submit(ledger._books.settle, terms, usage)
        await asyncio.shield(asyncio.wrap_future(self._closing))
