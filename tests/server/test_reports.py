"""Reports: sums by key, user, tier and day, buckets of time, balances, the check of the books."""

import datetime
import random
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from overleap.errors import RequestError
from overleap.server.auth import Customer
from overleap.server.costs import CostModel, load_costs
from overleap.server.database import Database, entries, keys, windows
from overleap.server.ledger import Ledger, Usage
from overleap.server.reports import Query, Reports, Standing, check_books, day_s
from tests.server.accounts import PRICE, Clock, customer_of, spend, tiers_of, usage_within

NOON = int(datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC).timestamp())
COSTS: CostModel = load_costs()


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def ledger(database: Database, clock: Clock) -> Iterator[Ledger]:
    with Ledger(database, costs=COSTS, clock=clock) as opened:
        yield opened


@pytest.fixture
def reports(database: Database, clock: Clock) -> Reports:
    return Reports(database, tiers_of(), clock=clock)


def price_of(usage: Usage) -> int:
    return PRICE.of(usage.cache_hit_tokens, usage.cache_miss_tokens, usage.output_tokens)


def test_sums_are_those_of_the_requests(
    database: Database, ledger: Ledger, reports: Reports, clock: Clock, seed: int
) -> None:
    draw = random.Random(seed)
    customers = [customer_of(database, user) for user in ("alice", "alice", "bob")]
    made: list[tuple[Customer, str, Usage]] = []
    for _ in range(40):
        clock.now = NOON + draw.randrange(3) * 86400
        day = datetime.datetime.fromtimestamp(clock.now, datetime.UTC).strftime("%Y-%m-%d")
        usage = usage_within(draw, draw.randint(1, 999), draw.randint(1, 99))
        made.append((draw.choice(customers), day, usage))
        spend(ledger, made[-1][0], usage)
    for by, name in {
        ("key", "tier", "day"): lambda c, day: (c.key_id, "test", day),
        ("user",): lambda c, day: (c.user,),
        ("day", "user"): lambda c, day: (day, c.user),
        (): lambda c, day: (),
    }.items():
        expected: dict[tuple[str, ...], list[Usage]] = {}
        for customer, day, usage in made:
            expected.setdefault(name(customer, day), []).append(usage)
        found = {tuple(sums.group.values()): sums for sums in reports.usage(by)}
        assert found.keys() == expected.keys()
        for group, usages in expected.items():
            sums = found[group]
            assert sums.requests == len(usages)
            assert sums.cache_hit_tokens == sum(u.cache_hit_tokens for u in usages)
            assert sums.cache_miss_tokens == sum(u.cache_miss_tokens for u in usages)
            assert sums.output_tokens == sum(u.output_tokens for u in usages)
            assert round(sums.machine_s * 10**6) == sum(u.machine_us for u in usages)
            assert sums.price == sum(map(price_of, usages))
            assert sums.cost == sum(COSTS.of(u.machine_us).total for u in usages)
    mine = reports.usage((), key_ids=(customers[0].key_id,))
    count = sum(customer is customers[0] for customer, _, _ in made)
    assert sum(sums.requests for sums in mine) == count
    first = reports.usage((), start_s=day_s("2026-11-24"), end_s=day_s("2026-11-25"))
    assert sum(s.requests for s in first) == sum(day == "2026-11-24" for _, day, _ in made)


def test_refunds_and_open_requests_are_not_usage(
    database: Database, ledger: Ledger, reports: Reports
) -> None:
    customer = customer_of(database)
    spend(ledger, customer, Usage())
    assert reports.usage() == []


