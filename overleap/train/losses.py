"""The losses: language, answers, retrieval, indexer, router balance. Gradients by autograd.

Not here: what is a sample (sources.py) or when a weight changes (loop.py). Top-k passes no
gradient, so the indexer learns from the attention it serves; facts tell where that should go.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from overleap.kernels.torch.linear import hadamard
from overleap.model.hyper import collapse_head
from overleap.model.transformer import Transformer
from overleap.train.attend import Tiles
from overleap.train.ops import Seen
from overleap.train.shards import PAD_ID

HIDDEN = -1e30
HEAD_ROWS = 1024  # rows whose logits exist at once


def token_losses(model: Transformer, x_TMD: Tensor, rows_N: Tensor, target_N: Tensor) -> Tensor:
    """Cross-entropy f32 [N] of the main model's logits at some packed rows.

    x_TMD  streams after the last main layer
    """

    def hidden(x_NMD: Tensor) -> Tensor:
        out: Tensor = model.norm(collapse_head(model, x_NMD, model.config, model.ops))
        return out

    return head_losses(model, hidden, x_TMD[rows_N], target_N)


def head_losses(
    model: Transformer, hidden: Callable[[Tensor], Tensor], x: Tensor, target_N: Tensor
) -> Tensor:
    """Cross-entropy f32 [N] of the shared head over hidden(x); 0 where the target is padding.

    Many rows are done in parts, whose logits are made again in the backward pass: [N, V] never
    exists whole.
    """

    def part(x: Tensor, target: Tensor) -> Tensor:
        logits = model.head(hidden(x)).float()
        return F.cross_entropy(logits, target, ignore_index=PAD_ID, reduction="none")

    pairs = zip(x.split(HEAD_ROWS), target_N.split(HEAD_ROWS), strict=True)
    if len(x) <= HEAD_ROWS:
        return torch.cat([part(x, target) for x, target in pairs])
    return torch.cat([checkpoint(part, x, target, use_reentrant=False) for x, target in pairs])


@dataclass(frozen=True)
class Asked:
    """Where answers are, in a step of packed documents.

    at_N           i64  packed row that must produce the value
    gold_N         i64  packed row of the value in the document
    begin_N end_N  i64  packed rows of the document that both are in
    """

    at_N: Tensor
    gold_N: Tensor
    begin_N: Tensor
    end_N: Tensor


def entry_masks(asked: Asked, entries: int) -> tuple[Tensor, Tensor]:
    """Which entries of the whole step count, and which hold the fact: two bool [N, entries].

    A question may take any entry it sees in its own document. Entries of the other documents
    count as wrong ones too: they stand in for the many entries of a longer text.
    """
    entry = torch.arange(entries, device=asked.at_N.device)[None]
    mine = (entry >= asked.begin_N[:, None] // 4) & (entry < asked.end_N[:, None] // 4)
    allowed = ~mine | (entry < (asked.at_N[:, None] + 1) // 4)
    # A block is pooled into its own entry and into the next one.
    away = entry - asked.gold_N[:, None] // 4
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
    allowed, gold = entry_masks(asked, len(entries))
    q = queries[asked.at_N].float()
    if frequency is not None and distance_N is not None:
        q = shifted(q, frequency, distance_N)
    heads = q.shape[1]
    score = (q.flatten(0, 1) @ entries.float().t()) * entries.shape[1] ** -0.5
    score = score.view(len(q), heads, -1).masked_fill(~allowed[:, None], HIDDEN)
    total = torch.logaddexp(score.logsumexp(-1), sink)
    held = score.masked_fill(~gold[:, None], HIDDEN).logsumexp(-1)
    loss = -(torch.logsumexp(held - total, dim=1) - math.log(heads)).mean()
    best = score.detach().logsumexp(1).argmax(-1, keepdim=True)
    return loss, gold.gather(1, best).float().mean()


@dataclass(frozen=True)
class Index:
    """An indexer's view of a step: queries [T, I, J], head weights [T, I], keys [S, J]."""

    queries: Tensor
    weight: Tensor
    keys: Tensor


