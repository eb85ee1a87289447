"""A run learns, resumes exactly after kill -9, goes back from spikes, and serves as it is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overleap.chat.profiles import profile_for
from overleap.checkpoint import load
from overleap.config import Yarn
from overleap.errors import TrainingError
from overleap.eval.needle import stdlib_sources
from overleap.train import kept
from overleap.train.data import Chat, Text
from overleap.train.initial import initial_weights
from overleap.train.loop import Trainer, begin, run
from overleap.train.recipe import Recipe, from_json, recipe_named
from overleap.train.recipes import RECIPES
from tests.train.small import small_recipe

TIMES = {"tokens_per_s", "mfu", "minutes", "minutes_left"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a folder that has its tokenizer and tokens already."""
    home: Path = tmp_path_factory.mktemp("begun")
    (home / "text").mkdir()
    for number, text in enumerate(list(stdlib_sources().values())[:60]):
        (home / "text" / f"{number}.py").write_text(text)
    begin(small_recipe(0, 2, text=(str(home / "text"),)), home / "run")
    return home


def folder_for(begun: Path, recipe: Recipe, folder: Path) -> Recipe:
    """Another run on the same tokens; returns the recipe with its text."""
    recipe = replace(recipe, text=(str(begun / "text"),))
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    (folder / "tokenizer.json").write_bytes((begun / "run" / "tokenizer.json").read_bytes())
    (folder / "tokens").symlink_to(begun / "run" / "tokens")
    return recipe


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(kept.place(folder, step) / "model.safetensors")


def test_a_run_learns_logs_and_serves(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 14), tmp_path / "run")
    seen: list[dict[str, float]] = []
    run(recipe, tmp_path / "run", report=seen.append)
    log = log_of(tmp_path / "run")
    assert [record["step"] for record in log] == list(range(14)) and len(seen) == 14
    assert log[-1]["length"] == 384 and "mtp" in log[-1] and "mtp" not in log[0]
    losses = [record["language"] for record in log]
    assert sum(losses[10:13]) < sum(losses[:3]) - 3 * 0.2
    for record in log:
        assert {"language", "kl1", "kl3", "norm", "loss"} <= set(record)
    assert {"tokens_per_s", "mfu", "minutes_left"} <= set(seen[0])
    assert (tmp_path / "run" / "losses.png").stat().st_size > 5000
    assert (tmp_path / "run" / "tensorboard").is_dir() == (find_spec("tensorboard") is not None)
    model = load(kept.place(tmp_path / "run", 14))
    assert model.config.compress_ratios == (0, 4, 128, 4, 0)


def test_tensorboard_shows_what_the_log_says(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = kept.board(tmp_path)
    for step in range(3):
        board.add_scalar("loss", 5.0 - step, step)
    board.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(0, 5.0), (1, 4.0), (2, 3.0)]


CHILD = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from overleap.train.loop import recipe_of, run
run(recipe_of(Path(sys.argv[1])), Path(sys.argv[1]))
"""


MET_BEFORE = """
import sys
import torch
from overleap.train.ops import TrainingOps
torch.set_num_threads(2)

def slopes(*counts):
    torch._dynamo.reset()  # as in a new process
    ops = TrainingOps(key_width=32, rope=16)
    for count in counts:
        torch.manual_seed(int(sys.argv[1]))
        x, streams = torch.randn(count, 256), torch.randn(count, 4, 64)
        weight, fn, base, scale = torch.rand(256), torch.randn(4, 256), torch.rand(4), torch.rand(1)
        given = [t.requires_grad_() for t in (x, streams, weight, fn, base, scale)]
        out = ops.rms_norm(x, weight, 1e-6).float()
        one = ops.hc_head(streams, fn, base, scale, 1e-6, 1e-6)
        ((out * torch.randn(out.shape)).sum() + (one * torch.randn(one.shape)).sum()).backward()
    return out, one, *(t.grad for t in given)

for before in ((512, 640), (1, 37)):
    for first, later in zip(slopes(4096), slopes(*before, 4096), strict=True):
        assert torch.equal(first, later), (before, first.shape)
