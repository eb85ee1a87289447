"""docs/guides/train.md: its recipe is taken out, run as a file, and draws rows of every stage."""

import ast
import re
from pathlib import Path

from overleap.chat.profiles import profile_named
from overleap.chat.tokenizer import Tokenizer
from overleap.eval.needle import stdlib_sources
from overleap.train.data import Rows
from overleap.train.recipe import from_json, recipe_named
from overleap.train.recipes import RECIPES
from overleap.train.shards import build

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "train.md").read_text("utf-8")
(RECIPE,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
DRAWN = 20  # rows of each stage: some from each source of its mixture


def test_the_recipe_makes_rows_of_every_stage(tmp_path: Path, seed: int) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    recipe = recipe_named(str(tmp_path / "mine.py"), RECIPES)
    assert from_json(recipe.to_json()) == recipe
    tokenizer = Tokenizer.from_folder(ROOT / "overleap" / "bundled" / "mini")
    assert tokenizer.vocab_size == recipe.vocabulary == recipe.config.vocab_size
    shard, _ = build(list(stdlib_sources().items())[:30], tokenizer, tmp_path)
    rows = Rows(tokenizer, shard, seed, profile_named("v4-flash"))
    for number, stage in enumerate(recipe.stages):
        drawn = [rows.row(stage.mixture, number, n, stage.length) for n in range(DRAWN)]
        assert all(len(row.ids) == stage.length for row in drawn)
        assert {bool(row.answers) for row in drawn} == {True, False}


def test_the_recipe_imports_what_it_uses() -> None:
    nodes = list(ast.walk(ast.parse(RECIPE)))
    imported = {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert imported == imported & {n.id for n in nodes if isinstance(n, ast.Name)}
