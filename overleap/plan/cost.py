"""What tokens cost on a machine at its best times: depreciation, power and the rest apart.

Prices of chips alone, as their makers listed them; what is not known is not counted and said.
"""

from dataclasses import dataclass

HOURS_PER_YEAR = 8766
MILLION = 1e6


@dataclass(frozen=True)
class Money:
    """What a machine costs, in USD.

    years          over which its price is written off
    per_kwh, pue   of power, and what cooling takes on top
    other          an hour, of the whole machine: room, network, people
    busy           share of the time that it works
    price          of one chip, where it is to replace the list price
    """

    years: float = 4.0
    per_kwh: float = 0.10
    pue: float = 1.3
    other: float = 0.0
    busy: float = 1.0
    price: float | None = None


USUAL = Money()


@dataclass(frozen=True)
class Cost:
    """USD, by what it is for. None: not known, and not in the total."""

    depreciation: float | None
    power: float | None
    other: float

    @property
    def total(self) -> float:
        """Of what is known."""
        return (self.depreciation or 0) + (self.power or 0) + self.other

    @property
    def complete(self) -> bool:
        """True where nothing is unknown."""
        return self.depreciation is not None and self.power is not None

    def times(self, factor: float) -> "Cost":
        """So much of it."""
        return Cost(
            None if self.depreciation is None else self.depreciation * factor,
            None if self.power is None else self.power * factor,
            self.other * factor,
        )


@dataclass(frozen=True)
class Prices:
    """USD for a million tokens; None where the time is unknown.

    hit     input that a kept cache holds already, read back from disk
    miss    input that is read anew
    output  written
    """

    hit: Cost
    miss: Cost | None
    output: Cost | None

    def request(self, hit: int, miss: int, output: int) -> Cost | None:
        """Of one request with so many tokens of each; None where a price that it needs is."""
        parts = [(self.hit, hit), (self.miss, miss), (self.output, output)]
        if any(price is None and count for price, count in parts):
            return None
        costs = [price.times(count / MILLION) for price, count in parts if price is not None]
        return Cost(
            _sum([cost.depreciation for cost in costs]),
            _sum([cost.power for cost in costs]),
            sum(cost.other for cost in costs),
        )


def hourly(price: float | None, power_w: float | None, count: int, money: Money) -> Cost:
    """An hour of `count` chips."""
    price = money.price if money.price is not None else price
    return Cost(
        None if price is None else count * price / (money.years * HOURS_PER_YEAR),
        None if power_w is None else count * power_w / 1000 * money.pue * money.per_kwh,
        money.other,
    )


def per_million(hour: Cost, seconds_a_token: float, money: Money) -> Cost:
    """A million tokens of which each takes the machine so long."""
    return hour.times(seconds_a_token * MILLION / 3600 / money.busy)


def _sum(parts: list[float | None]) -> float | None:
    return None if None in parts else sum(part for part in parts if part is not None)
