"""Keys: what a caller must show, what is kept of it, and who gets through where."""

import random
import sqlite3
import statistics
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from overleap.errors import AccessError, AuthError, ConfigError, RequestError
from overleap.server.auth import (
    LOCAL_ID,
    Access,
    Auth,
    create_key,
    credit_key,
    list_keys,
    revoke_key,
)
from overleap.server.database import Database, keys
from tests.server.accounts import tiers_of

TIERS = tiers_of()


@pytest.fixture
def lite(tmp_path: Path) -> Database:
    return Database(str(tmp_path / "ledger.sqlite3"))


def test_a_key_is_found_again(database: Database) -> None:
    key_id, key = create_key(database, TIERS, user="alice@example.org", tier="test")
    auth = Auth(database, TIERS)
    for header in (f"Bearer {key}", f"bearer  {key} ", key):
        customer = auth.identify(header)
        assert (customer.key_id, customer.user) == (key_id, "alice@example.org")
        assert customer.tier is TIERS["test"]


# Every kind of route, with every kind of key: who gets through.

KINDS = ("none", "empty", "bad", "unknown", "revoked", "wrong tier", "admin")
ALLOWED = {
    Access.PUBLIC: set(KINDS),
    Access.KEY: {"wrong tier", "admin"},
    Access.ADMIN: {"admin"},
}


@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("kind", KINDS)
def test_every_route_with_every_key(database: Database, access: Access, kind: str) -> None:
    key_id, key = create_key(database, TIERS, user="alice", tier="test")
    if kind == "revoked":
        revoke_key(database, key_id)
    header = {
        "none": None,
        "empty": "Bearer ",
        "bad": f"Bearer {key[:-1]}{'A' if key[-1] != 'A' else 'B'}",
        "unknown": f"Bearer ol-{'0' * 12}-{'x' * 43}",
        "revoked": f"Bearer {key}",
        "wrong tier": f"Bearer {key}",
        "admin": f"Bearer {create_key(database, TIERS, user='root', tier='admin')[1]}",
    }[kind]
    auth = Auth(database, TIERS)
    if kind in ALLOWED[access]:
        assert (auth.authorize(header, access) is None) == (access is Access.PUBLIC)
        return
    error = AccessError if kind == "wrong tier" else AuthError
    with pytest.raises(error) as raised:
        auth.authorize(header, access)
    assert key.split("-", 2)[2] not in str(raised.value), "an error tells a secret"


def test_odd_headers_are_refused(lite: Database, seed: int) -> None:
    draw = random.Random(seed)
    auth = Auth(lite, TIERS)
    _, key = create_key(lite, TIERS, user="alice", tier="test")
    odd = [
        "Basic YWxpY2U6eA==", "Bearer", "Bearer Bearer", key.upper(), key + " ", key + "x",
        key[:-1], f"ol--{key[16:]}", "ol-' OR 1=1 --", "\x00" * 50,
        "ol-" + "é" * 12 + "-" + "a" * 43,
        "\udcff" * 10, "x" * 10**6, f"Bearer {key} {key}",
    ]  # fmt: skip
    odd += ["".join(chr(draw.randrange(1, 0x2000)) for _ in range(60)) for _ in range(200)]
    for header in odd:
        if header.strip() == key:
            continue
        with pytest.raises(AuthError):
            auth.identify(header)


def test_a_secret_is_stored_nowhere(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "ledger.sqlite3"))
    _, key = create_key(database, TIERS, user="alice", tier="test")
    database.close()
    secret = key.split("-", 2)[2].encode()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or secret not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0, f"{path} may be read by others"


def test_keys_differ(lite: Database) -> None:
    made = [create_key(lite, TIERS, user="alice", tier="test") for _ in range(50)]
    assert len({key_id for key_id, _ in made}) == len({key for _, key in made}) == 50
    auth = Auth(lite, TIERS)
    assert [auth.identify(key).key_id for _, key in made] == [key_id for key_id, _ in made]
    swapped = f"ol-{made[0][0]}-{made[1][1].split('-', 2)[2]}"
    with pytest.raises(AuthError):
        auth.identify(swapped)