"""


def test_kill_9_and_resume_is_an_unbroken_run(seed: int, tmp_path: Path, begun: Path) -> None:
    """Same losses to the last digit that is logged, same weights to the last bit."""
    recipe = small_recipe(seed, 9, checkpoint_s=0.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    folder_for(begun, recipe, whole)
    folder_for(begun, recipe, parts)
    child = [sys.executable, "-c", CHILD]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*child, str(whole)], check=True, env=environment)
    killed = subprocess.Popen([*child, str(parts)], env=environment)
    deadline = time.monotonic() + 240
    while (kept.newest(parts) or 0) < 3 and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = kept.newest(parts)
    assert reached is not None and reached < 9, "the run was over before it could be killed"
    subprocess.run([*child, str(parts)], check=True, env=environment)
    # A step whose checkpoint was not yet there when the kill came is done again, but logged once.
    assert log_of(parts) == log_of(whole)
    for name, tensor in weights_of(whole, 9).items():
        assert torch.equal(tensor, weights_of(parts, 9)[name]), name


@pytest.mark.slow
def test_what_is_compiled_is_so_for_any_number_of_tokens(seed: int) -> None:
    """Bits do not follow from what a process met before, so a compiled run goes on exactly too."""
    subprocess.run([sys.executable, "-c", MET_BEFORE, str(seed)], check=True, timeout=280)


@pytest.mark.parametrize("spread", [False, True])
def test_two_ranks_are_one(spread: bool, seed: int, tmp_path: Path, begun: Path) -> None:
    """Losses within float tolerance; each rank keeps the momentum of its own matrices, and, where
    experts are spread, these are its experts."""
    recipe = small_recipe(seed, 5)
    one, two = tmp_path / "one", tmp_path / "two"
    seen: list[dict[str, float]] = []
    for folder, ranks in ((one, 1), (two, 2)):
        made = folder_for(begun, recipe, folder)
        run(made, folder, ranks=ranks, spread=spread and ranks > 1, report=seen.append)
    assert [record["step"] for record in seen] == [0, 1, 2, 3, 4] * 2
    for left, right in zip(log_of(one), log_of(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-2)
        assert left["language"] == pytest.approx(right["language"], rel=1e-2)
    assert log_of(one)[0]["loss"] == pytest.approx(log_of(two)[0]["loss"], rel=1e-5)
    states = [load_file(f"{kept.place(two, 5)}.state-{rank}") for rank in (0, 1)]
    owned = [{n for n in state if n.startswith("velocity/")} for state in states]
    assert owned[0] and owned[1] and not owned[0] & owned[1]
    whole = load_file(f"{kept.place(one, 5)}.state-0")
    assert owned[0] | owned[1] == {n for n in whole if n.startswith("velocity/")}
    if spread:
        numbers = [
            {int(n.split(".experts.")[1].split(".")[0]) for n in own if ".experts." in n}
            for own in owned
        ]
        assert numbers == [{0, 1}, {2, 3}]
        assert weights_of(two, 5).keys() == weights_of(one, 5).keys()
        trainer = Trainer(made, two)  # goes on with all experts on one rank
        assert trainer.step == 5


def test_what_no_rank_has_a_gradient_of_stays(seed: int, tmp_path: Path, begun: Path) -> None:
    """The draft block, as long as its loss has no weight: no decay either, as on one rank."""
    recipe = small_recipe(seed, 3)
    stages = tuple(replace(stage, mtp=0.0) for stage in recipe.stages)
    recipe = folder_for(begun, replace(recipe, stages=stages), tmp_path / "run")
    run(recipe, tmp_path / "run", ranks=2)
    first = initial_weights(recipe.config, recipe.seed)
    found = weights_of(tmp_path / "run", 3)
    names = {name for name in found if name.startswith("mtp.")}
    assert len(names) > 10 and all(torch.equal(found[name], first[name]) for name in names)
    assert not torch.equal(found["layers.0.attn.wkv.weight"], first["layers.0.attn.wkv.weight"])


def test_experts_that_cannot_be_spread(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 3, group_tokens=1024), tmp_path / "run")
    sentence = "stage 0 has 1 passes a step, 2 ranks with spread experts"
    with pytest.raises(TrainingError, match=sentence):
        run(recipe, tmp_path / "run", ranks=2, spread=True)


def test_a_spike_goes_back_and_leaves_its_rows_out(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 8), tmp_path / "run")
    trainer = Trainer(recipe, tmp_path / "run")
    for _ in range(2):
        trainer.one()
    trainer.save()
    good = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.one()
    with torch.no_grad():
        trainer.model.head.weight.mul_(float("nan"))
    assert trainer.one() is None
    assert trainer.step == 2 and trainer.skipped == 2
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, good[name])
    assert log_of(tmp_path / "run")[-1]["rolled_back_to"] == 2
    trainer.rollbacks = 5
    with torch.no_grad():
        trainer.model.head.weight.mul_(float("nan"))
    with pytest.raises(TrainingError, match="after 5 rollbacks"):
        trainer.one()


def test_a_spike_before_any_checkpoint_is_due(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 3), tmp_path / "run")
    told: list[dict[str, float]] = []

    def spoil_once(record: dict[str, float]) -> None:
        if not told:
            with torch.no_grad():
                trainer.model.head.weight.mul_(float("nan"))
        told.append(record)

    trainer = Trainer(recipe, tmp_path / "run", spoil_once)
    trainer.run()
    assert told[1]["rolled_back_to"] == 0
    assert [record["step"] for record in told] == [0, 1, 0, 1, 2]


def test_a_loss_far_above_the_median_is_a_spike(seed: int, tmp_path: Path, begun: Path) -> None:
    """A number too, once a stage has had 20 steps."""
    recipe = replace(small_recipe(seed, 24), warmup_steps=1000)
    recipe = folder_for(begun, recipe, tmp_path / "run")
    trainer = Trainer(recipe, tmp_path / "run")
    losses = [record["loss"] for _ in range(19) if (record := trainer.one()) is not None]
    assert len(losses) == 19
    trainer.save()
    head = trainer.model.head.weight
    with torch.no_grad():
        head.mul_(100.0)
    young = trainer.one()
    assert young is not None and young["loss"] > 2 * max(losses)
    with torch.no_grad():
        head.mul_(2.0)
    assert trainer.one() is None and trainer.step == 19
    (*_, last) = log_of(tmp_path / "run")
    assert last["step"] == 20 and last["rolled_back_to"] == 19 and last["loss"] > young["loss"]


def test_an_indexer_warm_up_moves_the_indexer_alone(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = small_recipe(seed, 3, matrix_rate=0.05)
    stages = tuple(replace(stage, indexer_only=True) for stage in recipe.stages)
    recipe = folder_for(begun, replace(recipe, stages=stages), tmp_path / "run")
    trainer = Trainer(recipe, tmp_path / "run")
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.one()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".indexer." in n for n in moved)


def test_a_run_goes_on_from_any_checkpoint(seed: int, tmp_path: Path, begun: Path) -> None:
    first = folder_for(begun, small_recipe(seed, 2), tmp_path / "first")
    run(first, tmp_path / "first")
    base = str(kept.place(tmp_path / "first", 2))
    second = replace(first, base=base, text=())
    second = replace(second, text=first.text)
    begin(second, tmp_path / "second")
    trainer = Trainer(second, tmp_path / "second")
    assert trainer.rows.profile.name == "mini"
    for name, tensor in weights_of(tmp_path / "first", 2).items():
        assert torch.equal(dict(trainer.model.named_parameters())[name], tensor)
    other = replace(second, config=first.config.with_(hidden_size=64))
    with pytest.raises(TrainingError, match=r"another model .* is \(.*32.*\) there, \(.*64.*\) in"):
        Trainer(other, tmp_path / "second")


def test_a_model_learns_a_longer_context(seed: int, tmp_path: Path, begun: Path) -> None:
    """Its weights go on with another YaRN, context and index_topk, and need their base no more."""
    first = folder_for(begun, small_recipe(seed, 2), tmp_path / "first")
    run(first, tmp_path / "first")
    longer = first.config.with_(
        rope_scaling=Yarn(factor=512.0, original_max_position_embeddings=4096),
        max_position_embeddings=2 * first.config.max_position_embeddings,
        index_topk=32,
    )
    base = tmp_path / "base"
    kept.place(tmp_path / "first", 2).rename(base)
    second = folder_for(begun, replace(first, base=str(base), config=longer), tmp_path / "second")
    before = load_file(base / "model.safetensors")
    trainer = Trainer(second, tmp_path / "second")
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name
    trainer.one()
    trainer.save()
    shutil.rmtree(base)
    again = Trainer(second, tmp_path / "second")
    assert again.step == 1
    again.run()
    config = load(kept.place(tmp_path / "second", 2)).config
    assert config.rope_scaling == longer.rope_scaling and config.index_topk == 32


@pytest.mark.parametrize(
    ("base", "chats", "talks"),
    [
        ("v4-pro-0813", False, "v4-pro-0813"),
        ("v4-pro-0813", True, "v4-pro-0813"),
        ("v4-pro-base", False, "v4-pro-base"),
        ("v4-pro-base", True, "v4-pro"),
    ],
)
def test_a_model_is_talked_to_as_its_base(
    seed: int, tmp_path: Path, begun: Path, base: str, chats: bool, talks: str
) -> None:
    """A base model that learns from conversations becomes a chat model of its size."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_bytes((begun / "run" / "tokenizer.json").read_bytes())
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_profile": base}))
    recipe = replace(small_recipe(seed, 2), base=str(model))
    if chats:
        said = tmp_path / "said.jsonl"
        stages = (replace(recipe.stages[0], mixture=(Chat(str(said)),)),)
        recipe = replace(recipe, stages=stages)
    begin(recipe, tmp_path / "run")
    assert profile_for(tmp_path / "run").name == talks
    target = kept.place(tmp_path / "run", 1)
    kept.save_weights(tmp_path / "run", 1, initial_weights(recipe.config, seed), recipe.config)
    assert profile_for(target).name == talks


