"""The command that measures: speed and memory by depth, or the attention of a released shape.

Not here: the measuring (eval/speed.py, eval/geometry.py), the record (eval/record.py) or the
picture (eval/plot.py).
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import CacheKind, Device, Json, Threads, app, cache_format_of
from overleap.cli.versus import ceiling_settings, compare
from overleap.errors import RequestError
from overleap.machine import peak_resident_bytes, size

if TYPE_CHECKING:
    from overleap.eval.speed import Speed

Results = Annotated[Path, typer.Option(help="Folder of the record.")]
Patience = Annotated[
    float | None,
    typer.Option(help="Stop a reading of --versus that takes so many times as long as ours."),
]
Drawn = Annotated[int, typer.Option(help="Of the text, and of random weights.", min=0, max=2**62)]
Save = Annotated[bool, typer.Option(help="Add the record to the folder.")]
Measured = Annotated[
    str | None,
    typer.Argument(
        help="Folder, hub id, `mini`, `random` (small, not for --versus), `bench-122m-bf16` or "
        "`bench-122m-release` (random weights of every kind, written for the run)."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        help="Compare with `transformers` or `llama.cpp` in the same run; NAME:8192 asks it "
        "for no more than 8192 tokens. May be repeated. Or `v3.2`: attention at --geometry alone."
    ),
]


@dataclass(frozen=True)
class _Output:
    """Where a record goes."""

    results: Path
    save: bool
    plot: bool
    as_json: bool


# What says nothing to a way of measuring, by the names of the parameters.
_BY_DEPTH = ("model", "depth", "to", "decode", "chunk", "cache")
_IN_TURNS = ("rounds", "patience")
_UNUSED = {
    "--versus v3.2": (*_BY_DEPTH, *_IN_TURNS),
    "--geometry": ("versus", *_BY_DEPTH, *_IN_TURNS),
    "--versus": ("to", "cache", "geometry", "context"),
    "a run by depth": ("context", *_IN_TURNS),
}


@app.command()
def bench(
    frame: typer.Context,
    model: Measured = None,
    depth: Annotated[
        list[int] | None, typer.Option(help="Tokens; may be repeated. Else 1K, 4K, 16K, ...")
    ] = None,
    to: Annotated[
        int | None,
        typer.Option(help="... up to so many tokens: 131072, or what the model has.", min=1),
    ] = None,
    decode: Annotated[int, typer.Option(help="Steps to measure at each depth.", min=1)] = 16,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill step.", min=1)] = 512,
    geometry: Annotated[
        str | None, typer.Option(help="v4-flash or v4-pro: time its attention, without weights.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache of --geometry.")] = 1048576,
    cache: CacheKind = "release",
    device: Device = "cpu",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Kernel backend, else `auto`; repeated: compared with the first."),
    ] = None,
    versus: Peers = None,
    rounds: Annotated[int, typer.Option(help="Readings at each depth, of --versus.", min=1)] = 3,
    patience: Patience = None,
    threads: Threads = None,
    seed: Drawn = 0,
    results: Results = Path("results"),
    save: Save = True,
    plot: Annotated[bool, typer.Option("--plot", help="Also draw it: a PNG beside it.")] = False,
    plot_of: Annotated[
        Path | None, typer.Option(help="Measure nothing: draw the newest record of this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure tokens a second and memory at several depths, and record it.

    Example: `overleap bench mini --to 1048576 --backend torch --backend cpu --threads 2 --plot`
    """
    if plot_of is not None:
        _draw(plot_of)
        return
    if depth and to is not None:
        raise RequestError("--depth and --to both say how deep", "give one of them")
    _refuse_plot(plot, save, geometry is not None or bool(versus))
    way = _way(versus, geometry)
    _refuse_unfit(frame, way, context)
    if versus:
        _refuse_versus(model, device, patience)
    backends = backend or ["auto"]
    settings = _settings(backends, device, threads, seed)
    output = _Output(results, save, plot, as_json)
    if versus and way == "--versus v3.2":
        _generations(versus, geometry, context, backends, settings, output)
        return
    if geometry is not None:
        _geometry(geometry, context, backends, settings, output)
        return
    settings |= {"cache": cache, "chunk_tokens": chunk, "decode_steps": decode}
    if versus:
        found = compare(model, depth, versus, rounds, backends, patience, settings)
        _report("versus", *found, output)
        return
    _speed(model, depth, to, backends, settings, output)


def _way(versus: list[str] | None, geometry: str | None) -> str:
    """Of measuring, as _UNUSED calls it."""
    if versus and "v3.2" in versus:
        return "--versus v3.2"
    if geometry is not None:
        return "--geometry"
    return "--versus" if versus else "a run by depth"