def test_buckets(database: Database, ledger: Ledger, reports: Reports, clock: Clock) -> None:
    customer = customer_of(database)
    for hour in (0, 1, 1, 5):
        clock.now = NOON + 3600 * hour + 7
        spend(ledger, customer, Usage(cache_hit_tokens=10, cache_miss_tokens=1, output_tokens=2))
    query = Query(start_s=NOON, end_s=NOON + 6 * 3600, width="1h", by=("key",), limit=4)
    page = reports.organization_usage(query)
    assert page["object"] == "page" and page["has_more"]
    assert page["next_page"] == str(NOON + 4 * 3600)
    counts = [sum(r["num_model_requests"] for r in b["results"]) for b in page["data"]]
    assert counts == [1, 2, 0, 0]
    assert page["data"][1]["results"] == [
        {
            "object": "organization.usage.completions.result",
            "input_tokens": 22,
            "input_cached_tokens": 20,
            "output_tokens": 4,
            "num_model_requests": 2,
            "machine_seconds": 0.0,
            "api_key_id": customer.key_id,
            "user_id": None,
            "tier": None,
        }
    ]
    rest = reports.organization_usage(
        Query(start_s=int(page["next_page"]), width="1h", by=("key",))
    )
    assert not rest["has_more"] and rest["next_page"] is None
    assert [len(bucket["results"]) for bucket in rest["data"]] == [0, 1]
    (day,) = reports.organization_costs(Query(start_s=NOON))["data"]
    assert (day["start_time"], day["end_time"]) == (day_s("2026-11-24"), day_s("2026-11-25"))
    (costs,) = day["results"]
    assert costs["amount"] == {"value": 4 * PRICE.of(10, 1, 2) / 10**9, "currency": "usd"}
    assert costs["operator_cost"]["value"] == 0


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (Query(start_s=0, width="1w"), "bucket_width"),
        (Query(start_s=-1), "no time"),
        (Query(start_s=5, end_s=4), "no time"),
        (Query(start_s=0, end_s=2**62), "no time"),
        (Query(start_s=0, limit=0), "from|1 to 31"),
        (Query(start_s=0, width="1h", limit=169), "1 to 168"),
    ],
)
def test_queries_that_are_refused(reports: Reports, query: Query, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        reports.buckets(query)


def test_days_that_are_none() -> None:
    assert day_s("1970-01-02") == 86400
    for day in ("2026-02-30", "yesterday", "2026-1", ""):
        with pytest.raises(RequestError, match="no day"):
            day_s(day)


def test_what_is_left(database: Database, ledger: Ledger, reports: Reports) -> None:
    limits: dict[str, Any] = {
        "requests_per_minute": 2, "concurrent_requests": 3,
        "tokens_per_day": 100, "tokens_per_month": 1000,
    }  # fmt: skip
    customer = customer_of(database, credit=10**10, **limits)
    usage = Usage(cache_hit_tokens=50, cache_miss_tokens=10, output_tokens=5)
    spend(ledger, customer, usage)
    left = 10**10 - price_of(usage)
    assert reports.standing(customer) == Standing(
        requests_this_minute=1,
        requests_at_once=3,
        tokens_today=85,
        tokens_this_month=985,
        balance=left,
    )
    info = reports.balance(customer)
    assert info["is_available"] and info["balance_infos"] == [
        {
            "currency": "USD",
            "total_balance": "10.00",
            "granted_balance": "0.00",
            "topped_up_balance": "10.00",
        }
    ]
    spend(ledger, customer, Usage(cache_miss_tokens=85))
    assert not reports.balance(customer)["is_available"]
    poor = customer_of(database, prepaid=True)
    assert not reports.balance(poor)["is_available"]


@pytest.mark.parametrize(
    ("table", "column"),
    [(keys, "charged"), (keys, "reserved"), (windows, "used"), (windows, "reserved")],
)
def test_wrong_books_are_seen(
    database: Database, ledger: Ledger, table: sa.Table, column: str
) -> None:
    spend(ledger, customer_of(database), Usage(cache_miss_tokens=10, output_tokens=5))
    assert check_books(database) == []
    with database.write() as connection:
        connection.execute(table.update().values({column: table.c[column] + 1}))
    assert len(check_books(database)) == (1 if table is keys else 2)


def test_an_entry_without_its_sum_is_seen(database: Database, ledger: Ledger) -> None:
    spend(ledger, customer_of(database), Usage(cache_miss_tokens=10, output_tokens=5))
    with database.write() as connection:
        connection.execute(windows.delete())
        connection.execute(entries.update().values(charge=entries.c.charge - 1))
    assert len(check_books(database)) == 3
