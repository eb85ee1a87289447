"""The transactions of the ledger: reserve, settle, and refunds for owners that died.

They run in one thread, on one connection, which on PostgreSQL also holds the owner's lock. Not
asynchronous (ledger.py), not where tables are declared (database.py). Read next: ledger.py.

Invariants, held by every transaction and checked by reports.check_books:
  keys.charged      charge of all entries of the key
  keys.reserved     reserved of its open entries
  windows.used      computed tokens of its entries of that day or month
  windows.reserved  reserved_tokens of the open ones among them
"""

import datetime
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from overleap.errors import (
    AccessError,
    AuthError,
    LedgerError,
    QuotaError,
    RateError,
    RequestError,
)
from overleap.server.auth import Customer, shown
from overleap.server.costs import Cost, CostModel
from overleap.server.database import Database, entries, keys, owners, windows
from overleap.server.tiers import money
from overleap.server.usage import Usage

MINUTE_US = 60 * 10**6
RECOVER_EVERY_S = 1.0  # a refusal looks for dead owners at most so often

_Result = TypeVar("_Result")
_Work = Callable[[Connection], _Result]


@dataclass(frozen=True)
class Terms:
    """What a request was let in on. Worst case: nothing of the prompt is in a cache."""

    id: str
    customer: Customer
    prompt_tokens: int
    max_output_tokens: int
    longest_tokens: int

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 0 and self.max_output_tokens >= 0, self

    @property
    def tokens(self) -> int:
        """The most that may count against a quota."""
        return self.prompt_tokens + self.max_output_tokens

    @property
    def charge(self) -> int:
        """The most it may cost, in nano-units."""
        return self.customer.tier.price.worst(self.prompt_tokens, self.max_output_tokens)

    def cover(self, usage: Usage) -> bool:
        """Whether it is no more than was reserved."""
        return (
            usage.prompt_tokens <= self.prompt_tokens
            and usage.output_tokens <= self.max_output_tokens
        )


