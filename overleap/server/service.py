"""What the routes share: the model's text side, the engine's bridge, keys and books.

Made once per process and passed on; there are no globals. Read next: app.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from overleap.engine.request import Request
from overleap.server.auth import Auth
from overleap.server.bridge import Bridge
from overleap.server.capacity import Capacity
from overleap.server.isolation import Isolation
from overleap.server.ledger import Ledger
from overleap.server.metrics import Metrics
from overleap.server.reports import Reports
from overleap.server.running import Admission, Everyone, Running
from overleap.server.settings import Settings
from overleap.server.turns import Turns


@dataclass(frozen=True)
class Service:
    """One serving process."""

    settings: Settings
    turns: Turns
    bridge: Bridge
    auth: Auth
    ledger: Ledger
    reports: Reports
    isolation: Isolation
    metrics: Metrics
    capacity: Capacity
    everyone: Everyone = field(default_factory=Everyone)

    async def begin(self, requests: Sequence[Request], admission: Admission) -> Running:
        """Let requests in, and know of them until they end. Raises as `Running.begin`."""
        with self.everyone.entrance():
            running = await Running.begin(
                requests,
                admission,
                bridge=self.bridge,
                ledger=self.ledger,
                metrics=self.metrics,
                wait_s=self.settings.wait_s,
                ended=self.everyone.remove,
            )
            await self.everyone.add(running)
        return running
