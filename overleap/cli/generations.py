"""`overleap bench --versus v3.2`: attention of both generations measured, as a table and a record.

Not here: the measuring (eval/generations.py), the command (bench.py).
"""

import time
from typing import Any

from overleap.cli import screen


def versus_previous(
    geometry: str | None, context: int, backends: list[str], settings: dict[str, Any]
) -> tuple[screen.Shown, list[dict[str, Any]], dict[str, Any]]:
    """Measure; returns the table (title, columns, rows), and a record's numbers and settings.

    geometry  whose width and depth both have: v4-pro (that of V3.2) where it is not given
    context   the longest that is measured, in steps of four times up to it; whole pages
    """
    from overleap.config import ModelConfig
    from overleap.eval.generations import CONTEXTS, generations
    from overleap.eval.plot import depth_label
    from overleap.kernels import select

    name = geometry or "v4-pro"
    config = ModelConfig.preset(name)
    # Where one thread computes, its processor time tells more than a clock that others hold up.
    alone = settings["threads"] == 1
    clock = time.process_time if alone else time.perf_counter
    contexts = [each for each in CONTEXTS if each < context] + [context]
    numbers: list[dict[str, Any]] = []
    rows: list[tuple[object, ...]] = []
    for backend in backends:
        with screen.bar(f"{name} with {backend}, V3.2 in plain torch", "contexts") as bar:
            found = generations(
                config, select(backend), contexts, clock=clock, seed=settings["seed"],
                progress=bar,
            )  # fmt: skip
        for both in found:
            row = {"backend": backend} | both.row()
            numbers.append(row)
            rows.append(
                (
                    backend,
                    depth_label(both.context),
                    f"{both.own_bytes / 1e9:,.3f}, {both.previous_bytes / 1e9:,.3f} GB",
                    f"{row['cache_ratio']:.2f} ({row['cache_ratio_computed']:.2f})",
                    f"{1000 * both.own_s:,.0f}, {1000 * both.previous_s:,.0f} ms",
                    f"{row['time_ratio']:.1f}",
                    f"{row['flops_ratio']:.1f}, {row['fp8_flops_ratio']:.1f}",
                )
            )
    title = (
        f"attention of a decode step over {config.num_hidden_layers} layers, {name} and V3.2 of "
        "its width; ratios: how many times more V3.2 takes"
    )
    columns = ("backend", "context", "cache", "ratio (computed)", "time", "ratio",
               "of FLOPs, of FP8 FLOPs")  # fmt: skip
    return (
        screen.Shown(title, columns, rows),
        numbers,
        settings
        | {
            "geometry": name,
            "versus": "v3.2",
            "clock": "processor" if alone else "wall",
        },
    )