class Books:
    """One owner's hand in the database. `open` first, `close` last, all from one thread."""

    def __init__(
        self, database: Database, costs: CostModel | None, clock: Callable[[], float]
    ) -> None:
        self._database = database
        self._costs = costs
        self._clock = clock
        self._connection: Connection | None = None
        self._owner = 0
        self._release: Callable[[], None] = _nothing
        self._open: set[str] = set()  # entries of ours
        self._owed: dict[str, Terms] = {}  # of them, those that could not be closed
        self._looked = float("-inf")
        self._again = False  # True while work is done a second time

    def open(self) -> int:
        """Become an owner. Returns how many entries of dead owners were refunded."""
        with self._database.reporting("opened"):
            self._connected()
            return self.recover()

    def close(self) -> None:
        """Refund what is open and stop being an owner."""
        with suppress(LedgerError), self._database.reporting("closed"):
            self._run(self._resign)  # refunds what is owed, too
        self._disconnect()

    def reserve(self, terms: Terms) -> None:
        """Let a request in, or raise as Ledger.reserve says."""
        limit, tier = terms.customer.tier.context_tokens, terms.customer.tier
        if limit is not None and terms.longest_tokens > limit:
            raise AccessError(
                f"the longest text may have {terms.longest_tokens} tokens, the tier {tier.name!r} "
                f"has a context of {limit}",
                "shorten the prompt or lower max_tokens",
            )
        if terms.id in self._open:
            raise _twice(terms)
        self._refund_owed()
        self._open.add(terms.id)  # before, so that a new owner takes it over
        with self._database.reporting("written"):
            try:
                try:
                    self._run(lambda connection: self._reserve(connection, terms))
                except (RateError, QuotaError):
                    # What is in the way may be what a process that died had reserved.
                    if time.monotonic() - self._looked < RECOVER_EVERY_S or not self.recover():
                        raise
                    self._run(lambda connection: self._reserve(connection, terms))
            except BaseException:
                self._open.discard(terms.id)
                raise

    def settle(self, terms: Terms, usage: Usage) -> None:
        """Charge `usage` and give back the rest; nothing used is a refund.

        Where that fails, nothing is charged: the entry is refunded once the database is there.
        """
        self._owed[terms.id] = terms
        with self._database.reporting("written"):
            self._run(lambda connection: self._settle(connection, terms, usage))
        del self._owed[terms.id]
        self._open.discard(terms.id)
        self._refund_owed()

    def _refund_owed(self) -> None:
        for name, terms in list(self._owed.items()):
            try:
                with self._database.reporting("written"):
                    self._run(partial(self._settle, terms=terms, usage=Usage()))
            except LedgerError:
                return  # next time
            del self._owed[name]
            self._open.discard(name)

    def recover(self) -> int:
        """Refund what dead owners left open. Returns how many entries that were."""
        self._looked = time.monotonic()
        found = self._run(self._others)
        return sum(self._run(partial(self._bury, owner=owner)) for owner in found)

    def _others(self, connection: Connection) -> list[int]:
        others = connection.scalars(sa.select(owners.c.id).where(owners.c.id != self._owner))
        return list(others.all())

    # Connections and owners.

    def _run(self, work: _Work[_Result]) -> _Result:
        """Do it in one transaction, and once more if the connection was lost: all work of ours
        comes to the same when it is done twice."""
        try:
            with self._connected().begin():
                return work(self._connected())
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
        self._disconnect()
        self._again = True
        try:
            with self._connected().begin():
                return work(self._connected())
        finally:
            self._again = False

    def _connected(self) -> Connection:
        """The connection; a new one makes us a new owner, who takes over what we had open."""
        if self._connection is not None and self._connection.invalidated:
            # It would silently connect anew, without the lock that shows that we live.
            self._disconnect()
        if self._connection is None:
            connection = self._database.engine.connect()
            try:
                owner = secrets.randbelow(2**31 - 1) + 1
                self._release = self._database.take_lock(owner, connection)
                with connection.begin():
                    row = {"id": owner, "started_us": self._now_us()}
                    connection.execute(owners.insert().values(row))
                    connection.execute(
                        entries.update()
                        .where(entries.c.id.in_(self._open), entries.c.state == "open")
                        .values(owner=owner)
                    )
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
            self._connection, self._owner = connection, owner
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            # Not back to a pool: on PostgreSQL the lock lives as long as the connection.
            self._connection.invalidate()
            self._connection.close()
            self._connection = None
        self._release()
        self._release = _nothing

    def _resign(self, connection: Connection) -> None:
        self._refund_all(connection, self._owner)
        connection.execute(owners.delete().where(owners.c.id == self._owner))

    def _bury(self, connection: Connection, owner: int) -> int:
        """Refund what an owner left open, if it is dead."""
        if not self._database.is_dead(owner, connection):
            return 0
        refunded = self._refund_all(connection, owner)
        connection.execute(owners.delete().where(owners.c.id == owner))
        self._database.forget_lock(owner)
        return refunded

    def _refund_all(self, connection: Connection, owner: int) -> int:
        left = (entries.c.owner == owner) & (entries.c.state == "open")
        holders = connection.scalars(sa.select(entries.c.key_id).where(left).distinct())
        for key_id in sorted(holders.all()):  # everybody locks keys first, and in this order
            _locked_key(connection, key_id)
        found = connection.execute(sa.select(entries).where(left).with_for_update()).all()
        for entry in found:
            self._book(connection, entry, Usage())
        return len(found)

    # The transactions themselves.

    def _reserve(self, connection: Connection, terms: Terms) -> None:
        customer, now = terms.customer, self._now_us()
        key = _locked_key(connection, customer.key_id)
        if key is None or key.revoked_us is not None:
            raise AuthError(f"the API key {shown(customer.key_id)} was revoked")
        there = connection.execute(sa.select(entries).where(entries.c.id == terms.id)).first()
        if there is not None:
            if self._again and there.owner == self._owner and there.state == "open":
                return  # our own, from before the connection was lost
            raise _twice(terms)
        _check_rates(connection, customer, now)
        day, month = periods(now)
        tier = customer.tier
        for period, limit in ((day, tier.tokens_per_day), (month, tier.tokens_per_month)):
            row = {"key_id": customer.key_id, "period": period, "used": 0, "reserved": 0}
            self._database.insert_missing(connection, windows, row)
            window = connection.execute(_window(customer.key_id, period)).one()
            if limit is not None:
                _check_quota(terms, period, limit, window)
            connection.execute(
                windows.update()
                .where(windows.c.key_id == customer.key_id, windows.c.period == period)
                .values(reserved=windows.c.reserved + terms.tokens)
            )
        if tier.prepaid:
            _check_balance(terms, key)
        connection.execute(
            keys.update()
            .where(keys.c.id == customer.key_id)
            .values(reserved=keys.c.reserved + terms.charge)
        )
        connection.execute(entries.insert().values(self._entry(terms, day, now)))

    def _settle(self, connection: Connection, terms: Terms, usage: Usage) -> None:
        _locked_key(connection, terms.customer.key_id)
        found = sa.select(entries).where(entries.c.id == terms.id).with_for_update()
        entry = connection.execute(found).first()
        if entry is None:
            return  # a reservation that was refused, and whose coroutine was cancelled meanwhile
        if entry.state == "open":
            self._book(connection, entry, usage)
        elif usage != Usage() and _booked(entry) != _counts(usage):
            raise LedgerError(
                f"the request {terms.id} was refunded meanwhile: the ledger lost sight of this "
                "process",
                "its usage is not charged; the answer is to end with an error",
            )

    def _book(self, connection: Connection, entry: Row[tuple[object, ...]], usage: Usage) -> None:
        """Close an open entry, and bring its key and windows along."""
        charge = (
            entry.price_cache_hit * usage.cache_hit_tokens
            + entry.price_cache_miss * usage.cache_miss_tokens
            + entry.price_output * usage.output_tokens
        )
        cost = Cost() if self._costs is None else self._costs.of(usage.machine_us)
        connection.execute(
            entries.update()
            .where(entries.c.id == entry.id)
            .values(
                state="refunded" if usage == Usage() else "settled",
                closed_us=self._now_us(),
                cache_hit_tokens=usage.cache_hit_tokens,
                cache_miss_tokens=usage.cache_miss_tokens,
                output_tokens=usage.output_tokens,
                machine_us=usage.machine_us,
                charge=charge,
                cost_hardware=cost.hardware,
                cost_power=cost.power,
                cost_other=cost.other,
            )
        )
        connection.execute(
            keys.update()
            .where(keys.c.id == entry.key_id)
            .values(charged=keys.c.charged + charge, reserved=keys.c.reserved - entry.reserved)
        )
        connection.execute(
            windows.update()
            .where(
                windows.c.key_id == entry.key_id, windows.c.period.in_(periods(entry.created_us))
            )
            .values(
                used=windows.c.used + usage.computed_tokens,
                reserved=windows.c.reserved - entry.reserved_tokens,
            )
        )

    def _entry(self, terms: Terms, day: str, now: int) -> dict[str, object]:
        price = terms.customer.tier.price
        return {
            "id": terms.id,
            "key_id": terms.customer.key_id,
            "tier": terms.customer.tier.name,
            "owner": self._owner,
            "state": "open",
            "day": day,
            "created_us": now,
            "reserved_tokens": terms.tokens,
            "reserved": terms.charge,
            "price_cache_hit": price.cache_hit,
            "price_cache_miss": price.cache_miss,
            "price_output": price.output,
            **dict.fromkeys(_FILLED_LATER, 0),
        }

    def _now_us(self) -> int:
        return int(self._clock() * 10**6)


