"""The losses of the small model: language, answers, retrieval, indexer, router balance.

Not here: what is a sample (data.py) or when a weight changes (mini.py). Top-k passes no gradient,
so the indexer learns from the attention it serves; facts tell where that attention should go.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.kernels.torch.linear import hadamard
from overleap.train.ops import Seen

HIDDEN = -1e30


@dataclass(frozen=True)
class Asked:
    """Where answers are, in a step of B sequences of L tokens.

    at_N    i64  packed position that must produce the value
    gold_N  i64  packed position of the value in the document
    """

    at_N: Tensor
    gold_N: Tensor
    length: int


def entry_masks(asked: Asked, sequences: int, per_sequence: int) -> tuple[Tensor, Tensor]:
    """Which entries of the whole step count, and which hold the fact: two bool [N, B * E].

    A question may take any entry it sees in its own document. Entries of the other documents
    count as wrong ones too: they stand in for the many entries of a longer text.
    """
    own = asked.at_N // asked.length
    entry = torch.arange(sequences * per_sequence)
    owner = entry // per_sequence
    local = entry % per_sequence
    visible = ((asked.at_N % asked.length) + 1) // 4
    mine = owner[None] == own[:, None]
    allowed = ~mine | (local[None] < visible[:, None])
    block = (asked.gold_N % asked.length) // 4
    # A block is pooled into its own entry and into the next one.
    away = local[None] - block[:, None]
    gold = mine & ((away == 0) | (away == 1)) & allowed
    return allowed, gold


def shifted(q: Tensor, frequency: Tensor, distance_N: Tensor) -> Tensor:
    """Queries [N, H, K] rotated further, as if the text were `distance_N` tokens longer."""
    angle = (distance_N.float()[:, None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    width = 2 * frequency.numel()
    even, odd = q[..., -width::2], q[..., 1 - width :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((q[..., :-width], turned), dim=-1)


def retrieval_loss(
    seen: tuple[Tensor, Tensor, Tensor, Tensor],
    asked: Asked,
    frequency: Tensor | None,
    distance_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-log of the attention mass on the fact's entries, mean over heads; and top-1 accuracy.

    seen      what TrainingOps saw of one CSA layer
    distance  extra distance of every question, or None
    """
    queries, entries, sink, _ = seen
    sequences, per_sequence, width = entries.shape
    allowed, gold = entry_masks(asked, sequences, per_sequence)
    q = queries[asked.at_N].float()
    if frequency is not None and distance_N is not None:
        q = shifted(q, frequency, distance_N)
    heads = q.shape[1]
    score = (q.flatten(0, 1) @ entries.reshape(-1, width).float().t()) * width**-0.5
    score = score.view(len(q), heads, -1).masked_fill(~allowed[:, None], HIDDEN)
    total = torch.logaddexp(score.logsumexp(-1), sink)
    held = score.masked_fill(~gold[:, None], HIDDEN).logsumexp(-1)
    loss = -(torch.logsumexp(held - total, dim=1) - math.log(heads)).mean()
    best = score.detach().logsumexp(1).argmax(-1, keepdim=True)
    return loss, gold.gather(1, best).float().mean()


@dataclass(frozen=True)
class Index:
    """An indexer's view of a step: queries [T, I, J], head weights [T, I], keys [B * E, J]."""

    queries: Tensor
    weight: Tensor
    keys: Tensor


def index_scores(queries: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """Report eq. 16 for all keys: [N, I, J], [N, I], [S, J] -> [N, S]."""
    heads = queries.shape[1]
    each = (queries.flatten(0, 1) @ keys.t()).relu().view(len(queries), heads, -1)
    return (each * weight[..., None]).sum(1)


def guided_index_loss(
    index: Index, asked: Asked, sequences: int, frequency: Tensor, distance_N: Tensor
) -> tuple[Tensor, Tensor]:
    """-log softmax of the index scores on the fact's entries over all of the step; and accuracy."""
    allowed, gold = entry_masks(asked, sequences, index.keys.shape[0] // sequences)
    # The transform is its own inverse and keeps products: rotate without it.
    q = shifted(hadamard(index.queries[asked.at_N].float()), frequency, distance_N)
    score = index_scores(q, index.weight[asked.at_N], hadamard(index.keys.float()))
    score = score.masked_fill(~allowed, HIDDEN)
    held = score.masked_fill(~gold, HIDDEN).logsumexp(-1)
    loss = (score.logsumexp(-1) - held).mean()
    return loss, gold.gather(1, score.detach().argmax(-1, keepdim=True)).float().mean()


def distillation_loss(
    seen: tuple[Tensor, Tensor, Tensor, Tensor], index: Index, rows_N: Tensor, length: int
) -> Tensor:
    """KL from the layer's attention to the softmax of the index scores, at some tokens.

    Target: the joint softmax over window, entries and sink, summed over heads, entries only,
    normalised to 1 (section 6.2 of the facts). Tokens that see no entry count as zero.
    """
    queries, entries, _, lse = (part.detach() for part in seen)
    sequences, per_sequence, width = entries.shape
    own = rows_N // length
    visible = (rows_N % length + 1) // 4
    losses = []
    for b in range(sequences):
        here = (own == b) & (visible > 0)
        rows = rows_N[here]
        if not len(rows):
            continue
        score = torch.einsum("nhk,ek->nhe", queries[rows].float(), entries[b].float())
        mask = torch.arange(per_sequence) >= visible[here][:, None]
        target = torch.exp(score * width**-0.5 - lse[rows][..., None]).sum(1)
        target = target.masked_fill(mask, 0.0)
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)
        own_keys = index.keys[b * per_sequence : (b + 1) * per_sequence].float()
        student = index_scores(index.queries[rows].float(), index.weight[rows], own_keys)
        student = student.masked_fill(mask, HIDDEN).log_softmax(-1)
        entropy = torch.xlogy(target, target).sum(-1)
        losses.append(entropy - (target * student.clamp(min=-1e4)).sum(-1))
    if not losses:
        return index.keys.sum() * 0.0
    return torch.cat(losses).sum() / len(rows_N)


def balance_loss(seen: Seen, length: int) -> Tensor:
    """Sequence-wise balance: sum over experts of load f times mean affinity P (V3's formula)."""
    total = torch.zeros(())
    for affinity, ids, _ in seen.routing:
        experts = affinity.shape[1]
        share = (affinity / affinity.sum(-1, keepdim=True)).view(-1, length, experts).mean(1)
        chosen = F.one_hot(ids, experts).float().sum(1).view(-1, length, experts).mean(1)
        load = chosen * experts / ids.shape[1]
        total = total + (load * share).sum(-1).mean()
    return total / max(len(seen.routing), 1)


@torch.no_grad()
def move_biases(seen: Seen, speed: float) -> None:
    """Bias of busy experts down, of idle ones up (auxiliary-loss-free balance)."""
    for _, ids, bias in seen.routing:
        if bias is not None:
            load = torch.bincount(ids.flatten(), minlength=len(bias)).float()
            bias.add_(speed * torch.sign(load.mean() - load))
