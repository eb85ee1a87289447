"""Train a very small V4 on a folder of text, then run it. Seconds, not quality.

Run: python examples/train_tiny.py [TEXT]
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import overleap
from overleap.train import kept
from overleap.train.data import Tasks, Text
from overleap.train.loop import run
from overleap.train.recipe import Stage
from overleap.train.recipes import examples

HERE = Path(__file__).resolve().parents[1] / "overleap"


def main(text: str = str(HERE)) -> None:
    rows = (Tasks(0.5, "fact", 4, 4), Text(0.5))
    recipe = replace(
        examples(),
        text=(text,),
        stages=(
            Stage(5, 256, 2, rows, mtp=0.3),
            Stage(1, 256, 2, rows, sparse=True, rounding=True),
        ),
        compiled=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        run(recipe, Path(folder), report=lambda record: print(record["step"], record["loss"]))
        model = overleap.load(kept.place(Path(folder), recipe.steps))
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