_FILLED_LATER = (
    "cache_hit_tokens cache_miss_tokens output_tokens machine_us charge "
    "cost_hardware cost_power cost_other"
).split()


def _twice(terms: Terms) -> RequestError:
    return RequestError(f"a request with the id {terms.id!r} is in the ledger already")


def _nothing() -> None:
    pass


def _locked_key(connection: Connection, key_id: str) -> Row[tuple[object, ...]] | None:
    """The key's row, which nobody else changes until the transaction ends."""
    return connection.execute(sa.select(keys).where(keys.c.id == key_id).with_for_update()).first()


def _window(key_id: str, period: str) -> sa.Select[tuple[object, ...]]:
    return sa.select(windows).where(windows.c.key_id == key_id, windows.c.period == period)


def _booked(entry: Row[tuple[object, ...]]) -> tuple[object, ...]:
    counts = (entry.cache_hit_tokens, entry.cache_miss_tokens, entry.output_tokens)
    return (*counts, entry.machine_us)


def _counts(usage: Usage) -> tuple[object, ...]:
    counts = (usage.cache_hit_tokens, usage.cache_miss_tokens, usage.output_tokens)
    return (*counts, usage.machine_us)


def periods(time_us: int) -> tuple[str, str]:
    """The day and the month of a moment, UTC."""
    moment = datetime.datetime.fromtimestamp(time_us // 10**6, datetime.UTC)
    return moment.strftime("%Y-%m-%d"), moment.strftime("%Y-%m")


def _check_rates(connection: Connection, customer: Customer, now: int) -> None:
    tier = customer.tier
    if tier.requests_per_minute is not None:
        # The request that must be a minute old before another one fits.
        nth = connection.scalar(
            sa.select(entries.c.created_us)
            .where(entries.c.key_id == customer.key_id, entries.c.created_us > now - MINUTE_US)
            .order_by(entries.c.created_us.desc())
            .offset(tier.requests_per_minute - 1)
            .limit(1)
        )
        if nth is not None:
            wait_s = max(1, min(60, -((now - nth - MINUTE_US) // 10**6)))
            raise RateError(
                f"{tier.requests_per_minute} requests a minute are allowed on the tier "
                f"{tier.name!r}, the next one in {wait_s} s",
                retry_after_s=wait_s,
            )
    if tier.concurrent_requests is not None:
        running = connection.scalar(
            sa.select(sa.func.count())
            .select_from(entries)
            .where(entries.c.key_id == customer.key_id, entries.c.state == "open")
        )
        if int(running or 0) >= tier.concurrent_requests:
            raise RateError(
                f"{running} requests are running, the tier {tier.name!r} allows "
                f"{tier.concurrent_requests} at once",
                retry_after_s=1,
            )


def _check_quota(terms: Terms, period: str, limit: int, window: Row[tuple[object, ...]]) -> None:
    left = limit - window.used - window.reserved
    if terms.tokens <= left:
        return
    name = "month" if len(period) == 7 else "day"
    open_now = f" ({window.reserved} more are reserved by running requests)"
    raise QuotaError(
        f"the request may take {terms.tokens} tokens, {max(0, left)} of {limit} a {name} are left"
        + (open_now if window.reserved else ""),
        f"lower max_tokens, or wait for the next {name} (UTC)",
    )


def _check_balance(terms: Terms, key: Row[tuple[object, ...]]) -> None:
    left = key.credited - key.charged - key.reserved
    if terms.charge > left:
        raise QuotaError(
            f"the request may cost {money(terms.charge)}, the balance is {money(left)}",
            "`overleap keys credit` adds to it",
        )