def _refuse_unfit(frame: typer.Context, way: str, context: int) -> None:
    """Raise for what was given and would do nothing, and for a cache that is not of whole pages."""
    given = []
    for name in _UNUSED[way]:
        source = frame.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given.append("MODEL" if name == "model" else f"--{name}")
    if given:
        raise RequestError(f"{', '.join(given)} would do nothing in {way}", "leave it out")
    if "context" not in _UNUSED[way] and (context < 128 or context % 128):
        raise RequestError(
            f"--context is {context}", "it must be a multiple of 128, and 128 at least"
        )


def _refuse_plot(plot: bool, save: bool, other: bool) -> None:
    """Raise where --plot has nothing to draw from; `other`: not a run by depth."""
    if plot and (other or not save):
        raise RequestError(
            "--plot draws the saved record of a run by depth",
            "leave out --no-save and --geometry",
        )


def _refuse_versus(model: str | None, device: str, patience: float | None) -> None:
    """Raise where other programs cannot be asked so."""
    if device != "cpu":
        raise RequestError(f"--versus compares on the CPU, --device is {device}")
    if model == "random":
        raise RequestError(
            "--versus needs a checkpoint in files, `random` is in memory only",
            "bench-122m-bf16 and bench-122m-release are written for the run",
        )
    if patience is not None and not 0 < patience < math.inf:
        raise RequestError(
            f"--patience is {patience}", "it is a number above 0: 10 waits ten times as long"
        )


