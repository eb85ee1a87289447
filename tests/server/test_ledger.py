"""One process on the ledger: reserve, settle, refund, every limit, and what cancels leave behind.

Many processes: test_ledger_race.py, test_ledger_crash.py. At random: test_ledger_model.py.
"""

import asyncio
import datetime
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from overleap.errors import (
    AccessError,
    AuthError,
    LedgerError,
    QuotaError,
    RateError,
    RequestError,
)
from overleap.server.auth import Customer, credit_key, revoke_key
from overleap.server.costs import load_costs
from overleap.server.database import Database, entries, keys, owners, windows
from overleap.server.ledger import Ledger, Usage
from overleap.server.reports import check_books
from tests.server.accounts import PRICE, Clock, crash, customer_of, request, spend, usage_within

NOON = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC).timestamp()
SOME = Usage(cache_hit_tokens=100, cache_miss_tokens=28, output_tokens=10, machine_s=0.25)


@pytest.fixture
def clock() -> Clock:
    return Clock(NOON)


@pytest.fixture
def ledger(database: Database, clock: Clock) -> Iterator[Ledger]:
    with Ledger(database, costs=load_costs(), clock=clock) as opened:
        yield opened
    assert check_books(database) == []


def entry_of(database: Database) -> Any:
    with database.read() as connection:
        return connection.execute(sa.select(entries)).one()


def sums_of(database: Database, customer: Customer) -> tuple[int, int, int, int]:
    """charged, reserved, and of the day: used, reserved tokens."""
    with database.read() as connection:
        key = connection.execute(sa.select(keys).where(keys.c.id == customer.key_id)).one()
        query = sa.select(windows).where(windows.c.key_id == customer.key_id)
        rows = {(row.used, row.reserved) for row in connection.execute(query)}
    assert len(rows) == 1, "day and month differ"
    return (key.charged, key.reserved, *rows.pop())


def test_reserve_then_settle(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database)

    async def run() -> None:
        async with ledger.reserve(customer, 1000, 50, "mine") as reservation:
            assert reservation.id == "mine"
            worst = PRICE.worst(1000, 50)
            assert sums_of(database, customer) == (0, worst, 0, 1050)
            await reservation.settle(SOME)
            assert sums_of(database, customer) == (PRICE.of(100, 28, 10), 0, 38, 0)
            await reservation.settle(SOME)  # harmless
            with pytest.raises(AssertionError):
                await reservation.settle(replace(SOME, output_tokens=11))

    asyncio.run(run())
    entry = entry_of(database)
    cost = load_costs().of(250_000)
    assert (entry.state, entry.day, entry.machine_us) == ("settled", "2026-11-24", 250_000)
    assert (entry.cost_hardware, entry.cost_power, entry.cost_other) == (
        cost.hardware,
        cost.power,
        cost.other,
    )
    assert entry.charge == PRICE.of(100, 28, 10) and entry.closed_us == NOON * 10**6


def test_leaving_without_settling(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database)

    async def leave(used: Usage | None, error: type[Exception] | None) -> None:
        async with ledger.reserve(customer, 1000, 50) as reservation:
            if used is not None:
                reservation.note(used)
            if error is not None:
                raise error

    asyncio.run(leave(None, None))
    assert sums_of(database, customer) == (0, 0, 0, 0)
    assert entry_of(database).state == "refunded"
    with pytest.raises(ZeroDivisionError):
        asyncio.run(leave(SOME, ZeroDivisionError))
    assert sums_of(database, customer) == (PRICE.of(100, 28, 10), 0, 38, 0)


def test_more_than_was_reserved_is_our_mistake(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database)

    async def run(usage: Usage) -> None:
        async with ledger.reserve(customer, 100, 5) as reservation:
            with pytest.raises(AssertionError):
                await reservation.settle(usage)

    asyncio.run(run(Usage(cache_hit_tokens=50, cache_miss_tokens=51)))
    asyncio.run(run(Usage(output_tokens=6)))
    assert sums_of(database, customer) == (0, 0, 0, 0)


# Limits.


