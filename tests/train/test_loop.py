"""A run learns, resumes where it stopped, and its weights make a model folder that loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from overleap.checkpoint import load
from overleap.train.data import corpus, train_tokenizer
from overleap.train.loop import Recipe, Stage, Trainer, run
from overleap.train.publish import publish, trained_weights
from tests.train.small import small_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(corpus()[0][:60], path)
    return path


def tiny(seed: int, steps: int, **changes: object) -> Recipe:
    stages = (
        Stage(steps - 1, 256, 1, facts=4, turns=4),
        Stage(1, 384, 1, facts=4, turns=4, sparse=True, rounding=True, mtp=0.3),
    )
    recipe = Recipe(small_config(index_topk=16), stages, seed, ranks=1, compiled=False)
    return replace(recipe, warmup_steps=1, **changes)


def test_a_run_learns_and_logs(seed: int, tmp_path: Path, tokenizer: Path) -> None:
    run(tiny(seed, 12), tmp_path, tokenizer)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(12))
    assert log[-1]["length"] == 384 and "mtp" in log[-1] and "mtp" not in log[0]
    # Twelve steps find where facts stand at all; which of them is asked for takes hundreds.
    assert log[10]["attend3"] < log[0]["attend3"] - 0.5
    for record in log:
        assert {"answer", "right", "attend1", "index3", "kl3", "tokens_per_s"} <= set(record)


def test_a_resumed_run_ends_with_the_same_weights(
    seed: int, tmp_path: Path, tokenizer: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny(seed, 4), whole, tokenizer)
    parts.mkdir()
    first = Trainer(tiny(seed, 4), parts, Tokenizer.from_file(str(tokenizer)), 0)
    for _ in range(2):
        first.one(first.recipe.stage_at(first.step))
        first.step += 1
    first.save()
    run(tiny(seed, 4), parts, tokenizer)
    left, right = trained_weights(whole), trained_weights(parts)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_trained_weights_make_a_model_folder(seed: int, tmp_path: Path, tokenizer: Path) -> None:
    recipe = tiny(seed, 2)
    run(recipe, tmp_path / "run", tokenizer)
    (tmp_path / "run" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    target = tmp_path / "model"
    target.mkdir()
    (target / "MODEL_CARD.md").write_text("kept")
    publish(tmp_path / "run", target, recipe.config, "bf16")
    model = load(target)
    assert model.config.compress_ratios == (0, 4, 128, 4, 0)
    assert (target / "MODEL_CARD.md").read_text() == "kept"
    assert (target / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_rates_rise_hold_and_fall(seed: int) -> None:
    recipe = replace(tiny(seed, 100), warmup_steps=10)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == rates[60] == 1.0
    assert rates[99] == pytest.approx(0.05, abs=0.03)
    assert recipe.stage_at(98).length == 256 and recipe.stage_at(99).length == 384
