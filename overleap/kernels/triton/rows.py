"""What is done to rows one by one: norms, rotation, the Hadamard transform, cache rows.

Angles come from torch: a sine is exact at a million radians on every device that torch has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overleap.kernels.spec import RowFormat
from overleap.kernels.triton.formats import amax, codes, narrow, scale_exponent, times, wide
from overleap.kernels.triton.linear import FORMS, bits
from overleap.kernels.triton.tuning import pow2

VALUES = 4096  # of a tile
GROUPS = {"kv": 64, "key": 32}


@triton.jit
def norm_turn(
    x, weight, cos, sin, out, ROWS, H, eps,
    X: tl.constexpr, W: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr,
    NORM: tl.constexpr, SIGN: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """rms_norm where NORM, times weight where W >= 0, last ROPE dims turned by row // H."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    k = tl.arange(0, KP)[None, :]
    there = (row < ROWS) & (k < K)
    value = wide(tl.load(x + row * K + k, mask=there, other=0), X)
    factor = tl.full((BR, 1), 1.0, dtype=tl.float32)
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / K + eps)
    value = value * factor
    if W >= 0:
        value = value * wide(tl.load(weight + k, mask=k < K, other=0), W)
    if ROPE > 0:
        PLAIN: tl.constexpr = K - ROPE
        turned = there & (k >= PLAIN)
        pair = k - PLAIN
        other = PLAIN + (pair ^ 1)
        beside = wide(tl.load(x + row * K + other, mask=turned, other=0), X) * factor
        if W >= 0:
            beside = beside * wide(tl.load(weight + other, mask=(k >= PLAIN) & (k < K), other=0), W)
        at = (row // H) * (ROPE // 2) + pair // 2
        c = tl.load(cos + at, mask=turned, other=1.0)
        s = tl.load(sin + at, mask=turned, other=0.0) * SIGN
        odd = (pair & 1) == 1
        value = tl.where(turned, value * c + tl.where(odd, beside, -beside) * s, value)
    tl.store(out + row * K + k, narrow(value, X), mask=there)


def _norm_turn(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    position: Tensor | None,
    frequency: Tensor | None,
    inverse: bool,
) -> Tensor:
    """eps None: no norm; position and frequency None: no rotation."""
    out, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    rows = x.numel() // width
    if not rows:
        return out
    x, cos, sin, rope, heads = x.contiguous(), out, out, 0, 1
    if position is not None and frequency is not None:
        angle = position.float()[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        rope, heads = 2 * frequency.numel(), rows // position.numel()
    padded = pow2(width)
    tile = max(1, VALUES // padded)
    norm_turn[(triton.cdiv(rows, tile),)](
        bits(x), bits(x if weight is None else weight), bits(cos), bits(sin), bits(out),
        rows, heads, eps or 0.0, X=FORMS[x.dtype], W=-1 if weight is None else FORMS[weight.dtype],
        K=width, ROPE=rope, NORM=eps is not None, SIGN=-1.0 if inverse else 1.0, BR=tile, KP=padded,
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See spec.Ops.rms_norm."""
    return _norm_turn(x, weight, eps, None, None, False)


def norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Tensor:
    """See spec.Ops.norm_rope."""
    return _norm_turn(x, weight, eps, position, frequency, False)


def rotate(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    """See spec.Ops.rotate."""
    return _norm_turn(x, None, None, position, frequency, inverse)


@triton.jit
def transform(
    x, out, ROWS, factor,
    X: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A product with the matrix of signs (-1)^(bits that row and column number share)."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    k = tl.arange(0, KP)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row < ROWS) & (k < K)[None, :]
    value = wide(tl.load(x + row * K + k[None, :], mask=there, other=0), X)
    shared = k[:, None] & n[None, :]
    shared = shared ^ (shared >> 8)
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = (shared ^ (shared >> 1)) & 1
    sign = (1 - 2 * shared).to(tl.float32)
    result = times(value, sign, tl.zeros((BR, BN), dtype=tl.float32), False) * factor
    tl.store(out + row * K + n[None, :], narrow(result, X), mask=(row < ROWS) & (n < K)[None, :])


def hadamard(x: Tensor) -> Tensor:
    """See spec.Ops.hadamard."""
    out, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    rows = x.numel() // width
    if rows:
        padded = pow2(width, 16)
        tile, columns = pow2(VALUES // padded, 16), min(padded, 64)
        transform[(triton.cdiv(rows, tile), padded // columns)](
            bits(x.contiguous()), bits(out), rows, width**-0.5,
            X=FORMS[x.dtype], K=width, BR=tile, KP=padded, BN=columns,
        )  # fmt: skip
    return out


@triton.jit
def pack_kv(
    x, out, ROWS,
    X: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr, BYTES: tl.constexpr,
    BR: tl.constexpr, GP: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Rows of the release format: e4m3 codes, bf16 rotary dims, scales, zeros."""
    PLAIN: tl.constexpr = K - ROPE
    GROUPS: tl.constexpr = (PLAIN + 63) // 64
    SCALES: tl.constexpr = PLAIN + 2 * ROPE
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    r, g = row[:, None, None], tl.arange(0, GP)[None, :, None]
    k = g * 64 + tl.arange(0, 64)[None, None, :]
    there = (r < ROWS) & (k < PLAIN)
    value = wide(tl.load(x + r * K + k, mask=there, other=0), X)
    exponent, bad = scale_exponent(amax(value, 2), 0x600000, 8, -22)
    code = codes(value, exponent, bad, -6, 3, 7)
    tl.store(out + r * BYTES + k, code.to(tl.uint8), mask=there)
    size = tl.where(bad, 255, exponent + 127).to(tl.uint8)
    tl.store(out + r * BYTES + SCALES + g, size, mask=(r < ROWS) & (g < GROUPS))
    r, k = row[:, None], tl.arange(0, RP)[None, :]
    there = (r < ROWS) & (k < ROPE)
    half = narrow(wide(tl.load(x + r * K + PLAIN + k, mask=there, other=0), X), 1).to(tl.int32)
    tl.store(out + r * BYTES + PLAIN + 2 * k, (half & 255).to(tl.uint8), mask=there)
    tl.store(out + r * BYTES + PLAIN + 2 * k + 1, ((half >> 8) & 255).to(tl.uint8), mask=there)
    k = SCALES + GROUPS + tl.arange(0, 8)[None, :]
    nothing = tl.zeros((BR, 8), dtype=tl.uint8)
    tl.store(out + r * BYTES + k, nothing, mask=(r < ROWS) & (k < BYTES))


@triton.jit
def pack_key(
    x, out, ROWS,
    X: tl.constexpr, K: tl.constexpr, BYTES: tl.constexpr, BR: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Indexer keys of the release format: two e2m1 codes a byte, then scales."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    r, g = row[:, None, None], tl.arange(0, GP)[None, :, None]
    byte = g * 16 + tl.arange(0, 16)[None, None, :]
    there = (r < ROWS) & (2 * byte < K)
    even = wide(tl.load(x + r * K + 2 * byte, mask=there, other=0), X)
    odd = wide(tl.load(x + r * K + 2 * byte + 1, mask=there, other=0), X)
    largest = tl.maximum(
        amax(even, 2).to(tl.int32, bitcast=True), amax(odd, 2).to(tl.int32, bitcast=True)
    )
    exponent, bad = scale_exponent(largest.to(tl.float32, bitcast=True), 0x400000, 2, -126)
    low, high = codes(even, exponent, bad, 0, 1, 3), codes(odd, exponent, bad, 0, 1, 3)
    tl.store(out + r * BYTES + byte, (low | (high << 4)).to(tl.uint8), mask=there)
    size = tl.where(bad, 255, exponent + 127).to(tl.uint8)
    tl.store(out + r * BYTES + K // 2 + g, size, mask=(r < ROWS) & (g * 32 < K))


def quantize(x: Tensor, row: RowFormat) -> Tensor:
    """See spec.Ops.quantize."""
    if row.kind == "wide":
        return x.float()
    plain, group = row.width - row.rope, GROUPS[row.kind]
    groups = -(-plain // group)
    width = (
        plain // 2 + groups if row.kind == "key" else -(-(plain + 2 * row.rope + groups) // 8) * 8
    )
    out = torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device=x.device)
    rows, padded = x.numel() // row.width, pow2(groups)
    if not rows:
        return out
    tile = max(1, VALUES // (padded * group))
    grid, x = (triton.cdiv(rows, tile),), x.contiguous()
    shape = {"X": FORMS[x.dtype], "K": row.width, "BYTES": width, "BR": tile, "GP": padded}
    if row.kind == "kv":
        pack_kv[grid](bits(x), out, rows, ROPE=row.rope, RP=pow2(row.rope), **shape)
    else:
        pack_key[grid](bits(x), out, rows, **shape)
    return out
