"""`overleap bench --versus`: ours and other programs on one checkpoint, as a table and a record.

Not here: the asking (eval/peers/versus.py), the command (bench.py).
"""

from typing import TYPE_CHECKING, Any

from overleap.cli import screen
from overleap.machine import size

if TYPE_CHECKING:
    from overleap.kernels.conformance import Ceilings


def compare(
    model: str | None,
    depths: list[int] | None,
    peers: list[str],
    rounds: int,
    backends: list[str],
    patience: float | None,
    settings: dict[str, Any],
) -> tuple[screen.Shown, list[dict[str, Any]], dict[str, Any], str | None]:
    """Measure; returns the table, and a record's numbers, settings and word on the weights."""
    from overleap.eval.peers.versus import VERSUS_DEPTHS, Contender, versus
    from overleap.eval.speed import open_folder
    from overleap.kernels.conformance.ceilings import ceilings

    limits = ceilings("cpu", settings["threads"])
    ours = [Contender(f"overleap {backend}", "overleap", backend) for backend in backends]
    others = [Contender.peer(text) for text in peers]
    with open_folder(model, settings["seed"]) as (folder, name, weights):
        found = versus(
            folder,
            ours + others,
            depths or VERSUS_DEPTHS,
            threads=settings["threads"],
            rounds=rounds,
            decode_tokens=settings["decode_steps"],
            chunk_tokens=settings["chunk_tokens"],
            seed=settings["seed"],
            limits=limits,
            patience=patience,
            told=screen.note,
        )
    settings = settings | {"model": name, "rounds": rounds} | ceiling_settings(limits)
    for program, fact in found.facts.items():
        settings[f"version_of_{program}"] = fact
    for program, difference in found.apart.items():
        settings[f"log_probability_off_{program}"] = difference
        settings[f"same_best_{program}"] = found.same_best[program]
    numbers = found.rows()
    title = f"{name}: tokens/s, medians; x: how many times as fast {ours[0].name} is"
    columns = ("program", "depth", "prefill", "x", "decode", "x", "8 at once", "peak")
    table = screen.Shown(title, columns, [_cells(row) for row in numbers])
    return table, numbers, settings, weights


def ceiling_settings(limits: "Ceilings") -> dict[str, float | None]:
    """What the machine can do at best, as a record's settings keep it."""
    rates = {
        "read_bytes": limits.read,
        "f32_op": limits.f32,
        "bf16_op": limits.bf16,
        "int8_op": limits.int8,
    }
    return {
        f"ceiling_{kind}_per_s": None if rate is None else rate.per_s
        for kind, rate in rates.items()
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from overleap.eval.plot import depth_label

    start = (row["program"], depth_label(row["depth_tokens"]))
    if "error" in row:
        least = row.get("prefill_factor_at_least")
        return (*start, row["error"], f"> {least:.1f}" if least else "", *[""] * 4)
    prefill, decode = row.get("prefill_factor"), row.get("decode_factor")
    together = row.get("together_tokens_per_s")
    return (
        *start,
        f"{row['prefill_tokens_per_s']:,.0f}",
        "" if prefill is None else f"{prefill:.2f}",
        f"{row['decode_tokens_per_s']:,.1f}",
        "" if decode is None else f"{decode:.2f}",
        "" if together is None else f"{together:,.0f} ({row['together_factor']:.2f})",
        size(row["peak_process_bytes"] or 0),
    )
