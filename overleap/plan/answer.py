"""The answer to "can I run it": one plan for a model on a machine, and the machines that could.

Read next: memory.py (what fits), predict.py (how fast at best), cost.py (for how much).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from overleap.cache import layout
from overleap.config import ModelConfig
from overleap.errors import CapacityError, ConfigError
from overleap.machine import free_bytes, resident_bytes
from overleap.plan.chips import Chip, bare, chips, with_memory
from overleap.plan.cost import USUAL, Cost, Money, Prices, hourly, per_million
from overleap.plan.memory import (
    CHUNKS,
    Load,
    Memory,
    Split,
    largest_context,
    memory,
    most_users,
    settle,
    splits,
)
from overleap.plan.predict import Store, Time, decode_time, expert_store, prefill_time
from overleap.plan.weights import active, matrices, total

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # chips of a machine that `machines` tries


@dataclass(frozen=True)
class Machine:
    """What a model may run on.

    ram_bytes  of the host for experts that the chips do not hold; disk_rate of its disk, B/s
    """

    chip: Chip
    count: int = 1
    ram_bytes: int = 0
    disk_rate: float = 7e9


@dataclass(frozen=True)
class Plan:
    """A model on a machine.

    split            how several chips share this load
    memory           of the fullest chip
    have_bytes       that a chip has
    store            where experts are; None: not even what must be in memory fits
    largest_context  for as many users; most_users: at this context. However the chips share; with
                     every expert in memory, or with some elsewhere where that is how it runs
    first_token      time of reading one context alone; step: of a token for every user
    """

    load: Load
    machine: Machine
    split: Split
    memory: Memory
    have_bytes: int
    store: Store | None
    largest_context: int
    most_users: int
    first_token: Time | None
    step: Time | None
    prices: Prices | None

    @property
    def fits(self) -> bool:
        """True where every expert is in memory."""
        return self.memory.total <= self.have_bytes

    @property
    def runs(self) -> bool:
        """True where it fits, or runs with experts elsewhere."""
        return self.store is not None

    @property
    def spare_bytes(self) -> int:
        """Left over on a chip; negative: missing."""
        return self.have_bytes - self.memory.total

    @property
    def tokens_per_s(self) -> float | None:
        """Of one user, at most."""
        seconds = self.step.seconds if self.step else None
        return None if not seconds else 1 / seconds

    def row(self) -> dict[str, Any]:
        """Everything, as a program reads it."""
        load, chip = self.load, self.machine.chip
        return {
            "context_tokens": load.context,
            "users": load.users,
            "precision": str(load.precision),
            "cache_format": str(load.cache_format),
            "chip": chip.name,
            "count": self.machine.count,
            "source": chip.source,
            "tensor_parallel": self.split.tensor,
            "groups": self.split.groups,
            "have_bytes": self.have_bytes,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "fits": self.fits,
            "runs": self.runs,
            "spare_bytes": self.spare_bytes,
            "least_bytes": self.memory.least,
            "experts": None if self.store is None else asdict(self.store),
            "largest_context": self.largest_context,
            "most_users": self.most_users,
            "first_token": _time(self.first_token),
            "step": _time(self.step),
            "tokens_per_s_per_user": self.tokens_per_s,
            "usd_per_million": None if self.prices is None else _prices(self.prices),
        }


def plan(load: Load, machine: Machine, money: Money = USUAL) -> Plan:
    """The best way for this machine to run this load.

    Raises ConfigError for a chip whose memory is not known, CapacityError for more positions than
    the model has.
    """
    chip, positions = machine.chip, load.config.max_position_embeddings
    if chip.memory_bytes is None:
        raise ConfigError(f"the memory of {chip.label} is unknown: {chip.source}", "give --memory")
    if load.context > positions:
        raise CapacityError(
            f"a context of {load.context} tokens is asked for, the model has {positions} positions",
            f"a context of {positions} is the most",
        )
    found = [_plan(load, machine, split, money) for split in splits(load.config, machine.count)]
    best = min(found, key=_worse)
    # How chips share decides what they hold: another load may want another split.
    alike = [each for each in found if (each.fits, each.runs) == (best.fits, best.runs)]
    return replace(
        best,
        largest_context=max(each.largest_context for each in alike),
        most_users=max(each.most_users for each in alike),
    )


def machines(load: Load, money: Money = USUAL) -> Iterator[Plan]:
    """For every chip that is known, the fewest of them that hold the whole model; or none."""
    for chip in chips().values():
        if chip.memory_bytes is None:
            continue
        for count in COUNTS:
            found = plan(load, Machine(chip, count), money)
            if found.fits:
                yield found
                break


def running(load: Load, chip: Chip | None = None, money: Money = USUAL) -> dict[str, Any]:
    """What a process that serves this model can carry, as Plan.row() says it; for a server's page.

    Memory is what the process has now and what is free. `most_users` texts of load.context tokens
    fit, `largest_context` for load.users; `usd_per_million` has the prices of tokens.

    chip  whose rates, power and price count, with this machine's memory; None: those are unknown
    Raises ConfigError where the system does not tell how much memory is free.
    """
    free = free_bytes()
    if free is None:
        raise ConfigError("this system does not tell how much memory is free")
    have = resident_bytes() + free
    here = bare(have, "this machine", "here") if chip is None else with_memory(chip, have)
    return plan(load, Machine(here), money).row()


def _worse(found: Plan) -> tuple[float, ...]:
    """Order of preference: fits, runs, fast."""
    times = [time.seconds if time else None for time in (found.step, found.first_token)]
    slow = [float("inf") if seconds is None else seconds for seconds in times]
    return (not found.fits, not found.runs, *slow, found.memory.least)


def _plan(load: Load, machine: Machine, split: Split, money: Money) -> Plan:
    chip = machine.chip
    found, have = settle(load, chip, split), chip.memory_bytes or 0
    store = expert_store(found, chip, split, machine.ram_bytes, machine.disk_rate)
    whole = found.total <= have

    def fits(other: Load) -> bool:
        taken = memory(other, chip, split, load.chunk or CHUNKS[-1], least=True)
        return (taken.total if whole else taken.least) <= have

    context, users = largest_context(load, fits), most_users(load, fits)
    if store is None:
        return Plan(load, machine, split, found, have, None, context, users, None, None, None)
    first = prefill_time(load, chip, split, store, found.chunk)
    step = decode_time(load, chip, split, store)
    full = prefill_time(load, chip, split, store, found.chunk, split.groups)
    prices = _money(load, machine, split, money, full, step)
    return Plan(load, machine, split, found, have, store, context, users, first, step, prices)


def _money(
    load: Load, machine: Machine, split: Split, money: Money, full: Time, step: Time
) -> Prices:
    chip = machine.chip
    hour = hourly(chip.price_usd, chip.power_w, machine.count, money)
    kept = layout.bytes_per_token(load.config, load.cache_format)

    def price(seconds: float | None, tokens: float) -> Cost | None:
        return None if seconds is None else per_million(hour, seconds / tokens, money)

    return Prices(
        hit=per_million(hour, kept / machine.disk_rate, money),
        miss=price(full.seconds, load.context * split.groups),  # every group reads a prompt
        output=price(step.seconds, load.users),
    )


def parameters(config: ModelConfig) -> dict[str, int]:
    """Of the main model: in all, and those that a token is multiplied with."""
    found = matrices(config)
    return {"total": total(found), "active": active(found)}


def _time(time: Time | None) -> dict[str, Any] | None:
    if time is None:
        return None
    return {
        "seconds": time.seconds,
        "binding": time.binding,
        "by": dict(time.by),
        "unknown": list(time.unknown),
    }


def _prices(prices: Prices) -> dict[str, Any]:
    return {
        name: None if cost is None else asdict(cost) | {"total": cost.total}
        for name, cost in (
            ("cache_hit", prices.hit),
            ("cache_miss", prices.miss),
            ("output", prices.output),
        )
    }
