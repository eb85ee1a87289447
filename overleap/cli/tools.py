"""Commands that examine: logits, kernels, conform, version.

Not here: checkpoints (models.py).
"""

import json
import math
import secrets
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overleap import __version__
from overleap.cli import screen
from overleap.cli.app import CacheKind, Json, Threads, app, cache_format_of, text_of
from overleap.devices import KINDS
from overleap.errors import RequestError

if TYPE_CHECKING:
    import torch

    from overleap.kernels.conformance import Ceilings, Verdict


Where = Annotated[
    str,
    typer.Option(
        "--device",
        help=f"{', '.join(kind.name for kind in KINDS)} or auto; npu:1 names the second.",
    ),
]


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
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise RequestError(f"{out} cannot be written: no file can be there")
    loaded = load(locate(model), wide=cache_format_of(cache) == "wide")
    with screen.bar("reading", "tokens") as bar:
        write_logits(out, all_logits(loaded, tokens, cache_format_of(cache), chunk, bar))


@app.command()
def kernels(
    backend: Annotated[str, typer.Option(help="Kernel backend, or auto.")] = "auto",
    device: Where = "cpu",
    as_json: Json = False,
) -> None:
    """Say which backend serves each op, and why no better one.

    Example: `overleap kernels --backend cpu`
    """
    from overleap import devices
    from overleap.kernels import DEFINITION, asked, table

    where = devices.find(device).type
    served = table(backend, where)
    if as_json:
        screen.put_json([asdict(row) for row in served])
        return
    rows = [(row.op, row.backend, row.reason) for row in served]
    line = ", ".join(dict.fromkeys((*asked(backend, where), DEFINITION)))
    title = f"{backend} on {device}: asked in order, {line}"
    screen.put_table(title, ("op", "served by", "why no other"), rows)


