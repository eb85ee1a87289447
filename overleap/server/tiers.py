"""Tiers as data: limits and prices of a kind of key, read from a TOML file.

Not who has which (auth.py), nor what is left of a limit (ledger.py). Read next: tiers.toml.

Money is whole nano-units of the currency (a thousand-millionth), so sums are exact. A price per
million tokens with three decimals is a whole number of nano-units a token.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

from overleap.errors import ConfigError

NANOS = 10**9  # nano-units in a unit of the currency
LIMIT = 2**53  # of any number in the file: far above any use, far below 64 bits

_LIMITS = (
    "requests_per_minute",
    "concurrent_requests",
    "tokens_per_day",
    "tokens_per_month",
    "context_tokens",
)
_KEYS = {*_LIMITS, "priority", "prepaid", "admin", "price_per_million"}


@dataclass(frozen=True, kw_only=True)
class Price:
    """Nano-units a token."""

    cache_hit: int
    cache_miss: int
    output: int

    def of(self, cache_hit_tokens: int, cache_miss_tokens: int, output_tokens: int) -> int:
        """Nano-units for so many tokens; exact."""
        return (
            self.cache_hit * cache_hit_tokens
            + self.cache_miss * cache_miss_tokens
            + self.output * output_tokens
        )

    def worst(self, prompt_tokens: int, max_output_tokens: int) -> int:
        """The most a request can cost, whatever share of its prompt a cache has."""
        prompt = max(self.cache_hit, self.cache_miss)
        return prompt * prompt_tokens + self.output * max_output_tokens


@dataclass(frozen=True, kw_only=True)
class Tier:
    """Limits of a key; None is no limit. Meanings as in tiers.toml."""

    name: str
    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    context_tokens: int | None = None
    priority: int = 1
    prepaid: bool = False
    admin: bool = False
    price: Price = Price(cache_hit=0, cache_miss=0, output=0)


@dataclass(frozen=True)
class Tiers:
    """All tiers by name, and the currency of their prices."""

    currency: str
    by_name: Mapping[str, Tier]

    def __getitem__(self, name: str) -> Tier:
        """Raises ConfigError for a name that is not there."""
        if name not in self.by_name:
            raise ConfigError(f"no tier is called {name!r}", f"tiers are {', '.join(self.by_name)}")
        return self.by_name[name]


def load_tiers(path: Path | None = None) -> Tiers:
    """From a file, or the ones that come with the package. Raises ConfigError."""
    where = path or Path(__file__).parent / "tiers.toml"
    raw = read_toml(where)
    unknown = sorted(set(raw) - {"currency", "tiers"})
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}")
    currency, tables = raw.get("currency"), raw.get("tiers")
    if not isinstance(currency, str) or not currency.isalpha() or len(currency) != 3:
        raise ConfigError(f"{where}: currency is {currency!r}, expected three letters like USD")
    if not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{where}: there is no [tiers.NAME]")
    tiers = {name: _tier(name, table, f"{where}: {name}") for name, table in tables.items()}
    return Tiers(currency.upper(), MappingProxyType(tiers))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file; numbers with a point as Decimal. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text("utf-8"), parse_float=Decimal)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def number(raw: Any, where: str) -> Decimal:
    """A number of the file that is finite and not below zero. Raises ConfigError."""
    plain = isinstance(raw, (int, Decimal)) and not isinstance(raw, bool)
    if not plain or not Decimal(raw).is_finite() or not 0 <= raw < LIMIT:
        raise ConfigError(f"{where} is {raw!s}, expected a number from 0 to {LIMIT - 1}")
    return Decimal(raw)


def _tier(name: str, raw: Any, where: str) -> Tier:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is no table")
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}", f"known: {sorted(_KEYS)}")
    for key in ("prepaid", "admin"):
        if not isinstance(raw.get(key, False), bool):
            raise ConfigError(f"{where}: {key} is {raw[key]!r}, expected true or false")
    limits = {key: _whole(raw[key], f"{where}: {key}") for key in _LIMITS if key in raw}
    priority = _whole(raw.get("priority", 1), f"{where}: priority")
    return Tier(
        name=name,
        priority=priority,
        prepaid=raw.get("prepaid", False),
        admin=raw.get("admin", False),
        price=_price(raw.get("price_per_million"), f"{where}: price_per_million"),
        **limits,
    )


def _price(raw: Any, where: str) -> Price:
    kinds = ("cache_hit", "cache_miss", "output")
    if not isinstance(raw, dict) or set(raw) != set(kinds):
        raise ConfigError(f"{where} is {raw!r}, expected {', '.join(kinds)}")
    nanos = {}
    for kind in kinds:
        per_million = number(raw[kind], f"{where}: {kind}")
        nanos[kind] = int(per_million * (NANOS // 10**6))
        if Decimal(nanos[kind]) != per_million * (NANOS // 10**6):
            raise ConfigError(f"{where}: {kind} is {per_million}, at most three decimals are exact")
    return Price(**nanos)


def _whole(raw: Any, where: str) -> int:
    value = number(raw, where)
    if not isinstance(raw, int):
        raise ConfigError(f"{where} is {raw!s}, expected a whole number")
    if value < 1:
        raise ConfigError(f"{where} is {raw}, it must be at least 1")
    return int(value)


def money(nanos: int, places: int = 6) -> str:
    """Nano-units as units of the currency with a point, rounded half up."""
    value = Decimal(nanos).scaleb(-9)
    return f"{value.quantize(Decimal(1).scaleb(-places), rounding='ROUND_HALF_UP'):f}"
