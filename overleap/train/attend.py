"""Joint attention of training: window, entries and sink in one softmax, tile by tile, both ways.

Memory grows with the tokens, never with tokens times entries: scores of 128 tokens at a time are
made, used and dropped; the backward pass makes them again from the log denominators. Not a backend:
see ops.py, which says what a step looks like. Read next: losses.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

WINDOW = 128


@dataclass(frozen=True)
class Tiles:
    """Runs of 128 packed tokens, each inside one document.

    first    packed row where each tile begins
    begin    packed row where its document begins
    documents  [begin, end) of every document, in order
    """

    first: tuple[int, ...]
    begin: tuple[int, ...]
    documents: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, counts: Sequence[int]) -> Self:
        """From the documents' lengths, all multiples of 128."""
        first: list[int] = []
        begin: list[int] = []
        documents: list[tuple[int, int]] = []
        at = 0
        for count in counts:
            assert count % WINDOW == 0 and count > 0, "documents fill whole pages"
            first += range(at, at + count, WINDOW)
            begin += [at] * (count // WINDOW)
            documents.append((at, at + count))
            at += count
        return cls(tuple(first), tuple(begin), tuple(documents))


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and of element-wise parts: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def attend(
    q_THK: Tensor,
    near_TK: Tensor,
    far_SK: Tensor | None,
    chosen_Tk: Tensor | None,
    sink_H: Tensor,
    ratio: int,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to its window, its document's entries and the sink.

    q_THK      [T, H, K]  already scaled; near_TK [T, K] rows of the same tokens
    far_SK     [T / ratio, K] entries of all documents in order, or None
    chosen_Tk  i64 [T, k] entry numbers inside the document, -1 for none; None takes all visible
    returns    outputs [T, H, K] and log denominators [T, H] (f32; no gradient)
    """
    out, lse = _Attend.apply(  # type: ignore[no-untyped-call]
        q_THK, near_TK, far_SK, chosen_Tk, sink_H, ratio, tiles
    )
    return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        near_TK: Tensor,
        far_SK: Tensor | None,
        chosen_Tk: Tensor | None,
        sink_H: Tensor,
        ratio: int,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_type(q_THK.dtype)
        heads = q_THK.shape[1]
        out = torch.empty_like(q_THK)
        lse = q_THK.new_empty(q_THK.shape[:2], dtype=wide)
        sink = sink_H.to(wide)[None, :, None]
        masks = _Masks(ratio, q_THK.device)
        for at, begin in zip(tiles.first, tiles.begin, strict=True):
            rows = slice(at, at + WINDOW)
            keys = _keys(near_TK, far_SK, ratio, at, begin)
            score = (q_THK[rows].flatten(0, 1) @ keys.t()).to(wide).view(WINDOW, heads, -1)
            masks.apply(score, at, begin, chosen_Tk)
            top = torch.maximum(score.amax(-1, keepdim=True), sink)
            score.sub_(top).exp_()
            total = score.sum(-1, keepdim=True) + (sink - top).exp()
            lse[rows] = (top + total.log())[..., 0]
            share = (score / total).to(q_THK.dtype).flatten(0, 1)
            out[rows] = (share @ keys).view(WINDOW, heads, -1)
        ctx.save_for_backward(q_THK, near_TK, far_SK, chosen_Tk, sink_H, out, lse)
        ctx.ratio, ctx.tiles = ratio, tiles
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, near_TK, far_SK, chosen_Tk, sink_H, out, lse = ctx.saved_tensors
        ratio, tiles = ctx.ratio, ctx.tiles
        wide, heads = lse.dtype, q_THK.shape[1]
        grad = grad.contiguous()
        for_q = torch.empty_like(q_THK)
        for_near = torch.zeros_like(near_TK, dtype=wide)
        for_far = None if far_SK is None else torch.zeros_like(far_SK, dtype=wide)
        drop = (grad.to(wide) * out.to(wide)).sum(-1)
        masks = _Masks(ratio, q_THK.device)
        for at, begin in zip(tiles.first, tiles.begin, strict=True):
            rows = slice(at, at + WINDOW)
            q, g = q_THK[rows].flatten(0, 1), grad[rows].flatten(0, 1)
            keys = _keys(near_TK, far_SK, ratio, at, begin)
            share = (q @ keys.t()).to(wide).view(WINDOW, heads, -1)
            masks.apply(share, at, begin, chosen_Tk)
            share.sub_(lse[rows][..., None]).exp_()
            slope = (g @ keys.t()).to(wide).view(WINDOW, heads, -1)
            slope.sub_(drop[rows][..., None]).mul_(share)
            share_N, slope_N = (s.to(q.dtype).flatten(0, 1) for s in (share, slope))
            for_q[rows] = (slope_N @ keys).view(WINDOW, heads, -1)
            for_keys = (share_N.t() @ g).to(wide) + (slope_N.t() @ q).to(wide)
            low = max(at - WINDOW, begin)
            for_near[low : at + WINDOW] += for_keys[: at + WINDOW - low]
            if for_far is not None:
                for_far[begin // ratio : (at + WINDOW) // ratio] += for_keys[at + WINDOW - low :]
        for_sink = -((sink_H.to(wide) - lse).exp() * drop).sum(0)
        return (
            for_q,
            for_near.to(near_TK.dtype),
            None if for_far is None else for_far.to(far_SK.dtype),
            None,
            for_sink.to(sink_H.dtype),
            None,
            None,
        )


def _keys(near_TK: Tensor, far_SK: Tensor | None, ratio: int, at: int, begin: int) -> Tensor:
    """Rows that the tile at `at` may see: the tile before it, itself, then entries."""
    near = near_TK[max(at - WINDOW, begin) : at + WINDOW]
    if far_SK is None:
        return near
    return torch.cat((near, far_SK[begin // ratio : (at + WINDOW) // ratio]))


class _Masks:
    """What a tile must not see, written into its scores [128, H, N] as -inf."""

    def __init__(self, ratio: int, device: torch.device) -> None:
        at = torch.arange(WINDOW, device=device)[:, None]
        row = torch.arange(2 * WINDOW, device=device) - WINDOW
        self.near = ((row > at) | (row <= at - WINDOW))[:, None]
        self.ratio = ratio
        if ratio:
            entry = torch.arange(WINDOW // ratio, device=device)
            self.last = (entry >= (at + 1) // ratio)[:, None]

    def apply(self, score: Tensor, at: int, begin: int, chosen_Tk: Tensor | None) -> None:
        """Hide rows outside the window, entries not yet complete, and entries not chosen."""
        near = WINDOW if at == begin else 2 * WINDOW
        score[..., :near].masked_fill_(self.near[..., -near:], -torch.inf)
        if score.shape[-1] == near:
            return
        if chosen_Tk is None:
            score[..., -(WINDOW // self.ratio) :].masked_fill_(self.last, -torch.inf)
            return
        chosen, entries = chosen_Tk[at : at + WINDOW], score.shape[-1] - near
        hidden = torch.ones(WINDOW, entries + 1, dtype=torch.bool, device=score.device)
        hidden.scatter_(1, chosen.masked_fill(chosen < 0, entries), False)
        score[..., near:].masked_fill_(hidden[:, None, :-1], -torch.inf)


@torch.no_grad()
def choose(
    q_TIJ: Tensor, weight_TI: Tensor, keys_SJ: Tensor, ratio: int, tiles: Tiles, k: int
) -> Tensor:
    """The k best visible entries of every token (report eqs 16 and 17): i64 [T, k], -1 for none.

    Numbers count inside the token's document. Ties are not ordered.
    """
    wide = wide_type(q_TIJ.dtype)
    out = torch.full((q_TIJ.shape[0], k), -1, device=q_TIJ.device)
    masks = _Masks(ratio, q_TIJ.device)
    for at, begin in zip(tiles.first, tiles.begin, strict=True):
        rows = slice(at, at + WINDOW)
        keys = keys_SJ[begin // ratio : (at + WINDOW) // ratio]
        each = (q_TIJ[rows].flatten(0, 1) @ keys.t()).relu_().to(wide).view(WINDOW, -1, len(keys))
        score = torch.bmm(weight_TI[rows][:, None].to(wide), each)[:, 0]
        score[:, -(WINDOW // ratio) :].masked_fill_(masks.last[:, 0], -torch.inf)
        best = score.topk(min(k, len(keys)), dim=-1, sorted=False)
        found = best.indices.masked_fill(best.values == -torch.inf, -1)
        out[rows, : found.shape[1]] = found
    return out