@app.command()
def conform(
    backend: Annotated[str, typer.Option(help="Kernel backend to prove.")] = "torch",
    op: Annotated[list[str] | None, typer.Option(help="Only these ops.")] = None,
    device: Where = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Of the inputs; drawn when not given.", min=0, max=2**62)
    ] = None,
    timed: Annotated[
        bool, typer.Option("--timed", help="Also measure, against this machine's own ceilings.")
    ] = False,
    threads: Threads = None,
    record: Annotated[
        Path | None, typer.Option(help="Add what was found to conform.jsonl in this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold every op of a backend against its definition, and its speed against the machine.

    Example: `overleap conform --backend cpu --op attend --op index_topk --timed --threads 2`
    """
    import torch

    from overleap import devices
    from overleap.kernels import select, table
    from overleap.kernels.conformance import conform as run
    from overleap.kernels.conformance.ceilings import ceilings

    if threads is not None:
        torch.set_num_threads(threads)
    seed = secrets.randbelow(2**31) if seed is None else seed
    where = devices.find(device)
    best = ceilings(where) if timed else None
    with screen.bar("proving", "ops") as bar:
        ops = select(backend, where.type)
        verdicts = run(ops, where, seed=seed, only=op, timed=timed, progress=bar)
    failed = [v for v in verdicts if not v.passed]
    tried = {v.op for v in verdicts}
    server = {row.op: row.backend for row in table(backend, where.type) if row.op in tried}
    if record is not None:
        _keep(record, verdicts, best, backend, where, seed)
    if as_json:
        screen.put_json(
            {
                "backend": backend,
                "device": device,
                "seed": seed,
                "threads": torch.get_num_threads(),
                "ceilings": None if best is None else asdict(best),
                "served_by": server,
                "verdicts": [_facts(v, best) for v in verdicts],
            }
        )
    else:
        title = f"{backend} on {device}, seed {seed}, {torch.get_num_threads()} threads"
        screen.put_table(title, _COLUMNS[: 7 if best else 4], [_cells(v, best) for v in verdicts])
        print("\n".join(_summary(verdicts, best)))
        others = [f"{op} ({who})" for op, who in server.items() if who != backend]
        if others and backend != "auto":
            print(f"not served by {backend}: {', '.join(others)}")
    if failed:
        raise typer.Exit(1)


def _keep(
    folder: Path,
    verdicts: "list[Verdict]",
    best: "Ceilings | None",
    backend: str,
    where: "torch.device",
    seed: int,
) -> None:
    """A record of the run: a row an op, its fastest timed case where there is one."""
    import torch

    from overleap.eval.record import append, take
    from overleap.kernels import table

    rows: list[dict[str, Any]] = []
    for served in table(backend, where.type):
        found = [v for v in verdicts if v.op == served.op]
        if not found:
            continue
        timed = [v for v in found if v.seconds is not None]
        fast = max(timed, key=lambda v: v.gigabytes_per_second or 0.0, default=None)
        share = fast.share(best) if fast is not None and best is not None else None
        rows.append(
            {
                "op": served.op,
                "backend": served.backend,
                "cases": len(found),
                "passed": sum(v.passed for v in found),
                "gigabytes_per_s": fast and fast.gigabytes_per_second,
                "share": share and share[0],
                "ceiling": share and share[1],
            }
        )
    settings: dict[str, Any] = {
        "backend": backend,
        "device": where.type,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "timed": best is not None,
    }
    path = append(take("conform", rows, settings, device=where), folder)
    print(f"added to {path}", file=sys.stderr)


_COLUMNS = ("op", "case", "result", "error", "GB/s", "Gop/s", "of the ceiling")


def _cells(v: "Verdict", best: "Ceilings | None") -> tuple[str, ...]:
    """A verdict for people. Of an exception the type; its text stands once, below the table."""
    why = v.reason if v.exception is None else f"raised {v.exception.split(':')[0]}"
    result = "ok" if v.passed else f"FAILED {why or ''}".rstrip()
    cells = (v.op, v.case, result, f"{v.error:.2g} of {v.tolerance:.2g}")
    if best is None:
        return cells
    share = v.share(best)
    if share is None:
        return (*cells, "", "", "")
    return (
        *cells,
        f"{v.gigabytes_per_second:,.2f}",
        f"{v.gigaops_per_second:,.1f}",
        f"{100 * share[0]:.0f} % of {share[1]}",
    )


def _summary(verdicts: "list[Verdict]", best: "Ceilings | None") -> list[str]:
    """What stands below the table: every exception once, the machine's ceilings, the count."""
    raised = Counter(v.exception for v in verdicts if v.exception)
    lines = [f"{n} {'case' if n == 1 else 'cases'} raised {text}" for text, n in raised.items()]
    if best is not None:
        lines.append(_of_the_machine(best))
    return [*lines, f"{sum(v.passed for v in verdicts)} of {len(verdicts)} cases passed"]


def _facts(v: "Verdict", best: "Ceilings | None") -> dict[str, Any]:
    """A verdict for a program. JSON knows no infinity: an error that no number can say is null, the
    reason stands beside."""
    facts = asdict(v)
    must = facts.pop("cost") or {"bytes": None, "operations": None, "unit": None}
    share = None if best is None else v.share(best)
    return facts | {
        "error": v.error if math.isfinite(v.error) else None,
        **must,
        "gigabytes_per_s": v.gigabytes_per_second,
        "gigaops_per_s": v.gigaops_per_second,
        "share": share and share[0],
        "ceiling": share and share[1],
    }


def _of_the_machine(best: "Ceilings") -> str:
    """The ceilings in one line."""
    rates = [f"read {best.read.per_s / 1e9:,.1f} GB/s ({best.read.how})"]
    for unit, rate in (("f32", best.f32), ("bf16", best.bf16), ("int8", best.int8)):
        rates.append(f"{unit} {rate.per_s / 1e9:,.0f} Gop/s" if rate else f"{unit} none")
    return f"ceilings of {best.device}, {best.threads} threads: " + ", ".join(rates)


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
