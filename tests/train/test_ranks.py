"""Gradients that ranks share are those of one process, whatever an optimiser would make of them.

Held before any step: Muon, AdamW and clipping hardly notice a factor, so that a run in which the
gradients of a rank are lost learns all the same. What runs of ranks log and keep: test_loop.py.
"""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import overleap
from overleap.eval.needle import stdlib_sources
from overleap.train import loop
from overleap.train.loop import Trainer, begin, recipe_of
from tests.train.small import small_config, small_recipe

TOKENIZER = Path(overleap.__file__).parent / "bundled" / "mini" / "tokenizer.json"
TOLERANCE = 1e-5  # of float32, whose sums have another order
Gradients = dict[str, Tensor]


def test_gradients_of_two_ranks_are_those_of_one(seed: int, tmp_path: Path) -> None:
    """With all experts everywhere and with spread ones; losing what a rank has would show."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(list(stdlib_sources().values())[:20]))
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    recipe = small_recipe(seed, 2, config=small_config(vocab_size=8192), clip=1e9)
    stage = replace(recipe.stages[0], mtp=0.3)  # two rows, of a pass each
    begin(replace(recipe, stages=(stage,), text=(str(text),)), tmp_path)
    want, _ = gradients(tmp_path, spread=False)
    total = float(torch.stack([g.norm() for g in want.values()]).norm())
    spawn(in_rank, (tmp_path,), nprocs=2)

    def off(found: Gradients) -> set[str]:
        """Names of the gradients that are not those of one process."""
        return {
            name
            for name, grad in found.items()
            if float((grad - want[name]).norm())
            > TOLERANCE * float(want[name].norm() + total / 100)
        }

    for spread in (False, True):
        ranks = [load_file(tmp_path / f"shared-{spread}-{rank}") for rank in (0, 1)]
        assert ranks[0].keys() | ranks[1].keys() == want.keys()
        for rank, found in enumerate(ranks):
            assert not off(found)
            experts = {name for name in found if ".ffn.experts." in name}
            lost = off(load_file(tmp_path / f"lost-{spread}-{rank}"))
            # A rank has the whole gradient of spread experts: it comes with the tokens.
            assert len(lost) > 100 and not (spread and lost & experts)


def in_rank(rank: int, folder: Path) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for spread in (False, True):
        shared, lost = gradients(folder, spread)
        save_file(shared, folder / f"shared-{spread}-{rank}")
        save_file(lost, folder / f"lost-{spread}-{rank}")
    dist.destroy_process_group()


def gradients(folder: Path, spread: bool) -> tuple[Gradients, Gradients]:
    """Of the first step's rows, shared; and what a run would take if nothing were summed."""
    recipe = recipe_of(folder)
    with mock.patch.object(loop, "best_dtype", return_value=torch.float32):
        trainer = Trainer(recipe, folder, spread=spread)
    trainer._gradients(recipe.stages[0], 0, 0)
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.grad is not None]
    own = [p.grad for _, p in named]
    with mock.patch.object(dist, "all_reduce"):
        trainer._share_gradients()
    lost = {n: p.grad for n, p in named if p.grad is not None}
    for (_, p), grad in zip(named, own, strict=True):
        p.grad = grad
    trainer._share_gradients()
    shared = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return shared, lost
