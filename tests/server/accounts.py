"""Small things that tests of the accounts share: tiers, customers, usage. Not fixtures."""

import asyncio
import random
from types import MappingProxyType
from typing import Any

from overleap.server.auth import Auth, Customer, create_key
from overleap.server.database import Database
from overleap.server.ledger import Ledger, Usage
from overleap.server.tiers import Price, Tier, Tiers

PRICE = Price(cache_hit=28, cache_miss=140, output=280)


def tiers_of(**limits: Any) -> Tiers:
    """Tiers with one that has these limits, `test`, and one that may see reports, `admin`."""
    test = Tier(name="test", **({"price": PRICE} | limits))
    return Tiers("USD", MappingProxyType({"test": test, "admin": Tier(name="admin", admin=True)}))


def customer_of(
    database: Database, user: str = "alice", credit: int = 0, **limits: Any
) -> Customer:
    """A fresh key with these limits, identified."""
    tiers = tiers_of(**limits)
    _, key = create_key(database, tiers, user=user, tier="test", credit=credit)
    return Auth(database, tiers).identify(f"Bearer {key}")


def usage_within(draw: random.Random, prompt_tokens: int, max_output_tokens: int) -> Usage:
    """What a request of this size may have used, at least one token."""
    hit = draw.randint(0, prompt_tokens)
    return Usage(
        cache_hit_tokens=hit,
        cache_miss_tokens=prompt_tokens - hit,
        output_tokens=draw.randint(1, max_output_tokens),
        machine_s=draw.randrange(1000) / 1000,
    )


def spend(ledger: Ledger, customer: Customer, usage: Usage) -> None:
    """One request from its beginning to its end."""
    asyncio.run(request(ledger, customer, usage))


async def request(ledger: Ledger, customer: Customer, usage: Usage) -> None:
    """The same, in a loop that runs."""
    async with ledger.reserve(customer, usage.prompt_tokens, usage.output_tokens) as reservation:
        await reservation.settle(usage)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def crash(ledger: Ledger) -> None:
    """What kill -9 leaves of a ledger: its lock is gone, its entries are open."""
    ledger._thread.submit(ledger._books._disconnect).result()
    ledger._thread.shutdown()
    ledger._closed = True
