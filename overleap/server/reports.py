"""Sums over the ledger: usage and cost beside price, a customer's balance and what is left.

Reads only. Not the entries' making (books.py), nor their look on a terminal (cli/accounts.py).
Read next: ledger.py.
"""

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from overleap.errors import RequestError
from overleap.server.auth import Customer
from overleap.server.books import MINUTE_US, periods
from overleap.server.database import Database, entries, keys, windows
from overleap.server.tiers import Tiers, money

Group = Literal["key", "user", "tier", "day"]
WIDTHS_S = {"1m": 60, "1h": 3600, "1d": 86400}
LONGEST_PAGE = {"1m": 1440, "1h": 168, "1d": 31}  # buckets of a page at most
_GROUPS: dict[str, sa.Column[Any]] = {
    "key": entries.c.key_id, "user": keys.c.user, "tier": entries.c.tier, "day": entries.c.day,
}  # fmt: skip
_SUMS = (
    "cache_hit_tokens cache_miss_tokens output_tokens machine_us "
    "charge cost_hardware cost_power cost_other"
).split()


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What settled requests used, cost and paid. Money in nano-units of the currency.

    group  the values that these requests share, by the names they were grouped by
    price  what the keys were charged
    """

    group: Mapping[str, str]
    requests: int
    cache_hit_tokens: int
    cache_miss_tokens: int
    output_tokens: int
    machine_s: float
    price: int
    cost_hardware: int
    cost_power: int
    cost_other: int

    @property
    def cost(self) -> int:
        """What they cost the operator."""
        return self.cost_hardware + self.cost_power + self.cost_other


@dataclass(frozen=True, kw_only=True)
class Query:
    """What of the ledger a report is about.

    start_s  requests that came in from then on, seconds since 1970
    end_s    and before then; None is now
    width    of a bucket: 1m, 1h or 1d
    by       what sums are divided by
    key_ids  of these keys only; of all where none is given
    limit    buckets of a page; None is up to 7
    """

    start_s: int
    end_s: int | None = None
    width: str = "1d"
    by: tuple[Group, ...] = ()
    key_ids: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Bucket:
    """A stretch of time and its sums."""

    start_s: int
    end_s: int
    sums: list[Sums]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a customer may still do now; None is no limit. Running requests are counted in full."""

    requests_this_minute: int | None
    requests_at_once: int | None
    tokens_today: int | None
    tokens_this_month: int | None
    balance: int