def test_a_folder_keeps_to_its_recipe(seed: int, tmp_path: Path, begun: Path) -> None:
    """Once something was trained; a first start that failed keeps nothing from being begun."""
    recipe = folder_for(begun, small_recipe(seed, 2), tmp_path / "run")
    home = tmp_path / "run" / "checkpoints"
    (home / "step-000000").mkdir(parents=True)
    (home / "step-000000.state-0").write_bytes(b"")  # before a first step that failed
    begin(replace(recipe, clip=3.0), tmp_path / "run")
    assert not home.exists()
    (home / "step-000002").mkdir(parents=True)
    (home / "step-000002.state-0").write_bytes(b"")
    with pytest.raises(TrainingError, match="another recipe"):
        begin(replace(recipe, clip=2.0), tmp_path / "run")
    lost = replace(recipe, text=(str(tmp_path / "typo.txt"),))
    with pytest.raises(TrainingError, match=r"typo\.txt"):
        begin(lost, tmp_path / "again")
    with pytest.raises(TrainingError, match="no tokenizer that can be read"):
        begin(replace(lost, base=str(tmp_path)), tmp_path / "again")
    begin(recipe, tmp_path / "again")
    assert Trainer(recipe, tmp_path / "again").step == 0


def test_another_stage_is_not_judged_by_the_one_before(
    seed: int, tmp_path: Path, begun: Path
) -> None:
    """An easy stage with losses near nothing, then one on text: no spike, at no step of it."""
    recipe = small_recipe(seed, 45)
    easy = replace(recipe.stages[0], steps=20, language=0.0, retrieval=0.0, mixture=(Text(1.0),))
    hard = replace(recipe.stages[0], steps=25)
    recipe = folder_for(begun, replace(recipe, stages=(easy, hard)), tmp_path / "run")
    trainer = Trainer(recipe, tmp_path / "run")
    losses = [record["loss"] for _ in range(45) if (record := trainer.one()) is not None]
    assert len(losses) == 45 and max(losses[:20]) < min(losses[20:]) / 2