def test_requests_a_minute(database: Database, ledger: Ledger, clock: Clock) -> None:
    customer = customer_of(database, requests_per_minute=3)
    for second in (0, 10, 20):
        clock.now = NOON + second
        spend(ledger, customer, SOME)
    for second, wait in ((20, 40), (30, 30), (59.5, 1)):
        clock.now = NOON + second
        with pytest.raises(RateError, match="3 requests a minute") as raised:
            spend(ledger, customer, SOME)
        assert raised.value.retry_after_s == wait
    clock.now = NOON + 60
    spend(ledger, customer, SOME)
    with pytest.raises(RateError):
        spend(ledger, customer, SOME)
    other = customer_of(database, requests_per_minute=3)
    spend(ledger, other, SOME)


def test_requests_at_once(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database, concurrent_requests=2)

    async def run() -> None:
        async with ledger.reserve(customer, 10, 1), ledger.reserve(customer, 10, 1):
            with pytest.raises(RateError, match="2 requests are running") as raised:
                await request(ledger, customer, SOME)
            assert raised.value.retry_after_s >= 1
        await request(ledger, customer, SOME)

    asyncio.run(run())


@pytest.mark.parametrize("period", ["day", "month"])
def test_tokens_of_a_period(database: Database, ledger: Ledger, clock: Clock, period: str) -> None:
    customer = customer_of(database, **{f"tokens_per_{period}": 100})
    spend(ledger, customer, Usage(cache_hit_tokens=10, cache_miss_tokens=40, output_tokens=10))
    # Hits are free of quota but may turn out to be misses: 50 left do not cover 51.
    with pytest.raises(QuotaError, match=f"may take 51 tokens, 50 of 100 a {period} are left"):
        spend(ledger, customer, Usage(cache_hit_tokens=50, output_tokens=1))
    spend(ledger, customer, Usage(cache_hit_tokens=49, output_tokens=1))
    clock.now += 86400 * (1 if period == "day" else 7)  # 2026-12-01
    spend(ledger, customer, Usage(cache_miss_tokens=99, output_tokens=1))
    with pytest.raises(QuotaError, match="0 of 100"):
        spend(ledger, customer, Usage(output_tokens=1))


def test_a_request_belongs_to_the_day_it_came_in(
    database: Database, ledger: Ledger, clock: Clock
) -> None:
    customer = customer_of(database, tokens_per_day=100)
    clock.now = NOON + 86400 / 2 - 1

    async def run() -> None:
        async with ledger.reserve(customer, 90, 10) as late:
            clock.now += 2
            async with ledger.reserve(customer, 90, 10) as early:
                await early.settle(Usage(cache_miss_tokens=90, output_tokens=10))
            await late.settle(Usage(cache_miss_tokens=90, output_tokens=10))

    asyncio.run(run())
    with database.read() as connection:
        days = connection.execute(
            sa.select(windows.c.period, windows.c.used).where(
                sa.func.length(windows.c.period) == 10
            )
        ).all()
    assert dict(map(tuple, days)) == {"2026-11-24": 100, "2026-11-25": 100}


def test_context_of_the_tier(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database, context_tokens=100)
    spend(ledger, customer, Usage(cache_miss_tokens=90, output_tokens=10))
    with pytest.raises(
        AccessError, match="may have 101 tokens, the tier 'test' has a context of 1"
    ):
        spend(ledger, customer, Usage(cache_miss_tokens=90, output_tokens=11))

    async def four_answers() -> None:
        async with ledger.reserve(customer, 90, 40, longest_tokens=100) as reservation:
            assert reservation.terms.tokens == 130

    asyncio.run(four_answers())


def test_a_balance(database: Database, ledger: Ledger) -> None:
    credit = PRICE.worst(100, 10)
    customer = customer_of(database, credit=credit, prepaid=True)
    with pytest.raises(QuotaError, match=r"may cost 0\.000017, the balance is 0\.000017"):
        spend(ledger, customer, Usage(cache_hit_tokens=100, output_tokens=11))
    spend(ledger, customer, Usage(cache_hit_tokens=100, output_tokens=10))
    with pytest.raises(QuotaError):
        spend(ledger, customer, Usage(cache_miss_tokens=100, output_tokens=10))
    credit_key(database, customer.key_id, PRICE.of(100, 0, 10))
    spend(ledger, customer, Usage(cache_miss_tokens=100, output_tokens=10))
    assert sums_of(database, customer)[0] == credit + PRICE.of(100, 0, 10)


