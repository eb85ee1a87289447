"""The ledger against a model of it in plain Python, through random histories.

Reserve, settle, leave, note, refuse, crash and recover, a change of prices, a new day. Whatever the
history, the sums are those of the model. Examples by hand: test_ledger.py.
"""

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from overleap.errors import QuotaError, RateError
from overleap.server.auth import Customer
from overleap.server.books import periods
from overleap.server.database import Database, keys, windows
from overleap.server.ledger import Ledger, Reservation, Usage
from overleap.server.reports import check_books
from overleap.server.tiers import Price
from tests.server.accounts import Clock, crash, customer_of

DAY, AT_ONCE, CREDIT = 5000, 4, 2_000_000
SIZES = st.integers(0, 1500)
FOLDER = tempfile.TemporaryDirectory(prefix="ovl-model-")


class LedgerModel(RuleBasedStateMachine):
    """`open` maps entries to (reservation, manager, size, price, periods)."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.database = Database(str(Path(FOLDER.name) / "ledger.sqlite3"))
        self.customer: Customer = customer_of(
            self.database, credit=CREDIT,
            tokens_per_day=DAY, concurrent_requests=AT_ONCE, prepaid=True,
        )  # fmt: skip
        self.clock = Clock(1_795_500_000)
        self.ledger = Ledger(self.database, clock=self.clock)
        self.open: list[tuple[Reservation, Any, int, int, Price, tuple[str, str]]] = []
        self.used: dict[str, int] = {}
        self.charged = 0

    def wait(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable)

    @rule(prompt=SIZES, output=SIZES)
    def reserve(self, prompt: int, output: int) -> None:
        manager = self.ledger.reserve(self.customer, prompt, output)
        now, price = periods(int(self.clock.now * 10**6)), self.customer.tier.price
        today = sum(o[2] + o[3] for o in self.open if o[5][0] == now[0])
        held = sum(o[4].worst(o[2], o[3]) for o in self.open)
        refusal: type[Exception] | None = None
        if len(self.open) >= AT_ONCE:
            refusal = RateError
        elif (
            self.used.get(now[0], 0) + today + prompt + output > DAY
            or self.charged + held + price.worst(prompt, output) > CREDIT
        ):
            refusal = QuotaError
        try:
            reservation = self.wait(manager.__aenter__())
        except (RateError, QuotaError) as error:
            assert type(error) is refusal, error
            return
        assert refusal is None
        self.open.append((reservation, manager, prompt, output, price, now))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["settle", "note", "leave", "twice"]))
    def end(self, data: st.DataObject, how: str) -> None:
        which = data.draw(st.integers(0, len(self.open) - 1))
        reservation, manager, prompt, output, price, when = self.open.pop(which)
        read = data.draw(st.integers(0, prompt))
        hit = data.draw(st.integers(0, read))
        usage = Usage(
            cache_hit_tokens=hit,
            cache_miss_tokens=read - hit,
            output_tokens=data.draw(st.integers(0, output)),
        )
        if how == "note":
            reservation.note(usage)
        elif how == "leave":
            usage = Usage()
        else:
            for _ in range(1 if how == "settle" else 2):
                self.wait(reservation.settle(usage))
        self.wait(manager.__aexit__(None, None, None))
        self.charged += price.of(hit, read - hit, usage.output_tokens) if usage != Usage() else 0
        for period in when:
            self.used[period] = self.used.get(period, 0) + usage.computed_tokens

    @rule()
    def die(self) -> None:
        crash(self.ledger)
        self.ledger = Ledger(self.database, clock=self.clock)
        assert self.ledger.refunded_at_start == len(self.open)
        self.open = []

    @rule(seconds=st.sampled_from([1, 3600, 86400, 30 * 86400]))
    def pass_time(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(hit=st.integers(0, 500), miss=st.integers(0, 500), output=st.integers(0, 500))
    def change_prices(self, hit: int, miss: int, output: int) -> None:
        price = Price(cache_hit=hit, cache_miss=miss, output=output)
        self.customer = replace(self.customer, tier=replace(self.customer.tier, price=price))

    @invariant()
    def the_sums_are_the_models(self) -> None:
        mine = self.customer.key_id
        with self.database.read() as connection:
            key = connection.execute(sa.select(keys).where(keys.c.id == mine)).one()
            found = connection.execute(sa.select(windows).where(windows.c.key_id == mine)).all()
        assert key.charged == self.charged <= CREDIT
        assert key.reserved == sum(o[4].worst(o[2], o[3]) for o in self.open)
        assert {row.period: row.used for row in found if row.used} == {
            period: used for period, used in self.used.items() if used
        }
        for row in found:
            assert row.reserved == sum(o[2] + o[3] for o in self.open if row.period in o[5])
            assert len(row.period) == 7 or row.used + row.reserved <= DAY

    def teardown(self) -> None:
        self.ledger.close()
        wrong = check_books(self.database)
        self.database.close()
        self.loop.close()
        assert wrong == []


RUN = settings(
    max_examples=300,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_some_histories() -> None:
    run_state_machine_as_test(LedgerModel, settings=settings(RUN, max_examples=30))


@pytest.mark.slow
def test_three_hundred_histories() -> None:
    run_state_machine_as_test(LedgerModel, settings=RUN)
