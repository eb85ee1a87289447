"""Commands for operators: keys and usage.

Not here: what they do (overleap/server/auth.py, overleap/server/reports.py).
"""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import Json, app
from overleap.errors import ConfigError, RequestError

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke keys of the server.")
app.add_typer(keys, name="keys")

LEDGER_VARIABLE = "OVERLEAP_LEDGER"
Ledger = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="A file, or postgresql://user@host/name; else $OVERLEAP_LEDGER, else the user's own.",
    ),
]
TiersFile = Annotated[Path | None, typer.Option("--tiers", help="A TOML file of tiers.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="A key's ID, as `keys list` shows it.")]


def ledger_of(option: str | None) -> str:
    """Where the ledger is: the option, the environment, or the user's data folder."""
    import platformdirs

    found = option or os.environ.get(LEDGER_VARIABLE)
    return found or str(platformdirs.user_data_path("overleap") / "ledger.sqlite")


@contextmanager
def _database(option: str | None) -> Iterator[Any]:
    from overleap.server.database import Database

    database = Database(ledger_of(option))
    try:
        yield database
    finally:
        database.close()


@keys.command()
def create(
    user: Annotated[str, typer.Option(help="Whose it is: a name for reports.")],
    tier: Annotated[str, typer.Option(help="free, standard, pro, admin, or one of your own.")],
    credit: Annotated[str, typer.Option(help="Paid in, for tiers that are prepaid.")] = "0",
    tiers: TiersFile = None,
    ledger: Ledger = None,
    as_json: Json = False,
) -> None:
    """Make a key and show it, once: only a digest of it is kept.

    Example: `overleap keys create --user alice --tier standard`
    """
    from overleap.server.auth import create_key
    from overleap.server.tiers import load_tiers

    with _database(ledger) as database:
        key_id, key = create_key(
            database, load_tiers(tiers), user=user, tier=tier, credit=_nanos(credit)
        )
    if as_json:
        screen.put_json({"id": key_id, "user": user, "tier": tier, "key": key})
        return
    print(key)
    screen.note("keep it now: it cannot be shown again")


@keys.command("list")
def list_(ledger: Ledger = None, as_json: Json = False) -> None:
    """Every key with its tier and its money. No key can be used from what is shown.

    Example: `overleap keys list`
    """
    from overleap.server.auth import list_keys
    from overleap.server.tiers import money

    with _database(ledger) as database:
        found = list_keys(database)
    if as_json:
        amounts = ("credited", "charged", "reserved")
        screen.put_json([asdict(k) | {a: money(getattr(k, a), 9) for a in amounts} for k in found])
        return
    rows = [
        (
            key.id, key.user, key.tier, _day(key.created),
            "" if key.revoked is None else _day(key.revoked),
            money(key.charged), money(key.credited - key.charged),
        )
        for key in found
    ]  # fmt: skip
    columns = ("key", "user", "tier", "made", "revoked", "charged", "balance")
    screen.put_table(ledger_of(ledger), columns, rows)


@keys.command()
def revoke(key: KeyId, ledger: Ledger = None, as_json: Json = False) -> None:
    """End a key, from its next request on. What it used stays in the reports.

    Example: `overleap keys revoke 3kq0m2x9ab7c`
    """
    from overleap.server.auth import revoke_key

    with _database(ledger) as database:
        revoke_key(database, key)
    _done(key, f"{key} is revoked", as_json)


# What is below zero begins as an option does.
@keys.command(context_settings={"ignore_unknown_options": True})
def credit(
    key: KeyId,
    amount: Annotated[str, typer.Argument(help="Like 12.50; below zero (-5) takes back.")],
    ledger: Ledger = None,
    as_json: Json = False,
) -> None:
    """Book a payment for a key of a prepaid tier.

    Example: `overleap keys credit 3kq0m2x9ab7c 12.50`
    """
    from overleap.server.auth import credit_key

    with _database(ledger) as database:
        credit_key(database, key, _nanos(amount))
    _done(key, f"{amount} booked for {key}", as_json)


def _done(key: str, sentence: str, as_json: bool) -> None:
    """Say so."""
    if as_json:
        screen.put_json({"key": key, "done": sentence})
    else:
        print(sentence)


@app.command()
def usage(
    by: Annotated[str, typer.Option(help="Any of key, user, tier, day, with commas.")] = (
        "key,tier,day"
    ),
    since: Annotated[str | None, typer.Option(help="First day (UTC), like 2026-11-24.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day (UTC).")] = None,
    key: Annotated[list[str] | None, typer.Option(help="Only this key.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the sums against the entries; 1 if one is wrong.")
    ] = False,
    tiers: TiersFile = None,
    ledger: Ledger = None,
    as_json: Json = False,
) -> None:
    """What was used: tokens by kind, the price to the key, and what it cost to serve.

    Example: `overleap usage --by user,day --since 2026-11-01`
    """
    from overleap.server.auth import id_of
    from overleap.server.reports import Reports, check_books, day_s
    from overleap.server.tiers import load_tiers

    groups = _groups(by)
    end = None if until is None else day_s(until) + 86400
    with _database(ledger) as database:
        wrong = check_books(database) if check else []
        loaded = load_tiers(tiers)
        reports = Reports(database, loaded, clock=time.time)
        start = 0 if since is None else day_s(since)
        found = reports.usage(
            groups, start_s=start, end_s=end, key_ids=tuple(map(id_of, key or ()))
        )
    _show_usage(found, groups, loaded.currency, as_json)
    for sentence in wrong:
        screen.talk.print(sentence, markup=False, soft_wrap=True)
    if check:
        screen.note(f"{len(wrong)} sums are wrong" if wrong else "every sum is that of its entries")
    if wrong:
        raise typer.Exit(1)


def _show_usage(found: Any, groups: Any, currency: str, as_json: bool) -> None:
    from overleap.server.tiers import money

    if as_json:
        screen.put_json([_facts(sums, currency) for sums in found])
        return
    rows = [
        (
            *(sums.group[name] for name in groups), f"{sums.requests:,}",
            f"{sums.cache_hit_tokens:,}", f"{sums.cache_miss_tokens:,}", f"{sums.output_tokens:,}",
            f"{sums.machine_s:,.1f}", money(sums.price), money(sums.cost),
            money(sums.price - sums.cost),
        )
        for sums in found
    ]  # fmt: skip
    columns = (*groups, "requests", "hit", "miss", "output", "busy s", "price", "cost", "margin")
    screen.put_table(f"tokens; money in {currency}", columns, rows)


def _facts(sums: Any, currency: str) -> dict[str, Any]:
    from overleap.server.tiers import money

    amounts = ("price", "cost_hardware", "cost_power", "cost_other")
    facts = {name: value for name, value in asdict(sums).items() if name != "group"}
    facts |= {name: money(getattr(sums, name), 9) for name in amounts}
    return {**sums.group, **facts, "cost": money(sums.cost, 9), "currency": currency}


def _groups(by: str) -> tuple[Any, ...]:
    names = tuple(name.strip() for name in by.split(",") if name.strip())
    known = ("key", "user", "tier", "day")
    if odd := [name for name in names if name not in known or names.count(name) > 1]:
        raise RequestError(f"--by has {odd[0]!r}", f"each of {', '.join(known)} once at most")
    return names


def _nanos(amount: str) -> int:
    """An amount as a person writes it, in nano-units."""
    try:
        nanos = Decimal(amount).scaleb(9)
        if nanos == nanos.to_integral_value() and abs(nanos) < 10**18:
            return int(nanos)
    except DecimalException:  # no number, or one with an exponent beyond all reason
        pass
    raise ConfigError(f"{amount!r} is no amount", "write it like 12.50, below 1,000,000,000")


def _day(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d")
