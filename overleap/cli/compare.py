"""The command that shows the published efficiency: V3.2, V4-Pro and V4-Flash by context.

No torch. Not here: the figures (plan/compare.py), the pictures (eval/efficiency.py).
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from overleap.cli import screen
from overleap.cli.app import Json
from overleap.cli.plan import plans
from overleap.eval.efficiency import context_label, draw, text_chart
from overleap.plan import Assumptions
from overleap.plan import compare as beside
from overleap.plan.compare import BASELINE, CONTEXTS, Row
from overleap.plan.flops import Rules


@plans.command()
def compare(
    tokens: Annotated[
        list[int] | None, typer.Option("--context", help="Tokens; repeated. Else 4K to 1M.", min=1)
    ] = None,
    bf16_cache: Annotated[
        bool, typer.Option("--bf16-cache", help="Cached values in BF16, as some engines keep them.")
    ] = False,
    windows: Annotated[bool, typer.Option(help="Count the 128-token windows.")] = True,
    count_fp8: Annotated[float, typer.Option(help="What an FP8 operation counts.", min=0)] = 1.0,
    count_bf16: Annotated[float, typer.Option(help="A BF16 one.", min=0)] = 2.0,
    count_core: Annotated[float, typer.Option(help="One of core attention.", min=0)] = 2.0,
    count_fp4: Annotated[float, typer.Option(help="One of V4's FP4 indexer.", min=0)] = 0.5,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for efficiency.png and .svg (.txt without them).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show FLOPs of a token and bytes of a cache for V3.2, V4-Pro and V4-Flash by context.

    Every assumption is named in the output and has an option.

    Example: `overleap plan compare --plot pictures`
    """
    rules = Rules(count_fp8, count_bf16, count_core, count_fp4)
    assumed = Assumptions(rules, bf16_cache, windows)
    rows = beside(sorted(tokens) if tokens else CONTEXTS, assumed)
    if as_json:
        screen.put_json({"assumptions": assumed.lines(), "rows": [row.row() for row in rows]})
    else:
        _show(rows, assumed)
    if plot is not None:
        paths = draw(rows, plot)
        screen.note("drawn in " + ", ".join(str(path) for path in paths))
        if paths[0].suffix == ".txt":
            screen.note("for pictures, pip install overleap[plots]")


def _show(rows: list[Row], assumed: Assumptions) -> None:
    flops: list[tuple[str, ...]] = []
    cache: list[tuple[str, ...]] = []
    for row in rows:
        first = row.model == BASELINE
        head = (context_label(row.context) if first else "", row.model)
        parts = (f"{value / 1e9:,.1f}" for value in row.parts.values())
        share = "" if first else f"{row.flops_share:.1%} {1 / row.flops_share:.2f}x"
        flops.append((*head, f"{row.counted / 1e9:,.1f}", *parts, share))
        share = "" if first else f"{row.cache_share:.2%} {1 / row.cache_share:.2f}x"
        gqa = "" if row.gqa_share is None else f"{row.gqa_share:.2%}"
        cache.append((*head, f"{row.cache_bytes / 1e9:,.3f}", share, gqa))
    columns = ("", "model", "GFLOP", "dense", "experts", "core", "indexer", "of V3.2")
    screen.put_table("a token at a context, as FP8 operations", columns, flops)
    screen.put_table("cache", ("", "model", "GB", "of V3.2", "of BF16 GQA-8"), cache)
    sys.stdout.write("\n".join(f"- {line}" for line in assumed.lines()) + "\n\n")
    sys.stdout.write(text_chart(rows))
