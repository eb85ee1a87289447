"""What no server is made of: one that is open to all, one whose books subtract yen from dollars."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overleap.chat.profiles import profile_named
from overleap.errors import ConfigError
from overleap.server.auth import create_key
from overleap.server.bridge import Steps
from overleap.server.costs import load_costs
from overleap.server.database import Database
from overleap.server.serve import Parts, assemble
from overleap.server.settings import Settings
from overleap.server.tiers import load_tiers
from overleap.server.turns import Model
from tests.server.live import NAME, TOKENIZER


def no_engine() -> AbstractContextManager[Steps]:
    raise AssertionError("no server is started here")


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    database = Database(str(tmp_path / "ledger.sqlite"))
    model = Model(TOKENIZER, profile_named("v4-flash"), 4096, 1, "fp_test")
    settings = Settings(model=NAME, port=0)
    yield Parts(
        settings=settings,
        model=model,
        engine=no_engine,
        slots=1,
        database=database,
        tiers=load_tiers(None),
        costs=load_costs(),
    )
    database.close()


def at(parts: Parts, **settings: Any) -> Parts:
    return replace(parts, settings=replace(parts.settings, **settings))


def test_another_host_is_served_to_keys_only(parts: Parts) -> None:
    abroad = at(parts, host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is to be served, and there is no API key"):
        assemble(abroad)
    create_key(parts.database, parts.tiers, user="someone", tier="pro")
    services = [assemble(abroad), assemble(parts)]
    assert [service.auth._local is None for service in services] == [True, False]
    for service in services:
        service.ledger.close()


def test_costs_in_another_currency_than_prices_are_refused(parts: Parts) -> None:
    assert parts.costs is not None
    yen = replace(parts, costs=replace(parts.costs, currency="JPY"))
    with pytest.raises(ConfigError, match="costs are in JPY, the tiers' prices in USD"):
        assemble(yen)
