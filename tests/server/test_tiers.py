"""Tiers and costs as data: what the files say, and what they must not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.errors import ConfigError
from overleap.server.costs import load_costs
from overleap.server.tiers import NANOS, Price, load_tiers, money

TIER = """
currency = "EUR"
[tiers.small]
price_per_million = { cache_hit = 0.028, cache_miss = 0.14, output = 2 }
"""
COSTS = """
currency = "EUR"
hardware_price = 3153.6
hardware_years = 1
other_per_year = 31.536
utilisation = 0.5
watts_idle = 100
watts_busy = 260
price_per_kwh = 0.36
"""


def test_the_tiers_that_come_along() -> None:
    tiers = load_tiers()
    assert tiers.currency == "USD" and set(tiers.by_name) == {"free", "standard", "pro", "admin"}
    free, standard, pro = (tiers[name] for name in ("free", "standard", "pro"))
    for name in ("requests_per_minute", "concurrent_requests", "tokens_per_day", "priority"):
        assert getattr(free, name) < getattr(standard, name) < getattr(pro, name)
    assert free.price == Price(cache_hit=0, cache_miss=0, output=0)
    assert standard.price == Price(cache_hit=28, cache_miss=140, output=280)
    assert [tier.name for tier in tiers.by_name.values() if tier.admin] == ["admin"]
    with pytest.raises(ConfigError, match="tiers are free, standard, pro, admin"):
        tiers["gold"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(TIER + "requests_per_minute = 7\nprepaid = true\n")
    tiers = load_tiers(path)
    small = tiers["small"]
    assert (tiers.currency, small.requests_per_minute, small.prepaid) == ("EUR", 7, True)
    assert small.tokens_per_day is None and not small.admin and small.priority == 1
    assert small.price.of(1, 10, 100) == 28 + 1400 + 200_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "currency is None"),
        ("currency = 'EUR'", "there is no"),
        ("currency = 'euro'\n[tiers.a]", "three letters"),
        ("colour = 1\n" + TIER, "unknown colour"),
        (TIER + "request_per_minute = 1", "unknown request_per_minute"),
        (TIER + "requests_per_minute = 0", "at least 1"),
        (TIER + "requests_per_minute = 1.5", "whole number"),
        (TIER + "tokens_per_day = -1", "from 0"),
        (TIER + "tokens_per_day = true", "expected a number"),
        (TIER + "tokens_per_day = inf", "expected a number"),
        (TIER + "tokens_per_day = nan", "expected a number"),
        (TIER + "tokens_per_day = '5'", "expected a number"),
        (TIER + "tokens_per_day = 99999999999999999999", "expected a number"),
        (TIER + "priority = 0", "at least 1"),
        (TIER + "prepaid = 1", "true or false"),
        ("currency = 'EUR'\n[tiers.a]\npriority = 1", "price_per_million is None"),
        (TIER.replace("0.028", "0.0285"), "three decimals"),
        (TIER.replace("output = 2", "ouput = 2"), "expected cache_hit"),
        (TIER.replace("output = 2", "output = -2"), "from 0"),
        ("currency = ", "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as raised:
        load_tiers(path)
    assert str(path) in str(raised.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for load in (load_tiers, load_costs):
        with pytest.raises(ConfigError, match="cannot be read"):
            load(tmp_path / "none.toml")


@given(*(st.integers(0, 2**31) for _ in range(6)))
def test_the_worst_case_is_never_passed(
    hit: int, miss: int, out: int, hits: int, misses: int, outs: int
) -> None:
    price = Price(cache_hit=hit, cache_miss=miss, output=out)
    assert price.of(hits, misses, outs) <= price.worst(hits + misses, outs)


def test_money_in_text() -> None:
    assert money(0, 2) == "0.00"
    assert money(NANOS * 1234 + 5 * NANOS // 1000, 2) == "1234.01"
    assert money(-NANOS // 2, 2) == "-0.50"
    assert money(28) == "0.000000" and money(28, 9) == "0.000000028"


def test_a_busy_second_by_hand(tmp_path: Path) -> None:
    """A year is 31,536,000 s, half of it busy: 2e-4 of hardware, 2e-6 of other a busy second, and
    100 W idle beside 260 W busy at 1e-7 a watt-second."""
    path = tmp_path / "costs.toml"
    path.write_text(COSTS)
    cost = load_costs(path).of(10 * 10**6)
    assert (cost.hardware, cost.other) == (2_000_000, 20_000)
    assert cost.power == round(10 * (260 + 100) * 1e-7 * NANOS)
    assert cost.total == cost.hardware + cost.other + cost.power
    assert load_costs(path).of(0).total == 0


def test_a_year_adds_up() -> None:
    """If requests keep the machine busy as expected, their costs are those of the year."""
    model = load_costs()
    year = model.of(round(365 * 86400 * 0.25) * 10**6)
    power = (0.25 * 260 + 0.75 * 90) / 1000 * 365 * 24 * 0.30
    assert year.hardware == 1000 * NANOS and year.other == 600 * NANOS
    assert abs(year.power / NANOS - power) < 1e-6


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("utilisation = 0.5", "utilisation = 0", "utilisation"),
        ("utilisation = 0.5", "utilisation = 1.5", "utilisation"),
        ("hardware_years = 1", "hardware_years = 0", "hardware_years"),
        ("watts_busy = 260", "watts_busy = 99", "below watts_idle"),
        ("watts_busy = 260", "", "missing watts_busy"),
        ("watts_busy", "watt_busy", "watt_busy, watts_busy"),
        ("EUR", "euros", "three letters"),
        ("0.36", "'dear'", "expected a number"),
    ],
)
def test_costs_that_are_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(COSTS.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_costs(path)
