"""The planner on this machine: what records predict, and predicted against measured.

No torch, but to save. Not here: the arithmetic (plan/calibrate.py).
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import Json
from overleap.cli.plan import plans
from overleap.errors import RequestError
from overleap.plan.calibrate import Checked, Where, runs_of
from overleap.plan.calibrate import check as against_others

Results = Annotated[Path, typer.Option(help="Folder of the records of `overleap bench`.")]


@plans.command()
def check(
    results: Results = Path("results"),
    every: Annotated[
        bool, typer.Option("--every", help="Records of other machines and threads too.")
    ] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Add the errors to the folder, in plan.jsonl.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hold what the planner predicts against what `overleap bench` measured here.

    Each record is predicted from the others, so none predicts itself.

    Example: `overleap plan check --results results`
    """
    found = against_others(runs_of(results))
    here = Where.here()
    if not every:
        found = [one for one in found if (one.run.where.cpu, one.run.where.cores,
                 one.run.where.device) == (here.cpu, here.cores, here.device)]  # fmt: skip
    if not found:
        raise RequestError(
            f"{results} has no record of this machine that says the model's config",
            "`overleap bench` makes one",
        )
    rows, errors = [_row(one) for one in found], _errors(found)
    if as_json:
        screen.put_json({"errors": errors, "runs": rows})
    else:
        _show(found, errors)
    if save:
        from overleap.eval.record import append, take

        path = append(take("plan", rows, {**errors, "runs": len(rows)}), results)
        screen.note(f"recorded in {path}")


def _row(one: Checked) -> dict[str, Any]:
    run = one.run
    return {
        "date": run.date,
        "model": run.model,
        "backend": run.where.backend,
        "threads": run.where.threads,
        "depth_tokens": run.depth,
        "from_the_same_model": one.own,
        "decode_s": run.step_s,
        "predicted_decode_s": one.step_s,
        "decode_error": one.decode_error,
        "read_error": one.read_error,
        "cache_bytes": run.cache_bytes,
        "predicted_cache_bytes": one.cache_bytes,
        "cache_error": one.cache_error,
        "peak_process_bytes": run.peak_bytes,
        "predicted_peak_bytes": one.peak_bytes,
        "peak_error": one.peak_error,
    }


def _errors(found: Sequence[Checked]) -> dict[str, float | None]:
    """The middle and the worst of each kind, as shares; None: nothing to hold against."""
    kinds: dict[str, Sequence[float | None]] = {
        "cache": [one.cache_error for one in found],
        "peak": [one.peak_error for one in found],
        "decode": [one.decode_error for one in found],
        "read": [one.read_error for one in found],
    }
    said: dict[str, float | None] = {}
    for name, errors in kinds.items():
        known = [abs(error) for error in errors if error is not None]
        said[f"{name}_median"] = statistics.median(known) if known else None
        said[f"{name}_worst"] = max(known, default=None)
    return said


def _show(found: Sequence[Checked], errors: dict[str, float | None]) -> None:
    cells: list[tuple[str, ...]] = []
    for one in found:
        run = one.run
        predicted = "" if not one.step_s else f"{1 / one.step_s:,.0f}"
        cells.append(
            (
                f"{run.model} {run.where.backend} {run.where.threads}",
                f"{run.depth:,}",
                f"{1 / run.step_s:,.0f}",
                predicted,
                _percent(one.decode_error),
                _percent(one.read_error),
                f"{one.cache_error:+.0%}" if one.cache_error else "exact",
                _percent(one.peak_error),
            )
        )
    columns = ("model", "depth", "tokens/s", "predicted", "off", "reading", "cache", "peak")
    screen.put_table("each record, predicted from the others", columns, cells)
    worst = ", ".join(
        f"{name} {_percent(errors[f'{name}_median'])} ({_percent(errors[f'{name}_worst'])})"
        for name in ("cache", "peak", "decode", "read")
    )
    sys.stdout.write(f"median (worst) error: {worst}\n")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:+.0%}"
