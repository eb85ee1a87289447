"""`overleap keys` and `overleap usage`, as an operator types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from overleap.cli import app
from overleap.errors import ConfigError, OverleapError, RequestError
from overleap.server.auth import Auth
from overleap.server.costs import load_costs
from overleap.server.database import Database, keys
from overleap.server.ledger import Ledger, Usage
from overleap.server.tiers import load_tiers
from tests.server.accounts import spend


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ledger.sqlite3"
    monkeypatch.setenv("OVERLEAP_LEDGER", str(path))
    return path


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, OverleapError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def test_a_keys_life(ledger: Path) -> None:
    key = run("keys", "create", "--user", "alice", "--tier", "standard").strip()
    made = json.loads(run("keys", "create", "--user", "bob", "--tier", "pro", "--json"))
    assert made["key"].startswith(f"ol-{made['id']}-") and made["tier"] == "pro"
    database = Database(str(ledger))
    auth = Auth(database, load_tiers())
    alice = auth.identify(key)
    said = json.loads(run("keys", "credit", made["id"], "12.50", "--json"))
    assert said["done"] == f"12.50 booked for {made['id']}"
    listed = {row["user"]: row for row in json.loads(run("keys", "list", "--json"))}
    assert listed["alice"]["id"] == alice.key_id and listed["alice"]["revoked"] is None
    assert listed["bob"]["credited"] == "12.500000000"
    assert "12.500000" in run("keys", "list")
    assert made["key"].split("-", 2)[2] not in run("keys", "list") + run("keys", "list", "--json")
    run("keys", "revoke", alice.key_id)
    assert json.loads(run("keys", "list", "--json"))[0]["revoked"] is not None
    with pytest.raises(OverleapError, match="revoked"):
        auth.identify(key)
    database.close()


def test_a_credit_below_zero_takes_back() -> None:
    made = json.loads(run("keys", "create", "--user", "bob", "--tier", "pro", "--json"))
    run("keys", "credit", made["id"], "12.50")
    run("keys", "credit", made["id"], "-2.25", "--json")
    (listed,) = json.loads(run("keys", "list", "--json"))
    assert listed["credited"] == "10.250000000"
    run("keys", "credit", made["id"], "1", "--jsn", status=2)


def test_a_pipe_gets_whole_ids() -> None:
    """80 columns, as where nobody tells how wide it is."""
    made = json.loads(run("keys", "create", "--user", "a" * 40, "--tier", "standard", "--json"))
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["keys", "list"]).stdout
    assert made["id"] in shown and "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_usage_shows_cost_beside_price(ledger: Path) -> None:
    key = run("keys", "create", "--user", "alice", "--tier", "standard").strip()
    database = Database(str(ledger))
    customer = Auth(database, load_tiers()).identify(key)
    with Ledger(database, costs=load_costs()) as books:
        usage = Usage(cache_hit_tokens=1000, cache_miss_tokens=10**6, output_tokens=50, machine_s=9)
        spend(books, customer, usage)
        spend(books, customer, usage)
    (row,) = json.loads(run("usage", "--json"))
    price = 2 * (1000 * 28 + 10**6 * 140 + 50 * 280)
    assert (row["key"], row["tier"], row["requests"]) == (customer.key_id, "standard", 2)
    assert row["price"] == f"{price / 10**9:.9f}" and row["machine_s"] == 18
    assert float(row["cost"]) == pytest.approx(2 * load_costs().of(9 * 10**6).total / 10**9)
    assert row["currency"] == "USD"
    assert "0.280" in run("usage", "--by", "user")
    assert json.loads(run("usage", "--until", "2020-01-01", "--json")) == []
    assert len(json.loads(run("usage", "--since", "2020-01-01", "--by", "day", "--json"))) == 1
    assert json.loads(run("usage", "--key", "another", "--json")) == []
    for name in (customer.key_id, f"ol-{customer.key_id}-...", key):
        assert len(json.loads(run("usage", "--key", name, "--json"))) == 1, name
    run("usage", "--check")
    with database.write() as connection:
        connection.execute(keys.update().values(charged=1))
    run("usage", "--check", status=1)
    database.close()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["keys", "create", "--user", "a", "--tier", "gold"], ConfigError, "no tier"),
        (["keys", "create", "--user", "a b", "--tier", "free"], RequestError, "the user is"),
        (["keys", "revoke", "none"], ConfigError, "no key has the ID"),
        (["keys", "credit", "none", "1"], ConfigError, "no key has the ID"),
        (["keys", "credit", "none", "much"], ConfigError, "no amount"),
        (["keys", "credit", "none", "1e-10"], ConfigError, "no amount"),
        (["keys", "credit", "none", "nan"], ConfigError, "no amount"),
        (["keys", "credit", "none", "1e999999"], ConfigError, "no amount"),
        (["keys", "credit", "none", "-5"], ConfigError, "no key has the ID"),
        (["usage", "--by", "colour"], RequestError, "--by has 'colour'"),
        (["usage", "--by", "day,day"], RequestError, "--by has 'day'"),
        (["usage", "--since", "today"], RequestError, "no day"),
    ],
)
def test_mistakes(arguments: list[str], error: type[OverleapError], says: str) -> None:
    with pytest.raises(error, match=says):
        run(*arguments)