class Reports:
    """Reports over one ledger. Everything blocks for a query or two."""

    def __init__(
        self, database: Database, tiers: Tiers, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._tiers = tiers
        self._clock = clock

    def usage(
        self,
        by: Sequence[Group] = ("key", "tier", "day"),
        *,
        start_s: int = 0,
        end_s: int | None = None,
        key_ids: Sequence[str] = (),
    ) -> list[Sums]:
        """Sums of settled requests that came in from `start_s` to before `end_s`.

        key_ids  of these keys only; of all where none is given
        """
        with self._database.read() as connection:
            return _sums(connection, by, start_s, end_s, key_ids)

    def buckets(self, query: Query) -> tuple[list[Bucket], int | None]:
        """Sums in buckets of time, and where a next page starts.

        Raises RequestError for a width that is not 1m, 1h or 1d, a time that is none, or too many
        buckets.
        """
        if query.width not in WIDTHS_S:
            raise RequestError(
                f"bucket_width is {query.width!r}", f"it is one of {', '.join(WIDTHS_S)}"
            )
        step, longest = WIDTHS_S[query.width], LONGEST_PAGE[query.width]
        if query.limit is not None and not 1 <= query.limit <= longest:
            raise RequestError(f"limit is {query.limit}, for {query.width} it is 1 to {longest}")
        limit = min(longest, 7) if query.limit is None else query.limit
        end_s = int(self._clock()) + 1 if query.end_s is None else query.end_s
        if not 0 <= query.start_s <= end_s < 2**40:
            raise RequestError(
                f"from {query.start_s} to {end_s} is no time", "seconds since 1970, UTC"
            )
        starts = range(query.start_s - query.start_s % step, end_s, step)
        with self._database.read() as connection:
            found = [
                Bucket(
                    at,
                    at + step,
                    _sums(
                        connection,
                        query.by,
                        max(at, query.start_s),
                        min(at + step, end_s),
                        query.key_ids,
                    ),
                )
                for at in starts[:limit]
            ]
        return found, starts[limit] if len(starts) > limit else None

    def standing(self, customer: Customer) -> Standing:
        """What is left for a customer."""
        tier, now = customer.tier, int(self._clock() * 10**6)
        mine = entries.c.key_id == customer.key_id
        with self._database.read() as connection:
            recent = _count(connection, mine & (entries.c.created_us > now - MINUTE_US))
            running = _count(connection, mine & (entries.c.state == "open"))
            taken = [_taken(connection, customer.key_id, period) for period in periods(now)]
            balance = connection.scalar(
                sa.select(keys.c.credited - keys.c.charged - keys.c.reserved).where(
                    keys.c.id == customer.key_id
                )
            )
        return Standing(
            requests_this_minute=_left(tier.requests_per_minute, recent),
            requests_at_once=_left(tier.concurrent_requests, running),
            tokens_today=_left(tier.tokens_per_day, taken[0]),
            tokens_this_month=_left(tier.tokens_per_month, taken[1]),
            balance=int(balance or 0),
        )

    def balance(self, customer: Customer) -> dict[str, Any]:
        """GET /user/balance: whether requests are let in, and the balance in text."""
        standing = self.standing(customer)
        spent = customer.tier.prepaid and standing.balance <= 0
        total = money(standing.balance, 2)
        return {
            "is_available": not spent
            and 0 not in (standing.tokens_today, standing.tokens_this_month),
            "balance_infos": [
                {
                    "currency": self._tiers.currency,
                    "total_balance": total,
                    "granted_balance": money(0, 2),
                    "topped_up_balance": total,
                }
            ],
        }

    def organization_usage(self, query: Query) -> dict[str, Any]:
        """GET /v1/organization/usage/completions."""
        return _document(*self.buckets(query), _usage_result)

    def organization_costs(self, query: Query) -> dict[str, Any]:
        """GET /v1/organization/costs: what keys were charged, and beside it what it cost."""
        currency = self._tiers.currency.lower()

        def amount(nanos: int) -> dict[str, Any]:
            return {"value": float(money(nanos, 9)), "currency": currency}

        def result(sums: Sums) -> dict[str, Any]:
            return {
                "object": "organization.costs.result",
                "amount": amount(sums.price),
                "operator_cost": amount(sums.cost),
                **_names(sums),
            }

        return _document(*self.buckets(query), result)


def check_books(database: Database) -> list[str]:
    """Hold the running sums against the entries; a sentence for each that is wrong."""
    with database.read() as connection:
        return [*_wrong_keys(connection), *_wrong_windows(connection)]


def _wrong_keys(connection: Connection) -> Iterator[str]:
    is_open = entries.c.state == "open"
    found = connection.execute(
        sa.select(
            keys.c.id,
            keys.c.charged,
            keys.c.reserved,
            sa.func.coalesce(sa.func.sum(entries.c.charge), 0),
            sa.func.coalesce(sa.func.sum(sa.case((is_open, entries.c.reserved), else_=0)), 0),
        )
        .select_from(keys.outerjoin(entries))
        .group_by(keys.c.id, keys.c.charged, keys.c.reserved)
    )
    for name, charged, reserved, true_charged, true_reserved in found:
        if (charged, reserved) != (int(true_charged), int(true_reserved)):
            yield (
                f"key {name}: {charged} charged and {reserved} reserved, "
                f"its entries have {true_charged} and {true_reserved}"
            )


def _wrong_windows(connection: Connection) -> Iterator[str]:
    is_open = entries.c.state == "open"
    computed = entries.c.cache_miss_tokens + entries.c.output_tokens
    truth: dict[tuple[str, str], tuple[int, int]] = {}
    found = connection.execute(
        sa.select(
            entries.c.key_id,
            entries.c.day,
            sa.func.sum(computed),
            sa.func.sum(sa.case((is_open, entries.c.reserved_tokens), else_=0)),
        ).group_by(entries.c.key_id, entries.c.day)
    )
    for name, day, used, reserved in found:
        for period in (day, day[:7]):
            before = truth.get((name, period), (0, 0))
            truth[name, period] = (before[0] + int(used), before[1] + int(reserved))
    for window in connection.execute(sa.select(windows)):
        true = truth.pop((window.key_id, window.period), (0, 0))
        if (window.used, window.reserved) != true:
            yield (
                f"key {window.key_id}, {window.period}: {window.used} tokens used and "
                f"{window.reserved} reserved, its entries have {true[0]} and {true[1]}"
            )
    for name, period in truth:
        yield f"key {name}, {period}: entries without a sum"


def _sums(
    connection: Connection,
    by: Sequence[Group],
    start_s: int,
    end_s: int | None,
    key_ids: Sequence[str],
) -> list[Sums]:
    groups = [_GROUPS[name] for name in by]
    wanted = (entries.c.state == "settled") & (entries.c.created_us >= start_s * 10**6)
    if end_s is not None:
        wanted &= entries.c.created_us < end_s * 10**6
    if key_ids:
        wanted &= entries.c.key_id.in_(key_ids)
    totals = [sa.func.sum(entries.c[name]) for name in _SUMS]
    query = sa.select(*groups, sa.func.count(), *totals).select_from(entries.join(keys))
    rows = connection.execute(query.where(wanted).group_by(*groups).order_by(*groups))
    return [_row(by, tuple(row)) for row in rows if row[len(groups)]]


def _row(by: Sequence[Group], row: tuple[Any, ...]) -> Sums:
    count, hit, miss, output, machine, price, hardware, power, other = map(int, row[len(by) :])
    return Sums(
        group=dict(zip(by, map(str, row), strict=False)),
        requests=count,
        cache_hit_tokens=hit,
        cache_miss_tokens=miss,
        output_tokens=output,
        machine_s=machine / 10**6,
        price=price,
        cost_hardware=hardware,
        cost_power=power,
        cost_other=other,
    )


def _document(
    buckets: list[Bucket], after: int | None, result: Callable[[Sums], dict[str, Any]]
) -> dict[str, Any]:
    data = [
        {
            "object": "bucket",
            "start_time": bucket.start_s,
            "end_time": bucket.end_s,
            "results": [result(sums) for sums in bucket.sums],
        }
        for bucket in buckets
    ]
    next_page = None if after is None else str(after)
    return {"object": "page", "data": data, "has_more": after is not None, "next_page": next_page}


def _usage_result(sums: Sums) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sums.cache_hit_tokens + sums.cache_miss_tokens,
        "input_cached_tokens": sums.cache_hit_tokens,
        "output_tokens": sums.output_tokens,
        "num_model_requests": sums.requests,
        "machine_seconds": sums.machine_s,
        **_names(sums),
    }


def _names(sums: Sums) -> dict[str, str | None]:
    """The group as OpenAI names its parts; what was not grouped by is null."""
    group = sums.group
    return {
        "api_key_id": group.get("key"),
        "user_id": group.get("user"),
        "tier": group.get("tier"),
    }


def _count(connection: Connection, wanted: sa.ColumnElement[bool]) -> int:
    return int(
        connection.scalar(sa.select(sa.func.count()).select_from(entries).where(wanted)) or 0
    )


def _taken(connection: Connection, key_id: str, period: str) -> int:
    found = connection.scalar(
        sa.select(windows.c.used + windows.c.reserved).where(
            windows.c.key_id == key_id, windows.c.period == period
        )
    )
    return int(found or 0)


def _left(limit: int | None, taken: int) -> int | None:
    return None if limit is None else max(0, limit - taken)


def day_s(day: str) -> int:
    """The first second of a day like 2026-11-24, UTC. Raises RequestError."""
    try:
        moment = datetime.datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        raise RequestError(f"{day!r} is no day", "write it like 2026-11-24") from None
    return int(moment.timestamp())
