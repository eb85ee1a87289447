"""What an operator sets for a server, and the caps and deadlines that hold without being set.

Not here: keys and tiers (auth.py, tiers.py), the engine's memory (engine/budget.py).
Read next: app.py.
"""

import ipaddress
import re
from dataclasses import dataclass

from overleap.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One serving process.

    model            the name that requests give; aliases: other names for it
    host, port       where it listens
    queue            requests that may wait for a place in the engine
    queue_tokens     prompt tokens that may wait with them
    wait_s           a request that would wait longer for its first token is refused at once
    drain_s          what running answers get when the server is told to stop
    body_bytes       of a request; header_bytes: of its head
    header_s         for the head; body_s: for the body; idle_s: between requests
    slow_reader_s    for a client to take what was written to it
    silence_s        after which a stream says that it is alive
    public_prefix    tokens at the start of a prompt that keys may share a cache for
    """

    model: str
    aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 64
    queue_tokens: int = 4_000_000
    wait_s: float = 300.0
    drain_s: float = 30.0
    body_bytes: int = 32 * 2**20
    header_bytes: int = 16 * 2**10
    header_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    slow_reader_s: float = 60.0
    silence_s: float = 5.0

    def __post_init__(self) -> None:
        for name in (self.model, *self.aliases):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r} is no name for a model",
                    "letters, digits, dots, dashes and one slash, at most 96 each side",
                )
        if not 0 <= self.port < 65536:
            raise ConfigError(f"the port is {self.port}, it must be from 0 to 65535")
        for key in ("queue", "queue_tokens", "wait_s", "drain_s"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} is {getattr(self, key)}, it must not be below 0")

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return (self.model, *self.aliases)

    @property
    def loopback(self) -> bool:
        """True where nobody but this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
