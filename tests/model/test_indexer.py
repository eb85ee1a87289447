"""When entries are chosen and when all are taken, and what the indexer hands to its loss."""

from typing import Any

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.kernels import select
from overleap.kernels.composed import Assembled
from overleap.model.indexer import IndexerTap
from overleap.model.transformer import Batch
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles.running import build, distance, draw_ids, room, start


def run(
    topk: int, length: int, seed: int, tap: list[IndexerTap] | None
) -> tuple[torch.Tensor, int]:
    """Logits, and how often a choice was made."""
    calls, ops = 0, select()

    def index_topk(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return ops.index_topk(*arguments)

    config = tiny_config(seed, compress_ratios=(4, 0, 4), index_topk=topk, index_n_heads=16)
    counting = Assembled(vars(ops) | {"index_topk": index_topk})
    model = build(config, random_tensors(config, seed), counting)
    ids = draw_ids(config, length, torch.Generator().manual_seed(seed))
    cache = room(config, length, CacheFormat.WIDE, slots=1)
    logits = model(Batch.of([(start(cache, length), ids)], cache, "all"), cache, tap).logits
    return logits, calls


@pytest.mark.parametrize(("length", "choices"), [(35, 0), (36, 2), (101, 2)])
def test_a_choice_only_where_there_is_one(length: int, choices: int, seed: int) -> None:
    """8 entries at 35 tokens, 9 at 36, in each of two CSA layers."""
    assert run(8, length, seed, None)[1] == choices


def test_all_visible_is_the_choice_of_all(seed: int) -> None:
    """A topk just large enough and one far too large give the same logits."""
    assert distance(run(25, 101, seed, None)[0], run(4096, 101, seed, None)[0]) == 0
    assert distance(run(24, 101, seed, None)[0], run(25, 101, seed, None)[0]) > 0


@pytest.mark.parametrize("topk", [4, 4096])
def test_tap_changes_nothing_and_explains_the_choice(topk: int, seed: int) -> None:
    taps: list[IndexerTap] = []
    tapped, _ = run(topk, 101, seed, taps)
    assert tapped.equal(run(topk, 101, seed, None)[0])
    assert len(taps) == 2
    for tap in taps:
        tokens, heads, width = tap.index_q.shape
        assert (tokens, heads, width) == (101, 16, tap.keys.format.width)
        assert tap.index_weight.shape == (101, 16)
        assert tap.lse_TH.shape == tap.q_THK.shape[:2]
        assert tap.entries.per_page == tap.keys.per_page == 32
        assert tap.scale == pytest.approx(tap.q_THK.shape[2] ** -0.5)


def test_selection_passes_no_gradient(seed: int) -> None:
    """The logits do not reach the indexer's parameters: it learns by distillation alone."""
    config = tiny_config(seed, compress_ratios=(4, 0, 4), index_topk=4)
    model = build(config, random_tensors(config, seed), select("torch"))
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    ids = draw_ids(config, 40, torch.Generator().manual_seed(seed))
    cache = room(config, 40, CacheFormat.WIDE, slots=1)
    model(Batch.of([(start(cache, 40), ids)], cache, "all"), cache).logits.square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not [name for name in reached if ".indexer." in name]
    assert "layers.0.attn.compressor.wkv.weight" in reached
    assert "layers.2.attn.wq_b.weight" in reached
