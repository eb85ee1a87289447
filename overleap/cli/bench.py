"""The command that measures: speed and memory by depth, or the attention of a released shape.

Not here: the measuring (eval/speed.py, eval/geometry.py) or the record (eval/record.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import CacheKind, Json, app, cache_format_of
from overleap.machine import peak_resident_bytes, size

Results = Annotated[Path, typer.Option(help="Folder of the record.")]
Save = Annotated[bool, typer.Option(help="Add the record to the folder.")]


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="Folder, hub id, `mini`, or `random` (small).")
    ] = None,
    depth: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated.")] = None,
    decode: Annotated[int, typer.Option(help="Steps to measure at each depth.", min=1)] = 16,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill step.", min=1)] = 512,
    geometry: Annotated[
        str | None, typer.Option(help="v4-flash or v4-pro: time its attention, without weights.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache of --geometry.")] = 1048576,
    cache: CacheKind = "release",
    backend: Annotated[str, typer.Option(help="Kernel backend.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice else.")] = None,
    seed: Annotated[int, typer.Option(help="Of the text, and of random weights.")] = 0,
    results: Results = Path("results"),
    save: Save = True,
    as_json: Json = False,
) -> None:
    """Measure tokens a second and memory at several depths, and record it.

    Example: `overleap bench mini --depth 1024 --depth 16384 --threads 2`
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {
        "backend": backend,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    if geometry is not None:
        _geometry(geometry, context, backend, seed, settings, results, save, as_json)
        return
    settings |= {"cache": cache, "chunk_tokens": chunk, "decode_steps": decode}
    _speed(model, depth, settings, results, save, as_json)


def _speed(
    model: str | None,
    depth: list[int] | None,
    settings: dict[str, Any],
    results: Path,
    save: bool,
    as_json: bool,
) -> None:
    """Read one text up to each depth, and write a little there."""
    from overleap.eval.speed import DEPTHS, open_model, speed

    built, name, weights = open_model(model, settings["seed"], settings["backend"])
    settings["model"] = name
    with screen.bar("reading", "tokens") as bar:
        found = speed(
            built,
            depth or DEPTHS,
            decode_tokens=settings["decode_steps"],
            chunk_tokens=settings["chunk_tokens"],
            format=cache_format_of(settings["cache"]),
            seed=settings["seed"],
            progress=bar,
        )
    rows = [
        (
            f"{row.depth_tokens:,}",
            f"{row.prefill_tokens_per_s:,.0f}",
            f"{row.decode_tokens_per_s:,.1f}",
            size(row.cache_bytes),
            size(row.peak_process_bytes or 0),
        )
        for row in found
    ]
    columns = ("depth", "prefill tokens/s", "decode tokens/s", "cache", "peak memory")
    title, numbers = f"{name}, one sequence", [asdict(row) for row in found]
    _report("speed", title, columns, rows, numbers, settings, weights, results, save, as_json)


def _geometry(
    name: str,
    tokens: int,
    backend: str,
    seed: int,
    settings: dict[str, Any],
    results: Path,
    save: bool,
    as_json: bool,
) -> None:
    """Fill the caches of a released shape and time the attention of one decode step."""
    from overleap.config import ModelConfig
    from overleap.eval.geometry import geometry
    from overleap.kernels import select

    config = ModelConfig.preset(name)
    with screen.bar(f"filling the cache of {name}", "pools") as bar:
        found = geometry(config, select(backend), tokens, seed=seed, progress=bar)
    settings |= {"geometry": name, "context_tokens": tokens}
    rows = [
        (
            part.part,
            part.layers,
            f"{1000 * part.step_s:,.1f} ms",
            size(part.read_bytes),
            f"{part.read_bytes / part.step_s / 1e9:.2f}",
        )
        for part in found.parts
    ]
    peak = peak_resident_bytes() or 0
    title = (
        f"{name}, {tokens:,} tokens: {found.bytes_per_token:,.2f} B of cache a token "
        f"(formula {found.formula_bytes_per_token:,.2f}), {size(found.page_bytes)} and "
        f"{size(found.window_bytes)} of windows, process {size(peak)}"
    )
    facts = asdict(found)
    whole = {key: value for key, value in facts.items() if key != "parts"}
    numbers = [whole | {"peak_process_bytes": peak}, *facts["parts"]]
    columns = ("part of a decode step", "layers", "time", "cache bytes read", "GB/s")
    _report("geometry", title, columns, rows, numbers, settings, None, results, save, as_json)


def _report(
    subject: str,
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[object, ...]],
    numbers: list[dict[str, Any]],
    settings: dict[str, Any],
    weights: str | None,
    results: Path,
    save: bool,
    as_json: bool,
) -> None:
    """The table, or the record as JSON; then the record is kept."""
    from overleap.eval.record import append, take

    record = take(subject, numbers, settings, weights=weights)
    if as_json:
        sys.stdout.write(record.to_json() + "\n")
    else:
        screen.put_table(title, columns, rows)
    if (record.load or 0) > record.machine.cores + 0.5:
        screen.note(f"{record.load} processes shared the {record.machine.cores} cores")
    if save:
        screen.note(f"recorded in {append(record, results)}")
