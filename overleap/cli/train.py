"""Training from the command line: begin, go on, write the result in a storage form.

Not the loop (train/loop.py) nor what a recipe is (train/recipe.py). Read next: evaluate.py.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overleap.cli import screen
from overleap.cli.app import app
from overleap.cli.session import import_torch
from overleap.errors import TrainingError

if TYPE_CHECKING:
    from overleap.train.data import Source
    from overleap.train.recipe import Recipe


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(help="`mini`, `examples`, path.py, path.py:function, or `resume`."),
    ],
    folder: Annotated[Path, typer.Argument(help="Where the run lives: checkpoints, log, tokens.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder of text (.txt .rst .html .jsonl .parquet .gz ...)."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A model to go on from: a folder, `mini` or a hub id.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 1,
    spread: Annotated[
        bool, typer.Option("--spread-experts", help="Each process keeps its share of them only.")
    ] = False,
) -> None:
    """Train a model; the same line again, or `resume`, goes on where it stopped.

    Under torchrun every process runs this line, without --ranks.

    Example: `overleap train examples ./run` then `overleap train resume ./run`
    """
    # Products of every length of a tile are compiled once; the 1,024 kept else are too few.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    import_torch()
    from overleap.checkpoint import locate
    from overleap.config import ModelConfig
    from overleap.train.loop import recipe_of, run
    from overleap.train.recipe import recipe_named
    from overleap.train.recipes import RECIPES

    if recipe == "resume":
        if text or base:
            raise TrainingError("a run keeps its text and base", "leave out --text and --base")
        wanted = recipe_of(folder)
    else:
        wanted = recipe_named(recipe, RECIPES)
        if text:
            wanted = replace(wanted, text=tuple(map(str, text)))
        if base is not None:
            plain = {"torch_dtype": "float32", "expert_dtype": None, "quantization_config": None}
            config = ModelConfig.from_checkpoint(locate(base)).with_(**plain)
            wanted = replace(wanted, base=base, config=config)
        wanted = _placed(wanted)
    screen.note(f"{wanted.steps:,} steps; log, checkpoints and recipe in {folder}")
    within = _torchrun()
    with screen.bar("training", "steps") as bar:
        told = _Told(bar, wanted.steps)
        run(wanted, folder, ranks=ranks, within=within, spread=spread, report=told)
    if (within is None or within[0] == 0) and not (folder / "losses.png").exists():
        screen.note("no losses.png was drawn: it takes `pip install overleap[plots]`")
    print(folder)


def _placed(recipe: "Recipe") -> "Recipe":
    """With paths that hold wherever the run goes on. Raises TrainingError where text is missing."""
    from overleap.checkpoint import locate
    from overleap.train.data import Chat

    sources = [source for stage in recipe.stages for source in stage.mixture]
    if not recipe.text and not (recipe.base and all(isinstance(s, Chat) for s in sources)):
        raise TrainingError("this recipe takes text: give --text")

    def whole(source: "Source") -> "Source":
        if not isinstance(source, Chat):
            return source
        return replace(source, path=str(Path(source.path).resolve()))

    return replace(
        recipe,
        text=tuple(str(Path(path).resolve()) for path in recipe.text),
        base=str(locate(recipe.base).resolve()) if recipe.base else "",
        stages=tuple(
            replace(stage, mixture=tuple(map(whole, stage.mixture))) for stage in recipe.stages
        ),
    )


def _torchrun() -> tuple[int, int, int] | None:
    """This process's rank, how many there are and how many of them here, under torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, ranks, here = (os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return int(rank), int(ranks), int(here)


class _Told:
    """Moves the bar, and says the losses on a line now and then."""

    def __init__(self, bar: Any, steps: int) -> None:
        self.bar, self.steps = bar, steps

    def __call__(self, record: dict[str, float]) -> None:
        if "rolled_back_to" in record:
            screen.note(
                f"a spike at step {record['step']} (loss {record['loss']:.3g}): "
                f"back to step {record['rolled_back_to']}"
            )
            return
        step = int(record["step"]) + 1
        self.bar(step, self.steps)
        if step % 10 == 0 or step == self.steps:
            parts = [f"step {step:,} of {self.steps:,}", f"loss {record['loss']:.3f}"]
            parts += [f"{key} {record[key]:.3f}" for key in _SHOWN if key in record]
            parts += [f"{record['tokens_per_s']:,} tokens/s", f"MFU {record['mfu']:.0%}"]
            screen.note(" · ".join([*parts, f"{record['minutes_left']:.0f} min left"]))


_SHOWN = ("language", "answer", "mtp")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    form: Annotated[str, typer.Option(help="release (FP8 + FP4), bf16 or f32.")] = "release",
) -> None:
    """Write the newest checkpoint of a run in a storage form.

    Every checkpoint of a run already is a model folder in float32; this makes it small.

    Example: `overleap export ./run ./model --form release`
    """
    import_torch()
    from overleap.chat.profiles import PROFILE_KEY, profile_for
    from overleap.checkpoint import convert
    from overleap.train import kept

    step = kept.newest(run)
    if step is None:
        raise TrainingError(f"{run} has no checkpoint", "a run writes one every few minutes")
    place = kept.place(run, step)
    told = {PROFILE_KEY: profile_for(place).name}  # the target's name may say something else
    with screen.bar("writing", "B") as bar:
        convert(place, target, form, tokenizer_config=told, progress=bar)  # type: ignore[arg-type]
    print(target)
