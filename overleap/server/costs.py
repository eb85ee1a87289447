"""What a request costs whoever runs the machine: a share of hardware, power and the rest.

Not what a key pays (tiers.py). Read next: costs.toml.

A busy second carries, of what a year costs anyway (depreciation, idle power, other), the share that
falls on it if requests keep the machine busy for `utilisation` of the year; and the power above
idle that it takes itself. A request's busy seconds are its share of the steps it took part in.
"""

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from overleap.errors import ConfigError
from overleap.server.tiers import NANOS, number, read_toml

YEAR_S = 365 * 86400
_KEYS = (
    "hardware_price",
    "hardware_years",
    "other_per_year",
    "utilisation",
    "watts_idle",
    "watts_busy",
    "price_per_kwh",
)


@dataclass(frozen=True)
class Cost:
    """Nano-units of the currency."""

    hardware: int = 0
    power: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.hardware + self.power + self.other


@dataclass(frozen=True)
class CostModel:
    """Units of the currency for a busy second of the machine, exact."""

    currency: str
    hardware: Decimal
    power: Decimal
    other: Decimal

    def of(self, machine_us: int) -> Cost:
        """The cost of so many busy microseconds, each part rounded to a nano-unit."""
        seconds = Decimal(machine_us) / 10**6
        parts = (self.hardware, self.power, self.other)
        return Cost(*(round(part * seconds * NANOS) for part in parts))


def load_costs(path: Path | None = None) -> CostModel:
    """From a file, or the example that comes with the package. Raises ConfigError."""
    where = path or Path(__file__).parent / "costs.toml"
    raw = read_toml(where)
    odd = sorted(set(raw) ^ {*_KEYS, "currency"})
    if odd:
        raise ConfigError(
            f"{where}: unknown or missing {', '.join(odd)}", f"it has currency, {', '.join(_KEYS)}"
        )
    currency = raw["currency"]
    if not isinstance(currency, str) or not currency.isalpha() or len(currency) != 3:
        raise ConfigError(f"{where}: currency is {currency!r}, expected three letters like USD")
    values = {key: number(raw[key], f"{where}: {key}") for key in _KEYS}
    if values["hardware_years"] == 0 or not 0 < values["utilisation"] <= 1:
        raise ConfigError(
            f"{where}: hardware_years is {values['hardware_years']} and utilisation "
            f"{values['utilisation']}; the first must be above 0, the second in 0..1"
        )
    if values["watts_busy"] < values["watts_idle"]:
        raise ConfigError(
            f"{where}: watts_busy {values['watts_busy']} is below watts_idle {values['watts_idle']}"
        )
    return _model(currency.upper(), values)


def _model(currency: str, values: dict[str, Decimal]) -> CostModel:
    busy_s = YEAR_S * values["utilisation"]
    watt_s = values["price_per_kwh"] / (1000 * 3600)
    idle = values["watts_idle"] * (YEAR_S - busy_s) / busy_s  # of the idle seconds around this one
    return CostModel(
        currency,
        hardware=values["hardware_price"] / values["hardware_years"] / busy_s,
        power=(values["watts_busy"] + idle) * watt_s,
        other=values["other_per_year"] / busy_s,
    )