def index_scores(queries: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """Report eq. 16 for all keys: [N, I, J], [N, I], [S, J] -> [N, S]."""
    heads = queries.shape[1]
    each = (queries.flatten(0, 1) @ keys.t()).relu().view(len(queries), heads, -1)
    return (each * weight[..., None]).sum(1)


def guided_index_loss(
    index: Index, asked: Asked, frequency: Tensor, distance_N: Tensor
) -> tuple[Tensor, Tensor]:
    """-log softmax of the index scores on the fact's entries over all of the step; and accuracy."""
    allowed, gold = entry_masks(asked, len(index.keys))
    # The transform is its own inverse and keeps products: rotate without it.
    q = shifted(hadamard(index.queries[asked.at_N].float()), frequency, distance_N)
    score = index_scores(q, index.weight[asked.at_N], hadamard(index.keys.float()))
    score = score.masked_fill(~allowed, HIDDEN)
    held = score.masked_fill(~gold, HIDDEN).logsumexp(-1)
    loss = (score.logsumexp(-1) - held).mean()
    return loss, gold.gather(1, score.detach().argmax(-1, keepdim=True)).float().mean()


def distillation_loss(
    seen: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    rows_N: Tensor,
    tiles: Tiles,
    k: int,
) -> Tensor:
    """KL from the layer's attention to the softmax of the index scores, mean over some tokens.

    Target: the joint softmax over window, all visible entries and sink, summed over heads, entries
    only, normalised to 1. Tokens that see no entry count as zero.
    rows_N  i64 packed rows, in any order
    k       entries that a token attended to: the log denominators seen hold no others
    """
    queries, entries, _, lse = (part.detach() for part in seen)
    wide = lse.dtype
    losses = []
    for begin, end in tiles.documents:
        rows = rows_N[(rows_N >= begin + 3) & (rows_N < end)]
        if not len(rows):
            continue
        here = slice(begin // 4, end // 4)
        score = torch.einsum("nhk,ek->nhe", queries[rows].to(wide), entries[here].to(wide))
        visible = (rows - begin + 1) // 4
        mask = torch.arange(end // 4 - begin // 4, device=rows.device) >= visible[:, None]
        score = (score * entries.shape[1] ** -0.5).masked_fill(mask[:, None], -torch.inf)
        left = score.masked_fill(_chosen(index, rows, here, mask, k)[:, None], -torch.inf)
        whole = torch.logaddexp(lse[rows], left.logsumexp(-1))
        target = (score - whole[..., None]).exp().sum(1)
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)
        student = index_scores(
            index.queries[rows].to(wide), index.weight[rows], index.keys[here].to(wide)
        )
        student = student.masked_fill(mask, HIDDEN).log_softmax(-1)
        entropy = torch.xlogy(target, target).sum(-1)
        losses.append(entropy - (target * student.clamp(min=-1e4)).sum(-1))
    if not losses:
        return index.keys.sum() * 0.0
    return torch.cat(losses).sum() / len(rows_N)


@torch.no_grad()
def _chosen(index: Index, rows_N: Tensor, here: slice, mask: Tensor, k: int) -> Tensor:
    """Which entries of a document the index chose for these rows: bool [N, S].

    Ranked again by scores in the type that attend.choose ranked them in, so that rounding makes no
    other choice. Masked entries fill up the k.
    """
    score = index_scores(index.queries[rows_N], index.weight[rows_N], index.keys[here])
    best = score.masked_fill(mask, -torch.inf).topk(min(k, mask.shape[1]), sorted=False).indices
    return torch.zeros_like(mask).scatter(1, best, True)


def balance_loss(seen: Seen, tiles: Tiles, real_T: Tensor) -> Tensor:
    """Sequence-wise balance: sum over experts of load f times mean affinity P (V3's formula).

    Mean over documents, each a sequence, weighted by length, and over layers; 1 when even.
    real_T  bool [T], False where a row is padded: nothing is read from those
    """
    total = torch.zeros(())
    rows = [begin + real_T[begin:end].nonzero()[:, 0] for begin, end in tiles.documents]
    for affinity, ids, _ in seen.routing:
        experts = affinity.shape[1]
        share = affinity / affinity.sum(-1, keepdim=True)
        chosen = F.one_hot(ids, experts).sum(1).to(share.dtype) * (experts / ids.shape[1])
        parts = [(chosen[n].mean(0) * share[n].mean(0)).sum() * len(n) for n in rows if len(n)]
        total = total.to(share) + torch.stack(parts).sum() / sum(map(len, rows))
    return total / max(len(seen.routing), 1)


@torch.no_grad()
def load_of(seen: Seen, real_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Selection bias and tokens per expert f32 [E] of every layer that has a bias.

    real_T  bool [T], False where a row is padded: padding is no load
    """
    return [
        (bias, torch.bincount(ids[real_T].flatten(), minlength=len(bias)).float())
        for _, ids, bias in seen.routing
        if bias is not None
    ]


@torch.no_grad()
def move_bias(bias: Tensor, load_E: Tensor, speed: float) -> None:
    """Bias of busy experts down, of idle ones up (auxiliary-loss-free balance)."""
    bias.add_(speed * torch.sign(load_E.mean() - load_E))