def test_what_a_killed_run_left_is_cleared_away(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 2), tmp_path / "run")
    run(recipe, tmp_path / "run")
    home = tmp_path / "run" / "checkpoints"
    left = ["step-000007.state-0", "step-000002.state-1.partial", "step-000009.partial"]
    for name in left:
        (home / name).write_bytes(b"x")
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    begin(recipe, tmp_path / "run")
    assert not any((home / name).exists() for name in left)
    (home / left[1]).write_bytes(b"x")
    assert Trainer(recipe, tmp_path / "run").step == 2
    assert (home / left[1]).exists()  # of another rank, which is saving already
    assert kept.steps(tmp_path / "run") == [0, 2]
    assert kept.draw_losses(tmp_path / "run") is not None


def test_a_resumed_log_has_a_line_a_step(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 4), tmp_path / "run")
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.one()
    trainer.save()
    log = tmp_path / "run" / "log.jsonl"
    back = {"step": 3, "rolled_back_to": 1}
    lines = [{"step": 0, "loss": 0.1 + 0.2}, {"step": 1}, {"step": 2}, back, {"step": 1}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    begin(recipe, tmp_path / "run")
    assert log_of(tmp_path / "run") == [lines[0], back]
    run(recipe, tmp_path / "run")
    assert [line["step"] for line in log_of(tmp_path / "run")] == [0, 3, 1, 2, 3]


def test_one_process_trains_in_a_folder(seed: int, tmp_path: Path, begun: Path) -> None:
    recipe = folder_for(begun, small_recipe(seed, 2), tmp_path / "run")
    with (
        kept.alone(tmp_path / "run"),
        pytest.raises(TrainingError, match="another process trains in"),
    ):
        run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="no run can be in"):
        run(recipe, tmp_path / "file")


