"""Which sizes of tiles a chip gets. The figures are in tuning.toml; nothing is measured here."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Tuning:
    """A row of tuning.toml, which explains the fields; cores: multiprocessors of the device."""

    bf16: bool
    few: int
    tokens: int
    outputs_few: int
    outputs_many: int
    attend_tokens: int
    attend_queries: int
    attend_rows: int
    index_tokens: int
    index_entries: int
    streams_tokens: int
    streams_width: int
    streams_split: int
    waves: int
    cores: int = 1


@cache
def table() -> dict[str, dict[str, int]]:
    """Rows by name; `at_least` is a compute capability, 80 for 8.0."""
    text = Path(__file__).with_name("tuning.toml").read_text("utf-8")
    rows: dict[str, dict[str, int]] = tomllib.loads(text)
    return rows


def named(name: str, cores: int = 1) -> Tuning:
    """A row of the table."""
    row = {key: value for key, value in table()[name].items() if key != "at_least"}
    return Tuning(**row, cores=cores)  # type: ignore[arg-type]  # booleans are integers


@cache
def tuning(device: torch.device) -> Tuning:
    """For a device, by its compute capability where it has one."""
    if triton.knobs.runtime.interpret:
        return named("interpreter")
    if device.type == "cuda" and torch.version.hip is None:
        facts = torch.cuda.get_device_properties(device)
        reached = 10 * facts.major + facts.minor
        name = next(n for n, row in table().items() if row.get("at_least", 1 << 20) <= reached)
        return named(name, facts.multi_processor_count)
    facts = torch.get_device_module(device).get_device_properties(device)
    # AMD's builds count compute units, Intel's execution units.
    field = "multi_processor_count" if device.type == "cuda" else "gpu_eu_count"
    return named("other", int(getattr(facts, field)))


def pow2(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return max(least, 1 << max(0, count - 1).bit_length())
