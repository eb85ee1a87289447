"""A service from its parts, and serving it until told to stop.

Not here: which parts (cli/serve.py). Read next: app.py, wire.py.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from overleap.errors import CapacityError, ConfigError
from overleap.server import app, wire
from overleap.server.auth import LOCAL_ID, Auth, list_keys
from overleap.server.bridge import Bridge, Steps
from overleap.server.capacity import Capacity
from overleap.server.costs import CostModel
from overleap.server.database import Database
from overleap.server.isolation import Isolation
from overleap.server.ledger import Ledger
from overleap.server.metrics import Metrics
from overleap.server.reports import Reports
from overleap.server.service import Service
from overleap.server.settings import Settings
from overleap.server.tiers import Tiers
from overleap.server.turns import Model, Turns

LOCAL_TIER = "admin"  # of requests without a key, where those are let in


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a service is made of.

    engine       opens the engine, in the thread that will use it
    slots        requests that it serves at once
    needs_keys   requests without a key are refused on this machine too
    public       beginnings of prompts, as token ids, whose cache all keys share
    plan         what the planner says of the model in this process's memory
    """

    settings: Settings
    model: Model
    engine: Callable[[], AbstractContextManager[Steps]]
    slots: int
    database: Database
    tiers: Tiers
    costs: CostModel | None = None
    needs_keys: bool = False
    public: Sequence[Sequence[int]] = ()
    plan: Mapping[str, Any] | None = None


def assemble(parts: Parts) -> Service:
    """A service that is not serving yet.

    Raises ConfigError for one that would be open to all, or that subtracts dollars from yen.
    """
    settings = parts.settings
    if parts.costs is not None and parts.costs.currency != parts.tiers.currency:
        raise ConfigError(
            f"costs are in {parts.costs.currency}, the tiers' prices in {parts.tiers.currency}",
            "cost stands beside price: give both in one currency",
        )
    needs_keys = parts.needs_keys or not settings.loopback
    if needs_keys and not _has_keys(parts.database):
        raise ConfigError(
            f"{settings.host} is to be served, and there is no API key",
            "`overleap keys create --user NAME --tier TIER` makes one; 127.0.0.1 needs none",
        )
    isolation = Isolation(parts.database.secret, parts.public)
    return Service(
        settings=settings,
        turns=Turns(parts.model, settings, isolation),
        bridge=Bridge(
            parts.engine,
            slots=parts.slots,
            queue=settings.queue,
            queue_tokens=settings.queue_tokens,
        ),
        auth=Auth(parts.database, parts.tiers, local_tier=None if needs_keys else LOCAL_TIER),
        ledger=Ledger(parts.database, costs=parts.costs),
        reports=Reports(parts.database, parts.tiers),
        isolation=isolation,
        metrics=Metrics(),
        capacity=Capacity(parts.model.context_tokens, parts.slots, parts.plan, parts.costs),
    )


def _has_keys(database: Database) -> bool:
    return any(key.id != LOCAL_ID and key.revoked is None for key in list_keys(database))


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises CapacityError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise CapacityError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}",
            "another --port may be free; --port 0 takes any",
        ) from None
    return listening


def serve(service: Service, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    config = wire.config_of(app.build(service), service.settings)
    asyncio.run(wire.Server(config, service).serve(sockets=[listening]))