def test_ranks_that_cannot_be(seed: int, tmp_path: Path) -> None:
    recipe = small_recipe(seed, 2)
    with pytest.raises(TrainingError, match="no other to spread experts over"):
        run(recipe, tmp_path, spread=True)
    with pytest.raises(TrainingError, match="no other to spread experts over"):
        run(recipe, tmp_path, within=(0, 1, 1), spread=True)
    with pytest.raises(TrainingError, match="3 ranks were asked for in one of 2 processes"):
        run(recipe, tmp_path, ranks=3, within=(0, 2, 2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"length": 1000}, "whole pages of 128"), ({"rows": 0}, "0 rows"), ({"steps": 0}, "0 steps"),
     ({"mixture": (Text(0.0),)}, "shares")],
)  # fmt: skip
def test_stages_that_cannot_be_run(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        replace(small_recipe(0, 2).stages[0], **changes)
    with pytest.raises(TrainingError, match="warmup_steps is 0"):
        small_recipe(0, 2, warmup_steps=0)


def test_rows_that_a_late_stage_needs_are_tried_at_the_start(
    seed: int, tmp_path: Path, begun: Path
) -> None:
    recipe = small_recipe(seed, 3)
    late = replace(recipe.stages[1], length=1 << 24, mixture=(Text(1.0),))
    recipe = replace(recipe, stages=(recipe.stages[0], late))
    recipe = folder_for(begun, recipe, tmp_path / "run")
    with pytest.raises(TrainingError, match="a row takes 16777216"):
        Trainer(recipe, tmp_path / "run")


def test_recipes_survive_json_and_come_from_files(seed: int, tmp_path: Path) -> None:
    for made in (*(make() for make in RECIPES.values()), small_recipe(seed, 4)):
        assert from_json(made.to_json()) == made
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom overleap.train.recipes import mini\n"
        "def recipe():\n    return replace(mini(), seed=7)\n"
        "def other():\n    return 3\n"
    )
    assert recipe_named(str(path), RECIPES).seed == 7
    with pytest.raises(TrainingError, match="no function other"):
        recipe_named(f"{path}:other", RECIPES)
    with pytest.raises(TrainingError, match="no recipe is called 'none'"):
        recipe_named("none", RECIPES)
    with pytest.raises(TrainingError, match="is no recipe"):
        from_json("{}")


def test_rates_rise_hold_and_fall(seed: int) -> None:
    recipe = replace(small_recipe(seed, 100), warmup_steps=10)
    rates = [recipe.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == rates[60] == 1.0
    assert rates[99] == pytest.approx(0.05, abs=0.03) and rates[80] < 0.9
    assert recipe.place(98) == (0, 98) and recipe.place(99) == (1, 0)
