"""Every gradient of a step, against autograd through the model written a second time.

The second time is tests/oracles/dense.py: float64, one text, no code of the package. Packed
documents are held against texts of their own. transformers' gradients: test_transformers_grad.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.config import ModelConfig
from overleap.kernels.conformance.compare import FLOAT32
from overleap.train import losses
from overleap.train.data import Row
from overleap.train.passes import Pass, packed
from overleap.train.recipe import Stage
from overleap.train.shards import PAD_ID
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
        # A scalar of the hyper-connections sums terms of every token that nearly cancel: what f32
        # leaves of them is 16 eps of the whole, as conform allows it of any sum in f32.
        assert distance < TOLERANCE * float(grad.norm()) + FLOAT32 * total, name
    assert compared > 100


def test_the_draft_block_learns_what_the_main_loss_learns(seed: int) -> None:
    """Of a conversation what the assistant says; answers as well; nothing of what is padded."""
    config = small_config()
    weights, row = lively_weights(config, seed), random_row([128], seed)
    learn = [20 <= at < 50 or 60 <= at < 99 for at in range(128)]
    learn[70] = False
    row = Row([*row.ids[:110], *[PAD_ID] * 18], [128], learn, [70], [-1])
    work = pass_of(config, weights, torch.float32, language_rows=1.0)
    _, record, _ = work.losses(Stage(1, 128, 1, (), mtp=0.3), [row], "seed")
    dense = Dense(config, weights)
    _, streams = dense.forward(row.ids)
    draft, _ = dense.draft(streams, [*row.ids[1:], PAD_ID])
    at = [n for n in range(126) if learn[n] and (learn[n + 1] or n + 1 == 70)]
    nll = F.cross_entropy(draft[at], torch.tensor(row.ids)[torch.tensor(at) + 2])
    assert record["mtp"] == pytest.approx(float(nll), rel=1e-4)


class Watched(Dense):
    """Collects, for every CSA layer, the mean KL from joint attention to the indexer's scores."""

    def attention(self, name: str, ratio: int, x_TD: Tensor) -> Tensor:
        if ratio == 4:
            self.divergences = [*getattr(self, "divergences", []), self.divergence(name, x_TD)]
        return super().attention(name, ratio, x_TD)

    def divergence(self, name: str, x_TD: Tensor) -> Tensor:
        c, t = self.config, torch.arange(len(x_TD))
        x_TD = x_TD.detach()
        latent = self.norm(self.linear(x_TD, f"{name}.wq_a"), f"{name}.q_norm").detach()
        q = self.linear(latent, f"{name}.wq_b").unflatten(-1, (c.num_attention_heads, c.head_dim))
        q = self.turn(self.norm(q, None), t, 4)
        rows = self.turn(self.norm(self.linear(x_TD, f"{name}.wkv"), f"{name}.kv_norm"), t, 4)
        entries = self.compressed(f"{name}.compressor", 4, x_TD)
        seen = torch.arange(len(entries)) < ((t + 1) // 4)[:, None]
        age = t[:, None] - t
        window = (age >= 0) & (age < c.sliding_window)
        mask = torch.cat((window, seen), 1)[:, None]
        score = torch.einsum("thk,nk->thn", q, torch.cat((rows, entries))) * c.head_dim**-0.5
        sink = self.w[f"{name}.attn_sink"][:, None].expand(len(x_TD), -1, 1)
        joint = torch.cat((score.masked_fill(~mask, -torch.inf), sink), 2).softmax(2)
        teacher = joint[..., len(x_TD) : -1].sum(1).detach()
        own = f"{name}.indexer"
        keys = self.compressed(f"{own}.compressor", 4, x_TD)
        q = self.linear(latent, f"{own}.wq_b").unflatten(-1, (c.index_n_heads, c.index_head_dim))
        weight = x_TD @ self.w[f"{own}.weights_proj.weight"].t()
        weight = weight * (c.index_n_heads * c.index_head_dim) ** -0.5
        score = torch.einsum("tij,sj->tis", self.turn(q, t, 4), keys).relu()
        student = (score * weight[..., None]).sum(1).masked_fill(~seen, -torch.inf)
        total = torch.zeros((), dtype=torch.float64)
        for row in range(3, len(x_TD)):
            count = (row + 1) // 4
            p = teacher[row, :count] / teacher[row, :count].sum()
            total = total + (p * (p.log() - student[row, :count].log_softmax(0))).sum()
        return total / len(x_TD)


@pytest.mark.parametrize("topk", [1024, 8], ids=["dense", "sparse"])
def test_indexers_learn_from_joint_attention_as_an_independent_formulation(
    seed: int, topk: int
) -> None:
    """From attention over all that is visible, also where the layer attends to a few of them."""
    config = small_config(index_topk=topk, index_n_heads=16)
    weights, row = lively_weights(config, seed), random_row([256], seed)
    dense = Watched(config, weights)
    for tensor in dense.w.values():
        tensor.requires_grad_()
    dense.forward(row.ids)
    want = torch.stack(dense.divergences).sum()
    want.backward()

    work = pass_of(config, weights, torch.float32)
    step = packed([row])
    room, spans = work._room(step.counts)
    _, taps, seen = work._trunk(step.ids_T, room, spans)
    total = torch.zeros(())
    for tap, keys, sight in zip(taps, work._keys, seen.attention, strict=True):
        index = losses.Index(tap.index_q, tap.index_weight, keys)
        tiles = work.ops.tiles(spans)
        total = total + losses.distillation_loss(sight, index, torch.arange(256), tiles, topk)
    total.backward()
    assert float(total.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    compared = 0
    for name, p in work.model.named_parameters():
        theirs = dense.w[name].grad if name in dense.w else None
        assert (p.grad is not None) == (".indexer." in name), name
        if p.grad is not None:
            assert theirs is not None
            compared += 1
            assert float((p.grad - theirs).norm()) < TOLERANCE * float(theirs.norm()), name
    assert compared == 2 * 6