def test_a_key_revoked_meanwhile(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database)
    revoke_key(database, customer.key_id)
    with pytest.raises(AuthError, match="revoked"):
        spend(ledger, customer, SOME)


def test_a_request_is_booked_once(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database)

    async def run() -> None:
        async with ledger.reserve(customer, 10, 1, "one"):
            with pytest.raises(RequestError, match="'one' is in the ledger already"):
                async with ledger.reserve(customer, 10, 1, "one"):
                    pass
        with pytest.raises(RequestError):
            async with ledger.reserve(customer, 10, 1, "one"):
                pass

    asyncio.run(run())


def test_a_refusal_leaves_nothing(database: Database, ledger: Ledger) -> None:
    customer = customer_of(database, tokens_per_month=5)
    with pytest.raises(QuotaError):
        spend(ledger, customer, SOME)
    with database.read() as connection:
        assert connection.execute(sa.select(entries)).all() == []
        assert connection.execute(sa.select(windows)).all() == []


# Cancels and lost processes.


def test_cancels_leave_nothing_open(database: Database, seed: int) -> None:
    """200 requests, each cancelled at a random moment or not at all."""
    draw = random.Random(seed)
    customer = customer_of(database)
    done: list[Usage] = []

    async def one() -> None:
        async with ledger.reserve(customer, 900, 100) as reservation:
            await asyncio.sleep(draw.random() * 0.02)
            usage = usage_within(draw, 900, 100)
            reservation.note(usage)
            done.append(usage)  # from here on it is charged, acknowledged or not
            await asyncio.sleep(draw.random() * 0.02)
            await reservation.settle(usage)

    async def run() -> None:
        tasks = [asyncio.create_task(one()) for _ in range(200)]
        for task in tasks:
            if draw.random() < 0.7:
                asyncio.get_running_loop().call_later(draw.random() * 2, task.cancel)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        print(sum(isinstance(end, asyncio.CancelledError) for end in ends), "cancelled")
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)

    with Ledger(database) as ledger:
        asyncio.run(run())
        ledger._thread.submit(int).result()  # what cancelled coroutines had asked for
        tokens = sum(usage.computed_tokens for usage in done)
        charge = sum(
            PRICE.of(u.cache_hit_tokens, u.cache_miss_tokens, u.output_tokens) for u in done
        )
        assert sums_of(database, customer) == (charge, 0, tokens, 0)
    assert check_books(database) == []


def test_a_dead_owners_entries_are_refunded(
    database: Database, ledger: Ledger, clock: Clock
) -> None:
    customer = customer_of(database, concurrent_requests=2)
    dead = Ledger(database, clock=clock)
    left_open = dead.reserve(customer, 1000, 50)

    async def run() -> None:
        await left_open.__aenter__()
        async with ledger.reserve(customer, 100, 5) as mine:
            crash(dead)
            # Two are open, but one of them is nobody's: the refusal finds out.
            ledger._books._looked = float("-inf")
            await request(ledger, customer, SOME)
            await mine.settle(Usage(cache_miss_tokens=100, output_tokens=5))

    asyncio.run(run())
    assert sums_of(database, customer)[2:] == (105 + 38, 0)


def test_who_was_taken_for_dead_cannot_charge(tmp_path: Path) -> None:
    """On SQLite by losing the lock alone: on PostgreSQL it is the connection, see the next test."""
    database = Database(str(tmp_path / "ledger.sqlite3"))
    customer = customer_of(database)
    frozen = Ledger(database)

    async def run() -> None:
        with pytest.raises(LedgerError, match="refunded meanwhile"):
            async with frozen.reserve(customer, 1000, 50) as reservation:
                frozen._thread.submit(frozen._books._release).result()
                with Ledger(database) as sibling:
                    assert sibling.refunded_at_start == 1
                await reservation.settle(SOME)

    asyncio.run(run())
    assert sums_of(database, customer) == (0, 0, 0, 0)
    crash(frozen)
    database.close()


