"""Who asks: API keys, made, shown once, found again, revoked.

A key is `ol-ID-SECRET`. The ID is public: it finds the row and stands in logs and reports. Of the
secret, 32 random bytes, only the SHA-256 is stored; there is nothing to guess that a slow hash
would protect. Not what a key may still spend (ledger.py). Read next: tiers.py.
"""

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from overleap.errors import AccessError, AuthError, ConfigError, RequestError
from overleap.server.database import Database, keys
from overleap.server.tiers import Tier, Tiers

PREFIX = "ol"
LOCAL_ID = "local"  # the key of requests without a key
_KEY = re.compile(rf"{PREFIX}-([a-z0-9]{{12}})-([A-Za-z0-9_-]{{43}})")
_USER = re.compile(r"[A-Za-z0-9_.@+-]{1,128}")
_NOBODY = hashlib.sha256(b"").hexdigest()  # compared with where no key has the ID


class Access(StrEnum):
    """What a route asks of its caller."""

    PUBLIC = "public"  # nothing
    KEY = "key"  # any key
    ADMIN = "admin"  # a key of a tier that may see everybody's usage


@dataclass(frozen=True)
class Customer:
    """Who asks, as the server's rooms pass it on."""

    key_id: str
    user: str
    tier: Tier

    @property
    def flow(self) -> str:
        """Whom its requests share the machine as: its user, with all keys that user has.

        "" without a key: on such a server there is nobody else to keep a place or a share for.
        """
        return "" if self.key_id == LOCAL_ID else self.user


@dataclass(frozen=True)
class KeyInfo:
    """A key as the operator sees it. Times are seconds since 1970, money nano-units."""

    id: str
    user: str
    tier: str
    created: int
    revoked: int | None
    credited: int
    charged: int
    reserved: int


class Auth:
    """Finds the customer of a request.

    local_tier  what requests without a key get; None refuses them. With it a key that is not
                known is taken as none, because clients insist on sending one

    Everything blocks for a query: from a coroutine, call it in a thread.
    """

    def __init__(self, database: Database, tiers: Tiers, *, local_tier: str | None = None) -> None:
        self._database = database
        self._tiers = tiers
        self._local: Customer | None = None
        if local_tier is not None:
            self._local = Customer(LOCAL_ID, LOCAL_ID, tiers[local_tier])
            _ensure_local(database, local_tier)

    def identify(self, authorization: str | None) -> Customer:
        """The customer of an Authorization header, or of a bare key as in x-api-key.

        Raises AuthError for no key, one that is not known, or a revoked one; AccessError where
        the key's tier is not in the tiers' file any more. The time it takes does not depend on
        the secret, nor on whether the ID is known.
        """
        given = (authorization or "").strip()
        scheme, _, rest = given.partition(" ")
        if scheme.lower() == "bearer":
            given = rest.strip()
        if not given:
            if self._local is not None:
                return self._local
            raise AuthError(
                "no API key was given", f"send the header `Authorization: Bearer {PREFIX}-...`"
            )
        found = _KEY.fullmatch(given)
        key_id, secret = found.groups() if found else ("", given[:256])
        with self._database.read() as connection:
            row = connection.execute(sa.select(keys).where(keys.c.id == key_id)).first()
        expected = _NOBODY if row is None else str(row.digest)
        if not hmac.compare_digest(_digest(secret), expected) or row is None:
            if self._local is not None:
                return self._local
            raise AuthError(
                "the API key is not known", "`overleap keys list` shows those there are"
            )
        if row.revoked_us is not None:
            raise AuthError(f"the API key {shown(row.id)} was revoked")
        if row.tier not in self._tiers.by_name:
            raise AccessError(
                f"the API key {shown(row.id)} has the tier {row.tier!r}, which is gone"
            )
        return Customer(row.id, row.user, self._tiers[row.tier])

    def authorize(self, authorization: str | None, access: Access) -> Customer | None:
        """Let a caller through to a route, or raise: AuthError, or AccessError for a wrong tier.

        returns  the customer; None on a public route, where keys are not looked at
        """
        if access is Access.PUBLIC:
            return None
        customer = self.identify(authorization)
        if access is Access.ADMIN and not customer.tier.admin:
            raise AccessError(
                f"this needs a key of an admin tier, {shown(customer.key_id)} has the tier "
                f"{customer.tier.name!r}",
                "`overleap keys create --tier admin` makes one",
            )
        return customer


def shown(key_id: str) -> str:
    """How a key is written where others may read it."""
    return key_id if key_id == LOCAL_ID else f"{PREFIX}-{key_id}-..."


def create_key(
    database: Database, tiers: Tiers, *, user: str, tier: str, credit: int = 0
) -> tuple[str, str]:
    """Make a key.

    credit   nano-units paid in or granted
    returns  the key's ID and the key itself, which is nowhere else and cannot be shown again
    """
    if not _USER.fullmatch(user):
        raise RequestError(f"the user is {user!r}", "letters, digits and _.@+- only, up to 128")
    tiers[tier]
    key_id = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(12))
    secret = secrets.token_urlsafe(32)
    with database.write() as connection:
        connection.execute(keys.insert().values(_row(key_id, user, tier, _digest(secret), credit)))
    return key_id, f"{PREFIX}-{key_id}-{secret}"


def revoke_key(database: Database, key_id: str) -> None:
    """End a key. Twice is harmless. What it spent stays in the ledger."""
    with database.write() as connection:
        found = connection.execute(
            keys.update()
            .where(keys.c.id == id_of(key_id))
            .values(revoked_us=sa.func.coalesce(keys.c.revoked_us, time.time_ns() // 1000))
        )
        if found.rowcount == 0:
            raise _unknown(key_id)


def credit_key(database: Database, key_id: str, nanos: int) -> None:
    """Pay in for a key, or take back what was paid in too much (below zero)."""
    with database.write() as connection:
        found = connection.execute(
            keys.update().where(keys.c.id == id_of(key_id)).values(credited=keys.c.credited + nanos)
        )
        if found.rowcount == 0:
            raise _unknown(key_id)


def list_keys(database: Database) -> list[KeyInfo]:
    """All keys, the oldest first."""
    with database.read() as connection:
        rows = connection.execute(sa.select(keys).order_by(keys.c.created_us, keys.c.id))
        return [
            KeyInfo(
                row.id,
                row.user,
                row.tier,
                row.created_us // 10**6,
                None if row.revoked_us is None else row.revoked_us // 10**6,
                row.credited,
                row.charged,
                row.reserved,
            )
            for row in rows
        ]


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def id_of(name: str) -> str:
    """The ID in what a person copied: an ID, `ol-ID-...` or a whole key."""
    parts = name.split("-")
    return parts[1] if len(parts) > 1 and parts[0] == PREFIX else name


def _unknown(key_id: str) -> ConfigError:
    return ConfigError(f"no key has the ID {id_of(key_id)!r}", "`overleap keys list` shows them")


def _row(key_id: str, user: str, tier: str, digest: str, credit: int) -> dict[str, object]:
    return {
        "id": key_id,
        "user": user,
        "tier": tier,
        "digest": digest,
        "created_us": time.time_ns() // 1000,
        "credited": credit,
        "charged": 0,
        "reserved": 0,
    }


def _ensure_local(database: Database, tier: str) -> None:
    """The row that requests without a key are booked on. No secret has its digest."""
    with database.write() as connection:
        database.insert_missing(connection, keys, _row(LOCAL_ID, LOCAL_ID, tier, "-", 0))
        connection.execute(keys.update().where(keys.c.id == LOCAL_ID).values(tier=tier))
