"""Who asks and what it may spend, as the routes see it; and the answer where nobody keeps books.

With keys and a ledger: auth.py, ledger.py. Read next: turns.py.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from overleap.server.auth import LOCAL_ID, Access, Auth, Customer
from overleap.server.ledger import Ledger
from overleap.server.tiers import Tier
from overleap.server.usage import Usage


class Booked(Protocol):
    """A request that was let in."""

    async def settle(self, usage: Usage) -> None: ...


class Accounts(Protocol):
    """Keys and books."""

    async def authorize(self, authorization: str | None, access: Access) -> Customer | None:
        """Who asks. Raises AuthError, or AccessError for a tier that may not."""

    def reserve(
        self, customer: Customer, prompt_tokens: int, max_output_tokens: int, request_id: str
    ) -> AbstractAsyncContextManager[Booked]:
        """Let a request in. Raises QuotaError, RateError, AccessError."""


class Kept:
    """Keys in a database, every token in a ledger."""

    def __init__(self, auth: Auth, ledger: Ledger) -> None:
        self._auth, self._ledger = auth, ledger

    async def authorize(self, authorization: str | None, access: Access) -> Customer | None:
        if access is Access.PUBLIC:
            return None
        return await asyncio.to_thread(self._auth.authorize, authorization, access)

    def reserve(
        self, customer: Customer, prompt_tokens: int, max_output_tokens: int, request_id: str
    ) -> AbstractAsyncContextManager[Booked]:
        return self._ledger.reserve(customer, prompt_tokens, max_output_tokens, request_id)


class Open:
    """Everybody is one customer, who may do anything; nothing is booked."""

    def __init__(self) -> None:
        self._customer = Customer(LOCAL_ID, LOCAL_ID, Tier(name="open", admin=True))

    async def authorize(self, authorization: str | None, access: Access) -> Customer | None:
        return None if access is Access.PUBLIC else self._customer

    def reserve(
        self, customer: Customer, prompt_tokens: int, max_output_tokens: int, request_id: str
    ) -> AbstractAsyncContextManager[Booked]:
        return _unbooked()


class _Unbooked:
    async def settle(self, usage: Usage) -> None:
        pass


@asynccontextmanager
async def _unbooked() -> AsyncIterator[Booked]:
    yield _Unbooked()