def test_a_connection_that_was_lost_for_good_leaves_no_owner_without_its_lock(
    database: Database,
) -> None:
    """Lost in the second attempt, too, nothing of ours had closed it: the next one is an owner."""
    with Ledger(database) as ledger:
        books = ledger._books
        before = books._owner
        assert books._connection is not None
        books._connection.invalidate()
        assert books.recover() == 0
        assert books._owner is not None and books._owner != before
        with database.read() as connection:
            assert not database.is_dead(books._owner, connection)
            known = connection.scalars(sa.select(owners.c.id)).all()
        assert books._owner in known
    assert check_books(database) == []


def test_a_lost_connection_is_made_again(postgres: str) -> None:
    """PostgreSQL ends our backend between reserving and settling: nothing is lost or booked twice,
    and what was open is ours again."""
    database = Database(postgres)
    customer = customer_of(database)
    with Ledger(database) as ledger:

        async def run() -> None:
            open_one, open_two = ledger.reserve(customer, 1000, 50), ledger.reserve(customer, 9, 1)
            async with open_one as one, open_two:
                lose_connections(postgres)
                await one.settle(SOME)
                with Ledger(database) as sibling:
                    assert sibling.refunded_at_start == 0
                assert sums_of(database, customer)[2:] == (38, 10)

        asyncio.run(run())
        assert sums_of(database, customer) == (PRICE.of(100, 28, 10), 0, 38, 0)
    assert check_books(database) == []
    database.close()


@pytest.mark.parametrize("step", ["_reserve", "_settle"])
def test_a_lost_commit_is_booked_once(
    postgres: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The connection ends after a commit and before we hear of it: done again, booked once."""
    database = Database(postgres)
    customer = customer_of(database, tokens_per_day=100)
    with Ledger(database) as ledger:
        books, work = ledger._books, getattr(ledger._books, step)
        lost: list[str] = []

        def commit_and_lose(connection: Any, *arguments: Any) -> None:
            work(connection, *arguments)
            if not lost:
                lost.append(step)
                connection.commit()
                lose_connections(postgres)
                raise sa.exc.OperationalError(
                    "COMMIT", None, Exception("gone"), connection_invalidated=True
                )

        monkeypatch.setattr(books, step, commit_and_lose)

        async def run() -> None:
            async with ledger.reserve(customer, 90, 10) as reservation:
                assert sums_of(database, customer)[2:] == (0, 100)
                with Ledger(database) as sibling:
                    assert sibling.refunded_at_start == 0
                usage = Usage(cache_miss_tokens=90, output_tokens=10, machine_s=0.1234567)
                await reservation.settle(usage)

        asyncio.run(run())
        assert sums_of(database, customer) == (PRICE.of(0, 90, 10), 0, 100, 0)
        assert lost
    assert check_books(database) == []
    database.close()


def lose_connections(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_closing_refunds_and_resigns(database: Database) -> None:
    customer = customer_of(database)
    ledger = Ledger(database)
    manager = ledger.reserve(customer, 1000, 50)
    asyncio.run(manager.__aenter__())
    ledger.close()
    ledger.close()
    assert sums_of(database, customer) == (0, 0, 0, 0)
    with database.read() as connection:
        assert connection.execute(sa.select(owners)).all() == []


def test_what_could_not_be_settled_is_refunded_later(
    database: Database, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full for a moment: nothing is charged, and the key's place comes back."""
    customer, books = customer_of(database, concurrent_requests=1), ledger._books
    work, full = books._settle, [True]

    def settle(*given: Any, **named: Any) -> None:
        if full[0]:
            raise sa.exc.OperationalError("UPDATE", None, Exception("disk is full"))
        work(*given, **named)

    monkeypatch.setattr(books, "_settle", settle)
    with pytest.raises(LedgerError, match="disk is full"):
        spend(ledger, customer, SOME)
    with pytest.raises(RateError):  # as long as it is
        spend(ledger, customer, SOME)
    full[0] = False
    spend(ledger, customer, SOME)
    assert sums_of(database, customer) == (PRICE.of(100, 28, 10), 0, 38, 0)


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "ledger.sqlite3"))
    customer = customer_of(database)
    with Ledger(database) as ledger:
        with database.write() as connection:
            connection.execute(sa.text("DROP TABLE windows"))
        with pytest.raises(LedgerError, match="cannot be written: no such table: windows"):
            spend(ledger, customer, SOME)
    database.close()
