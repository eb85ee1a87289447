"""Hyper-connections: the streams' products, gates, collapse and spread (kernels/torch/hyper.py).

The product over all streams is split among programs, since one token has but a few outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overleap.kernels.triton.formats import narrow, times, wide
from overleap.kernels.triton.linear import FORMS, bits
from overleap.kernels.triton.tuning import pow2, tuning

ROWS, DEPTH = 16, 64  # of a tile of the product


@triton.jit
def mix_part(
    x, fn, mixes, squares, T, N, K, part,
    X: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Products [T, N] with fn and sums of squares [T] over one part of the columns."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    split = tl.program_id(1)
    n = tl.arange(0, NP)
    acc = tl.zeros((BT, NP), dtype=tl.float32)
    square = tl.zeros((BT,), dtype=tl.float32)
    end = tl.minimum((split + 1) * part, K)
    for low in range(split * part, end, BK):
        k = low + tl.arange(0, BK)
        there = (t < T)[:, None] & (k < end)[None, :]
        value = wide(tl.load(x + t[:, None] * K + k[None, :], mask=there, other=0), X)
        inside = (n < N)[:, None] & (k < end)[None, :]
        w = tl.load(fn + n[:, None] * K + k[None, :], mask=inside, other=0.0)
        acc = times(value, tl.trans(w), acc, False)
        square += tl.sum(value * value, axis=1)
    row = split * T + t
    there = (t < T)[:, None] & (n < N)[None, :]
    tl.store(mixes + row[:, None] * N + n[None, :], acc, mask=there)
    tl.store(squares + row, square, mask=t < T)


def _mix(x_TMD: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """RMSNorm of the flattened streams, then fn: f32 [T, N]."""
    tokens, columns, outputs = x_TMD.shape[0], fn.shape[1], fn.shape[0]
    part = tuning(x_TMD.device).streams_split
    splits = triton.cdiv(columns, part)
    mixes = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x_TMD.device)
    squares = torch.empty((splits, tokens), dtype=torch.float32, device=x_TMD.device)
    mix_part[(triton.cdiv(tokens, ROWS), splits)](
        bits(x_TMD), fn, mixes, squares, tokens, outputs, columns, part,
        X=FORMS[x_TMD.dtype], BT=ROWS, NP=pow2(outputs, 16), BK=DEPTH,
    )  # fmt: skip
    return mixes.sum(0) * torch.rsqrt(squares.sum(0) / columns + norm_eps)[:, None]


@triton.jit
def gates(
    mix, base, scale, pre, post, comb, T, eps, ROUNDS,
    M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of the products [T, (2 + M) M]: pre and post [T, M], comb [T, M, M] doubly stochastic."""
    N: tl.constexpr = (2 + M) * M
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    j = tl.arange(0, MP)[None, :]
    there = (t < T)[:, None] & (j < M)
    value = tl.load(mix + t[:, None] * N + j, mask=there, other=0.0) * tl.load(scale)
    value += tl.load(base + j, mask=j < M, other=0.0)
    tl.store(pre + t[:, None] * M + j, 1.0 / (1.0 + tl.exp(-value)) + eps, mask=there)
    value = tl.load(mix + t[:, None] * N + M + j, mask=there, other=0.0) * tl.load(scale + 1)
    value += tl.load(base + M + j, mask=j < M, other=0.0)
    tl.store(post + t[:, None] * M + j, 2.0 / (1.0 + tl.exp(-value)), mask=there)
    j, k = tl.arange(0, MP)[None, :, None], tl.arange(0, MP)[None, None, :]
    inside = (j < M) & (k < M)
    there = (t < T)[:, None, None] & inside
    at = 2 * M + j * M + k
    value = tl.load(mix + t[:, None, None] * N + at, mask=there, other=0.0) * tl.load(scale + 2)
    value += tl.load(base + at, mask=inside, other=0.0)
    # Lanes beyond M stand beside every row and every column, and count for nothing.
    value = tl.where(k < M, value, float("-inf"))
    c = tl.exp(value - tl.max(value, axis=2, keep_dims=True))
    c = tl.where(inside, c / tl.sum(c, axis=2, keep_dims=True) + eps, 0.0)
    c = c / (tl.sum(c, axis=1, keep_dims=True) + eps)
    for _ in range(ROUNDS - 1):
        c = c / (tl.sum(c, axis=2, keep_dims=True) + eps)
        c = c / (tl.sum(c, axis=1, keep_dims=True) + eps)
    tl.store(comb + t[:, None, None] * M * M + j * M + k, c, mask=there)


