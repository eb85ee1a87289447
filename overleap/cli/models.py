"""Commands about checkpoints: show, verify, convert.

Not here: the work itself (overleap/checkpoint).
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import Json, models
from overleap.machine import size


@models.command()
def show(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `mini`.")], as_json: Json = False
) -> None:
    """Layers, parameters, bytes by storage type and cache cost of a checkpoint.

    Example: `overleap models show mini`
    """
    from overleap.chat.profiles import profile_for
    from overleap.checkpoint import locate
    from overleap.checkpoint import show as facts_of

    folder = locate(model)
    facts = facts_of(folder) | {"chat_profile": profile_for(folder).name}
    if as_json:
        screen.put_json(facts)
        return
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            text = ", ".join(f"{name} {_fact(name, item)}" for name, item in value.items())
        else:
            text = _fact(key, value)
        rows.append((key.replace("_", " "), text))
    screen.put_table(str(folder), ("fact", "value"), rows)


def _fact(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_fact(key, item)}" for key, item in value.items()) + ")"
    return (
        f"{value:,}"
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else str(value)
    )


@models.command()
def verify(
    model: Annotated[str, typer.Argument(help="Folder, hub id or `mini`.")],
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Trust the files as they are; record digests.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every byte of a checkpoint and name what is damaged.

    Example: `overleap models verify ./my-checkpoint`
    """
    from overleap.checkpoint import locate
    from overleap.checkpoint import verify as check
    from overleap.checkpoint import write_manifest as record
    from overleap.checkpoint.folder import Checkpoint

    folder = locate(model)
    with screen.bar("reading", "B") as bar:
        if write_manifest:
            Checkpoint(folder)  # a folder that is none gets no manifest
            record(folder, bar)
        report = check(folder, bar)
    if as_json:
        screen.put_json(
            {
                "ok": report.ok,
                "has_manifest": report.has_manifest,
                "files": report.files,
                "tensors": report.tensors,
                "bytes": report.bytes,
                "problems": [str(problem) for problem in report.problems],
            }
        )
    else:
        for problem in report.problems:
            print(problem)
        word = "sound" if report.ok else f"{len(report.problems)} problems"
        print(f"{folder}: {word}, {report.tensors} tensors, {size(report.bytes)}")
        if not report.has_manifest:
            screen.note(
                "no manifest: names, types and shapes were checked, flipped bits cannot be seen"
                if report.tensors
                else "no manifest, and no tensor that could be checked"
            )
    if not report.ok:
        raise typer.Exit(1)


@models.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder, hub id or `mini`.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    form: Annotated[str, typer.Option(help="release (FP8 + FP4), bf16 or f32.")] = "release",
) -> None:
    """Write a checkpoint in another storage form, tensor by tensor.

    Example: `overleap models convert mini ./mini-f32 --form f32`
    """
    from overleap.chat.profiles import PROFILE_KEY, profile_for
    from overleap.checkpoint import convert as run
    from overleap.checkpoint import locate

    folder = locate(source)
    told = {PROFILE_KEY: profile_for(folder).name}  # the target's name may say something else
    with screen.bar("writing", "B") as bar:
        run(folder, target, form, tokenizer_config=told, progress=bar)  # type: ignore[arg-type]
    print(target)
