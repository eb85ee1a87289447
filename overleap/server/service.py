"""What the routes share: the model's text side, the engine's bridge, keys and books.

Made once per process and passed on; there are no globals. Read next: app.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from overleap.engine.request import Request
from overleap.server.access import Accounts
from overleap.server.auth import Customer
from overleap.server.bridge import Bridge
from overleap.server.running import Everyone, Running
from overleap.server.settings import Settings
from overleap.server.turns import Turns


@dataclass(frozen=True)
class Service:
    """One serving process."""

    settings: Settings
    turns: Turns
    bridge: Bridge
    accounts: Accounts
    everyone: Everyone = field(default_factory=Everyone)

    async def begin(
        self, requests: Sequence[Request], id: str, customer: Customer, prompts: int = 1
    ) -> Running:
        """Let requests in, and know of them until they end. Raises as `Running.begin`."""
        running = await Running.begin(
            requests,
            id=id,
            customer=customer,
            bridge=self.bridge,
            accounts=self.accounts,
            wait_s=self.settings.wait_s,
            prompts=prompts,
            ended=self.everyone.remove,
        )
        self.everyone.add(running)
        return running