@triton.jit
def collapse(
    x, gate, y, T, D,
    X: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y [T, D], the sum of the streams weighted by gate [T, M]."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    there = (t < T)[:, None] & (d < D)
    acc = tl.zeros((BT, BD), dtype=tl.float32)
    for m in range(M):
        share = tl.load(gate + t * M + m, mask=t < T, other=0.0)
        value = wide(tl.load(x + (t * M + m)[:, None] * D + d, mask=there, other=0), X)
        acc += share[:, None] * value
    tl.store(y + t[:, None] * D + d, narrow(acc, X), mask=there)


@triton.jit
def spread(
    y, x, post, comb, out, T, D,
    X: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Stream k = program 2: post[k] y + the sum over j of comb[j, k] x[j]."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    k = tl.program_id(2)
    there = (t < T)[:, None] & (d < D)
    share = tl.load(post + t * M + k, mask=t < T, other=0.0)
    acc = share[:, None] * wide(tl.load(y + t[:, None] * D + d, mask=there, other=0), X)
    for j in range(M):
        share = tl.load(comb + (t * M + j) * M + k, mask=t < T, other=0.0)
        value = wide(tl.load(x + (t * M + j)[:, None] * D + d, mask=there, other=0), X)
        acc += share[:, None] * value
    tl.store(out + (t * M + k)[:, None] * D + d, narrow(acc, X), mask=there)


def _collapse(x_TMD: Tensor, gate_TM: Tensor) -> Tensor:
    tokens, streams, width = x_TMD.shape
    sizes = tuning(x_TMD.device)
    y = torch.empty((tokens, width), dtype=x_TMD.dtype, device=x_TMD.device)
    rows, columns = sizes.streams_tokens, sizes.streams_width
    collapse[(triton.cdiv(tokens, rows), triton.cdiv(width, columns))](
        bits(x_TMD), gate_TM, bits(y), tokens, width,
        X=FORMS[x_TMD.dtype], M=streams, BT=rows, BD=columns,
    )  # fmt: skip
    return y


def hc_pre(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec.Ops.hc_pre."""
    tokens, streams, width = x_TMD.shape
    pre = torch.empty((tokens, streams), dtype=torch.float32, device=x_TMD.device)
    post, comb = torch.empty_like(pre), pre.new_empty((tokens, streams, streams))
    if not tokens:
        return x_TMD.new_empty((0, width)), post, comb
    x, rows = x_TMD.contiguous(), tuning(x_TMD.device).streams_tokens
    gates[(triton.cdiv(tokens, rows),)](
        _mix(x, fn, norm_eps), base, scale, pre, post, comb, tokens, eps, iterations,
        M=streams, MP=pow2(streams, 2), BT=rows,
    )  # fmt: skip
    return _collapse(x, pre), post, comb


def hc_head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """See spec.Ops.hc_head."""
    if not x_TMD.shape[0]:
        return x_TMD.new_empty((0, x_TMD.shape[2]))
    x = x_TMD.contiguous()
    return _collapse(x, torch.sigmoid(_mix(x, fn, norm_eps) * scale + base) + eps)


def hc_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """See spec.Ops.hc_post."""
    tokens, streams, width = x_TMD.shape
    out = torch.empty(x_TMD.shape, dtype=x_TMD.dtype, device=x_TMD.device)
    if not tokens:
        return out
    sizes, y, x = tuning(x_TMD.device), y_TD.contiguous(), x_TMD.contiguous()
    rows, columns = sizes.streams_tokens, sizes.streams_width
    spread[(triton.cdiv(tokens, rows), triton.cdiv(width, columns), streams)](
        bits(y.to(x.dtype)), bits(x), post_TM.contiguous(), comb_TMM.contiguous(), bits(out),
        tokens, width, X=FORMS[x.dtype], M=streams, BT=rows, BD=columns,
    )  # fmt: skip
    return out