def test_a_revoked_key_stays_revoked(database: Database) -> None:
    key_id, key = create_key(database, TIERS, user="alice", tier="test")
    auth = Auth(database, TIERS)
    auth.identify(key)
    revoke_key(database, f"ol-{key_id}-...")  # as reports show it
    first = list_keys(database)[0].revoked
    revoke_key(database, key_id)
    assert first is not None and list_keys(database)[0].revoked == first
    with pytest.raises(AuthError, match="revoked"):
        auth.identify(key)


def test_requests_without_a_key_on_this_machine(database: Database) -> None:
    key_id, key = create_key(database, TIERS, user="alice", tier="test")
    revoked_id, revoked = create_key(database, TIERS, user="bob", tier="test")
    revoke_key(database, revoked_id)
    auth = Auth(database, TIERS, local_tier="admin")
    Auth(database, TIERS, local_tier="admin")  # a second process
    for header in (None, "", "Bearer sk-anything"):
        assert auth.identify(header).key_id == LOCAL_ID
        assert auth.authorize(header, Access.ADMIN) is not None
    assert auth.identify(key).key_id == key_id
    with pytest.raises(AuthError, match="revoked"):
        auth.identify(revoked)
    with pytest.raises(AuthError):
        Auth(database, TIERS).identify(f"ol-{LOCAL_ID}-{'a' * 43}")


def test_what_cannot_be(lite: Database) -> None:
    with pytest.raises(ConfigError, match="no tier is called 'gold'"):
        create_key(lite, TIERS, user="alice", tier="gold")
    for user in ("", "a b", "x" * 129, "a\nb", "ä"):
        with pytest.raises(RequestError, match="the user is"):
            create_key(lite, TIERS, user=user, tier="test")
    for change in (lambda: revoke_key(lite, "nosuchkey"), lambda: credit_key(lite, "nosuchkey", 1)):
        with pytest.raises(ConfigError, match="no key has the ID 'nosuchkey'"):
            change()
    assert list_keys(lite) == []


def test_a_tier_that_is_gone(lite: Database) -> None:
    _, key = create_key(lite, TIERS, user="alice", tier="test")
    with lite.write() as connection:
        connection.execute(keys.update().values(tier="gold"))
    with pytest.raises(AccessError, match="gold"):
        Auth(lite, TIERS).identify(key)


def test_the_time_it_takes_tells_nothing(lite: Database) -> None:
    """A wrong secret of a known ID and an unknown ID take the same time, and so does a secret
    that is wrong at its end. The bound is loose: a busy machine is noisy, a leak of one compared
    byte is not seen here but excluded by hmac.compare_digest."""
    key_id, key = create_key(lite, TIERS, user="alice", tier="test")
    auth = Auth(lite, TIERS)
    last = key[:-1] + ("A" if key[-1] != "A" else "B")
    wrong = [f"ol-{key_id}-{'x' * 43}", last, f"ol-{'0' * 12}-{'x' * 43}"]
    times: dict[str, list[float]] = {header: [] for header in wrong}
    for _ in range(300):
        for header in wrong:
            began = time.perf_counter()
            with pytest.raises(AuthError):
                auth.identify(header)
            times[header].append(time.perf_counter() - began)
    medians = [statistics.median(values) for values in times.values()]
    assert max(medians) < 1.5 * min(medians), medians


def test_credit(database: Database) -> None:
    key_id, _ = create_key(database, TIERS, user="alice", tier="test", credit=5)
    credit_key(database, key_id, 10)
    credit_key(database, key_id, -3)
    assert list_keys(database)[0].credited == 12


def test_the_digest_is_all_there_is(tmp_path: Path) -> None:
    """The columns are those we mean to keep; a raw look, past our own code."""
    path = tmp_path / "ledger.sqlite3"
    database = Database(str(path))
    create_key(database, TIERS, user="alice", tier="test")
    with sqlite3.connect(path) as raw:
        (digest,) = raw.execute("SELECT digest FROM keys").fetchone()
    raw.close()
    assert len(digest) == 64 and int(digest, 16) >= 0
    with database.read() as connection:
        assert connection.scalar(sa.select(keys.c.digest)) == digest
    database.close()