def _settings(backends: list[str], device: str, threads: int | None, seed: int) -> dict[str, Any]:
    """What every record says of how it was measured. A backend that cannot serve, or that serves
    an op wrongly, raises here."""
    import torch

    from overleap import devices
    from overleap.kernels import table
    from overleap.kernels.conformance import refuse_red

    where = devices.find(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if len(set(backends)) < len(backends):
        raise RequestError(f"--backend names one twice: {', '.join(backends)}")
    settings: dict[str, Any] = {
        "backend": ", ".join(backends),
        "device": str(where),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    for name in backends:
        screen.note(f"proving the ops of {name}")
        refuse_red(name, where.type)
        who: dict[str, list[str]] = {}
        for line in table(name, where.type):
            who.setdefault(line.backend, []).append(line.op)
        settings[f"ops_of_{name}"] = "; ".join(
            f"{one}: {' '.join(ops)}" for one, ops in who.items()
        )
    return settings


def _speed(
    model: str | None,
    depth: list[int] | None,
    to: int | None,
    backends: list[str],
    settings: dict[str, Any],
    output: _Output,
) -> None:
    """Read one text up to each depth, and write a little there; again with every backend."""
    from overleap.eval.speed import Speed, ladder, open_model, speed
    from overleap.kernels import native

    form = cache_format_of(settings["cache"])
    depths = depth or (None if to is None else ladder(to))
    found: dict[str, list[Speed]] = {}
    weights = None
    try:
        for backend in backends:
            built, name, weights = open_model(model, settings["seed"], backend, settings["device"])
            settings["config"] = json.dumps(built.config.to_dict())  # `overleap plan` learns of it
            settings["model"] = name
            with screen.bar(f"reading with {backend}", "tokens") as bar:
                measured = speed(
                    built,
                    depths,
                    decode_tokens=settings["decode_steps"],
                    chunk_tokens=settings["chunk_tokens"],
                    format=form,
                    seed=settings["seed"],
                    native=native(backend, built.device.type),
                    progress=bar,
                )
                found[backend] = []
                for one in measured:
                    found[backend].append(one)
            del built, measured  # before the next one is opened
    finally:  # what was measured is told and kept, whatever came then
        if any(found.values()):
            _tell_speed(found, backends, settings, weights, output)


def _tell_speed(
    found: "dict[str, list[Speed]]",
    backends: list[str],
    settings: dict[str, Any],
    weights: str | None,
    output: _Output,
) -> None:
    from overleap.eval.speed import rows_of

    numbers = rows_of(found)
    columns = ["depth", "prefill/s", "latest/s", "decode/s", "cache", "peak (to predicted)"]
    if len(backends) > 1:
        columns = ["backend", *columns[:4], "peak", f"of {backends[0]}"]
    title = (
        f"{settings['model']}, one sequence: tokens/s of all tokens read, of those since the "
        "depth before, and of writing"
    )
    shown = screen.Shown(
        title, columns, [_cells(row, backends[0], len(backends) > 1) for row in numbers]
    )
    _report("speed", shown, numbers, settings, weights, output)


def _cells(row: dict[str, Any], first: str, several: bool) -> tuple[str, ...]:
    """A row for people: of one backend, or of several beside the first. The record has more."""
    from overleap.eval.plot import depth_label

    rates = (
        depth_label(row["depth_tokens"]),
        f"{row['prefill_tokens_per_s']:,.0f}",
        f"{row['interval_tokens_per_s']:,.0f}",
        f"{row['decode_tokens_per_s']:,.1f}",
    )
    peak, off = size(row["peak_process_bytes"] or 0), row["peak_off_percent"]
    if not several:
        return (
            *rates,
            size(row["cache_bytes"]),
            peak + ("" if off is None else f" ({off:+.0f} %)"),
        )
    ratios = ""
    if row["backend"] != first:
        ratios = f"{row['prefill_ratio']:.2f}, {row['decode_ratio']:.2f}"
    return (row["backend"], *rates, peak, ratios)


def _geometry(
    name: str,
    tokens: int,
    backends: list[str],
    settings: dict[str, Any],
    output: _Output,
) -> None:
    """Fill the caches of a released shape and time the attention of one decode step."""
    import torch

    from overleap.config import ModelConfig
    from overleap.eval.geometry import geometry
    from overleap.kernels import select
    from overleap.kernels.conformance.ceilings import ceilings

    config, device = ModelConfig.preset(name), torch.device(settings["device"])
    numbers: list[dict[str, Any]] = []
    rows: list[tuple[object, ...]] = []
    title = ""
    for backend in backends:
        with screen.bar(f"filling the cache of {name}", "pools") as bar:
            found = geometry(
                config,
                select(backend, device.type),
                tokens,
                device=device,
                seed=settings["seed"],
                progress=bar,
            )
        peak = peak_resident_bytes() or 0
        limits = ceilings(device)  # after the peak was read: this takes memory too
        title = (
            f"{name}, {tokens:,} tokens: {found.bytes_per_token:,.2f} B of cache a token "
            f"(formula {found.formula_bytes_per_token:,.2f}), {size(found.page_bytes)} and "
            f"{size(found.window_bytes)} of windows, process {size(peak)}"
        )
        facts = asdict(found)
        del facts["parts"]
        numbers.append({"backend": backend} | facts | {"peak_process_bytes": peak})
        for part in found.parts:
            share, bound = part.share(limits)
            told = {"share": share, "ceiling": bound}
            numbers.append({"backend": backend} | asdict(part) | told)
            rows.append((backend, *_part_cells(numbers[-1])))
    settings |= {"geometry": name, "context_tokens": tokens} | ceiling_settings(limits)
    columns = ("backend", "part of a decode step", "layers", "time", "cache bytes read", "GB/s",
               "Gop/s", "of the ceiling")  # fmt: skip
    _report("geometry", screen.Shown(title, columns, rows), numbers, settings, None, output)


def _part_cells(row: dict[str, Any]) -> tuple[object, ...]:
    """A part of a step for people: rates are of all that it moves and counts."""
    return (
        row["part"],
        row["layers"],
        f"{1000 * row['step_s']:,.1f} ms",
        size(row["read_bytes"]),
        f"{row['moved_bytes'] / row['step_s'] / 1e9:.2f}",
        f"{row['operations'] / row['step_s'] / 1e9:,.1f}",
        f"{100 * row['share']:.0f} % of {row['ceiling']}",
    )


def _generations(
    versus: list[str],
    geometry: str | None,
    tokens: int,
    backends: list[str],
    settings: dict[str, Any],
    output: _Output,
) -> None:
    """The attention of V4 and of V3.2, measured."""
    from overleap.cli.generations import versus_previous

    if len(versus) > 1:
        raise RequestError(f"--versus names {', '.join(versus)}", "v3.2 stands alone")
    shown, numbers, settings = versus_previous(geometry, tokens, backends, settings)
    _report("generations", shown, numbers, settings, None, output)


def _report(
    subject: str,
    table: screen.Shown,
    numbers: list[dict[str, Any]],
    settings: dict[str, Any],
    weights: str | None,
    output: _Output,
) -> None:
    """The table, or the record as JSON; then the record is kept, and drawn."""
    from overleap.eval.record import append, take

    record = take(subject, numbers, settings, weights=weights, device=settings["device"])
    if output.as_json:
        sys.stdout.write(record.to_json() + "\n")
    else:
        screen.put_table(table.title, table.columns, table.rows)
    if (record.load or 0) > record.machine.cores + 0.5:
        screen.note(f"{record.load} processes shared the {record.machine.cores} cores")
    if output.save:
        path = append(record, output.results)
        screen.note(f"recorded in {path}")
        if output.plot:
            _draw(path)


def _draw(path: Path) -> None:
    """The newest record of a file, as a PNG beside it."""
    from overleap.eval.plot import plot
    from overleap.eval.record import read

    found = read(path)
    if not found:
        raise RequestError(f"{path} holds no record")
    screen.note(f"drawn in {plot(found[-1], path.with_suffix('.png'))}")
