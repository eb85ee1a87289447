"""Chips as data: what chips.toml knows of them, and a machine of which only the memory is known.

Not here: what a model does on them (memory.py, predict.py).
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from overleap.errors import ConfigError

GIB, GIGA, TERA = 2**30, 1e9, 1e12
# Where a chip has no rate for a type, the operands are widened and the next one serves.
WIDER = {"fp4": "fp8", "fp8": "bf16", "int8": "bf16", "bf16": "f32"}


@dataclass(frozen=True)
class Chip:
    """One chip; None and missing rates are unknown. Bytes, bytes a second, FLOPs a second, W, USD.

    kind   cpu, gpu, npu, or unified (CPU and GPU share the memory)
    rates  dense matmul by type of the operands
    link   to other chips, host: to the memory of the host; one direction
    """

    name: str
    label: str
    kind: str
    memory_bytes: int | None
    bandwidth: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    power_w: float | None = None
    price_usd: float | None = None
    link: float | None = None
    host: float | None = None
    source: str = ""

    @property
    def has_host(self) -> bool:
        """True where the host's memory is another one, to which experts may move."""
        return self.kind in ("gpu", "npu")

    def rate(self, dtype: str) -> float | None:
        """Of matmuls of this type, or of the type that serves it; None: unknown."""
        if dtype in self.rates:
            return self.rates[dtype]
        wider = WIDER.get(dtype)
        return None if wider is None else self.rate(wider)


@cache
def chips() -> Mapping[str, Chip]:
    """Every chip of chips.toml by name."""
    text = Path(__file__).with_name("chips.toml").read_text("utf-8")
    return MappingProxyType({name: _chip(name, raw) for name, raw in tomllib.loads(text).items()})


def chip(name: str) -> Chip:
    """A chip by name. ConfigError with the nearest names for one that is not there."""
    known = chips()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, 3, 0.4) or list(known)
    raise ConfigError(f"no chip is called {name!r}", f"known are, for example, {', '.join(near)}")


def bare(memory_bytes: int, label: str = "given memory", name: str = "memory") -> Chip:
    """A machine of which only the memory is known."""
    return Chip(name, label, "cpu", memory_bytes, source="memory as given")


def with_memory(one: Chip, memory_bytes: int) -> Chip:
    """The chip with so much memory instead."""
    return replace(one, memory_bytes=memory_bytes)


def _chip(name: str, raw: dict[str, Any]) -> Chip:
    def scaled(key: str, factor: float) -> float | None:
        return None if key not in raw else raw[key] * factor

    memory = raw.get("memory_gib")
    return Chip(
        name,
        raw["label"],
        raw["kind"],
        None if memory is None else memory * GIB,
        scaled("bandwidth_gbs", GIGA),
        MappingProxyType({key: value * TERA for key, value in raw.get("tflops", {}).items()}),
        raw.get("power_w"),
        raw.get("price_usd"),
        scaled("link_gbs", GIGA),
        scaled("host_gbs", GIGA),
        raw["source"],
    )
