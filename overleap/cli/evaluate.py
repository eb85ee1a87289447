"""`overleap eval`: planted tasks by depth and length, bits per byte, two forms side by side.

Not speed (bench.py). Read next: eval/grid.py, eval/language.py.
"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import Device, Json, app, cache_format_of, text_of
from overleap.cli.session import import_torch
from overleap.errors import RequestError

if TYPE_CHECKING:
    from overleap.eval.grid import Asked

evaluate = typer.Typer(no_args_is_help=True, help="Measure what a model finds and predicts.")
app.add_typer(evaluate, name="eval")

Name = Annotated[str, typer.Argument(help="Folder, hub id org/name, or `mini`.")]
Cache = Annotated[str, typer.Option("--cache", help="`release` or `wide` (no rounding).")]
Dense = Annotated[bool, typer.Option("--dense", help="Attend all entries, not the chosen ones.")]
Text = Annotated[
    str | None, typer.Option(help="File to read; else the standard library's sources.")
]


@evaluate.command()
def tasks(
    model: Name = "mini",
    kind: Annotated[
        str, typer.Option(help="`fact`, `values` (several needles) or `chain` (references).")
    ] = "fact",
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths; 4096 unless given.")] = None,
    seeds: Annotated[int, typer.Option(help="Documents of each length.", min=1)] = 1,
    first_seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 1,
    planted: Annotated[int, typer.Option(help="Tasks in a document.", min=1)] = 8,
    size: Annotated[int, typer.Option(help="Values of a thing, or references in a chain.")] = 2,
    text: Text = None,
    cache: Cache = "release",
    dense: Dense = False,
    device: Device = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw a heat map into this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Plant tasks at all depths of real text and ask about each of them.

    Example: `overleap eval tasks mini --tokens 16384 --tokens 65536 --seeds 3 --plot map.png`
    """
    import_torch()
    from overleap.eval import grid
    from overleap.eval.reader import Reader
    from overleap.eval.tasks import KINDS

    if kind not in KINDS:
        raise RequestError(f"--kind is {kind!r}", f"kinds are {', '.join(KINDS)}")
    if plot is not None:
        grid.refuse_plot(plot)
    reader = Reader.open(model, format=cache_format_of(cache), dense=dense, device=device)
    chosen = range(first_seed, first_seed + seeds)
    lengths = tokens or [4096]
    found: list[grid.Asked] = []
    try:
        with screen.bar("reading", "tokens") as bar:
            answers = grid.grid(
                reader,
                lengths,
                chosen,
                kind=kind,
                tasks=planted,
                size=size,
                text=None if text is None else text_of(text),
                progress=bar,
            )
            found.extend(answers)
    finally:  # what was measured is shown, whatever came then
        if found:
            _show(found, kind, planted, as_json)
    if plot is not None:
        grid.draw(found, plot)


def _show(found: "list[Asked]", kind: str, planted: int, as_json: bool) -> None:
    if as_json:
        screen.put_json([one.to_dict() for one in found])
        return
    documents = [found[at : at + planted] for at in range(0, len(found), planted)]
    rows = [
        (f"{d[0].tokens:,}", d[0].seed, f"{sum(a.right for a in d)}/{len(d)}") for d in documents
    ]
    right = sum(one.right for one in found)
    screen.put_table(f"{kind}: {right} of {len(found)} right", ("tokens", "seed", "right"), rows)


@evaluate.command()
def bits(
    model: Name = "mini",
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=16)] = 16384,
    cache: Cache = "release",
    dense: Dense = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Bits per byte of a text by depth, beside gzip -9 and xz -9; and perplexity.

    Example: `overleap eval bits mini --text manual.txt --tokens 65536`
    """
    import_torch()
    from overleap.eval.language import bits_per_byte
    from overleap.eval.reader import Reader

    reader = Reader.open(model, format=cache_format_of(cache), dense=dense, device=device)
    with screen.bar("reading", "tokens") as bar:
        found = bits_per_byte(reader, _text(text), tokens, progress=bar)
    if as_json:
        screen.put_json(asdict(found))
        return
    rows = [("the model", f"{found.bits_per_byte:.3f}")]
    for number, value in enumerate(found.by_depth):
        rows.append((f"quarter {number + 1} of the text", f"{value:.3f}"))
    rows += [("gzip -9", f"{found.gzip:.3f}"), ("xz -9", f"{found.xz:.3f}")]
    title = (
        f"{found.tokens:,} tokens, {found.bytes:,} bytes, perplexity a token {found.perplexity:.2f}"
    )
    screen.put_table(title, ("", "bits per byte"), rows)


@evaluate.command()
def forms(
    first: Annotated[str, typer.Argument(help="The form that counts as exact.")],
    second: Annotated[str, typer.Argument(help="The form that is held against it.")],
    first_cache: Annotated[str, typer.Option(help="`release` or `wide`.")] = "wide",
    second_cache: Annotated[str, typer.Option(help="`release` or `wide`.")] = "release",
    first_dense: Annotated[bool, typer.Option("--first-dense", help="Attend all entries.")] = False,
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.", min=16)] = 4096,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How far two storage forms of one model are apart on a text.

    Example: `overleap eval forms ./run/checkpoints/step-000400 ./model`
    """
    import_torch()
    from overleap.eval.language import apart
    from overleap.eval.reader import Reader

    a = Reader.open(first, format=cache_format_of(first_cache), dense=first_dense, device=device)
    b = Reader.open(second, format=cache_format_of(second_cache), device=device)
    ids = [a.tokenizer.bos_id, *a.tokenizer.encode_start(_text(text), tokens)]
    with screen.bar("reading", "tokens") as bar:
        found = apart(a, b, ids, bar)
    if as_json:
        screen.put_json(asdict(found) | {"loss": found.loss})
        return
    rows: list[tuple[str, Any]] = [
        ("KL, mean", f"{found.kl:.5f} nats"),
        ("KL, 99th percentile", f"{found.kl_99:.4f} nats"),
        ("same likeliest token", f"{found.agree:.2%}"),
        ("bits per token", f"{found.bits[0]:.4f} and {found.bits[1]:.4f}"),
        ("the second needs more", f"{found.loss:+.2%}"),
    ]
    screen.put_table(f"{found.tokens:,} tokens", ("", ""), rows)


def _text(name: str | None) -> str:
    from overleap.eval.needle import stdlib_text

    return stdlib_text() if name is None else text_of(name)
