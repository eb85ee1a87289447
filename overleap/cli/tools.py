"""Commands that examine: logits, kernels, conform, version.

Not here: checkpoints (models.py).
"""

import json
import math
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap import __version__
from overleap.cli import screen
from overleap.cli.app import CacheKind, Json, Seed, app, cache_format_of, text_of
from overleap.errors import RequestError


@app.command()
def logits(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `mini`.")],
    ids: Annotated[Path, typer.Argument(help="A JSON array of token ids.")],
    out: Annotated[Path, typer.Argument(help="Where to write: tensor `logits` [tokens, V] f32.")],
    cache: CacheKind = "release",
    chunk: Annotated[int, typer.Option(help="Tokens of one step.", min=1)] = 512,
) -> None:
    """Write the logits of every position, to hold this against another implementation.

    Example: `overleap logits mini ids.json logits.safetensors --cache wide`
    """
    from overleap.checkpoint import load, locate
    from overleap.eval.logits import all_logits, write_logits

    try:
        tokens = json.loads(text_of(str(ids)))
    except json.JSONDecodeError as error:
        raise RequestError(f"{ids} is not JSON: {error}") from None
    loaded = load(locate(model), wide=cache_format_of(cache) == "wide")
    with screen.bar("reading", "tokens") as bar:
        write_logits(out, all_logits(loaded, tokens, cache_format_of(cache), chunk, bar))


@app.command()
def kernels(
    backend: Annotated[str, typer.Option(help="Kernel backend, or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say which backend serves each op, and why no better one.

    Example: `overleap kernels --backend cpu`
    """
    from overleap.kernels import table

    served = table(backend)
    if as_json:
        screen.put_json([asdict(row) for row in served])
        return
    rows = [(row.op, row.backend, row.reason) for row in served]
    screen.put_table(f"{backend} on cpu", ("op", "served by", "why no other"), rows)


@app.command()
def conform(
    backend: Annotated[str, typer.Option(help="Kernel backend to prove.")] = "torch",
    op: Annotated[list[str] | None, typer.Option(help="Only these ops.")] = None,
    seed: Seed = None,
    timed: Annotated[bool, typer.Option(help="Also measure GB/s.")] = False,
    as_json: Json = False,
) -> None:
    """Hold every op of a backend against its definition.

    Example: `overleap conform --backend torch --op attend --op index_topk`
    """
    import torch

    from overleap.kernels import select
    from overleap.kernels.conformance import conform as run

    seed = secrets.randbelow(2**31) if seed is None else seed
    with screen.bar("proving", "ops") as bar:
        verdicts = run(
            select(backend), torch.device("cpu"), seed=seed, only=op, timed=timed, progress=bar
        )
    failed = [v for v in verdicts if not v.passed]
    if as_json:
        screen.put_json(
            {"backend": backend, "seed": seed, "verdicts": [_plain(asdict(v)) for v in verdicts]}
        )
    else:
        rows = []
        for v in verdicts:
            speed = v.gigabytes_per_second
            result = "ok" if v.passed else f"FAILED {v.reason or ''}".rstrip()
            allowed = f"{v.error:.2g} of {v.tolerance:.2g}"
            rows.append((v.op, v.case, result, allowed, f"{speed:.1f}" if speed else ""))
        columns = ("op", "case", "result", "error", "GB/s")
        screen.put_table(f"{backend}, seed {seed}", columns, rows)
        print(f"{len(verdicts) - len(failed)} of {len(verdicts)} cases passed")
    if failed:
        raise typer.Exit(1)


def _plain(verdict: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity: an error that no number can say is null, the reason stands beside."""
    return verdict | {"error": verdict["error"] if math.isfinite(verdict["error"]) else None}


@app.command()
def version(as_json: Json = False) -> None:
    """The versions of Overleap, Python and torch.

    Example: `overleap version --json`
    """
    import platform

    import torch

    facts = {
        "overleap": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if as_json:
        screen.put_json(facts)
    else:
        print("\n".join(f"{name} {value}" for name, value in facts.items()))
