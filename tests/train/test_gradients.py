"""Every gradient of a step, against autograd through the model written a second time.

The second time is tests/oracles/dense.py: float64, one text, no code of the package. Packed
documents are held against texts of their own. transformers' gradients: test_transformers_grad.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.config import ModelConfig
from overleap.train.passes import Pass
from overleap.train.recipe import Stage
from tests.oracles.dense import Dense
from tests.train.small import lively_weights, pass_of, random_row, small_config

# Sums of float32 against float64; a gradient that is itself a small difference of large ones
# (the connections' biases) keeps fewer digits.
TOLERANCE = 2e-4


def their_gradients(
    config: ModelConfig, weights: dict[str, Tensor], texts: list[list[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean next-token loss plus 0.3 of the draft block's, and its gradients, in float64."""
    dense = Dense(config, weights)
    for tensor in dense.w.values():
        tensor.requires_grad_()
    nll, drafted = [], []
    for ids in texts:
        logits, streams = dense.forward(ids)
        nll.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
        # The last token has no next one: the package pads it with token 2.
        draft, _ = dense.draft(streams, [*ids[1:], 2])
        drafted.append(F.cross_entropy(draft[:-2], torch.tensor(ids[2:]), reduction="none"))
    loss = torch.cat(nll).mean() + 0.3 * torch.cat(drafted).mean()
    loss.backward()
    return loss.detach(), {n: t.grad for n, t in dense.w.items() if t.grad is not None}


def our_gradients(work: Pass, stage: Stage, rows: list) -> tuple[Tensor, dict[str, Tensor]]:
    total, _, _ = work.losses(stage, rows, "seed")
    total.backward()
    return total.detach(), {
        n: p.grad for n, p in work.model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("topk", [1024, 8], ids=["dense", "sparse"])
@pytest.mark.parametrize("kept", [1 << 20, 1], ids=["whole", "layer by layer"])
def test_gradients_equal_an_independent_formulation(seed: int, topk: int, kept: int) -> None:
    """Two documents in one row; all weights but the indexer's, which this loss does not reach."""
    # Many heads: with few, index scores of exactly 0 are common, and any of them is a right choice.
    config = small_config(index_topk=topk, index_n_heads=16)
    weights = lively_weights(config, seed)
    counts = [256, 384]
    row = random_row(counts, seed)
    stage = Stage(1, sum(counts), 1, (), sparse=topk < 1024, mtp=0.3)
    changes = {"distillation": 0.0, "balance": 0.0, "language_rows": 1.0, "kept_tokens": kept}
    work = pass_of(config, weights, torch.float32, **changes)
    loss, ours = our_gradients(work, stage, [row])
    texts = [row.ids[:256], row.ids[256:]]
    want, theirs = their_gradients(config, weights, texts)
    assert abs(float(loss) - float(want)) < 1e-4
    total = float(torch.cat([g.flatten() for g in theirs.values()]).norm())
    compared = 0
    for name, grad in theirs.items():
        if ".indexer." in name or name.endswith("gate.bias"):
            assert name not in ours or not ours[name].any()
            continue
        compared += 1
        distance = float((ours[name] - grad).norm())
        assert distance < TOLERANCE * float(grad.norm()) + 1e-7 * total, name
    assert compared > 100
