"""Number formats of the released weights and cache: values to bytes and back, bit for bit.

Not here: matmul over packed weights (layers and ops call `dequantize`), cache addressing.
Read next: kernels/spec.py (who uses these), cache/layout.py (where the bytes lie).

Letters: N rows, K width, R rotary width, J indexer width, G members of a group.
Only integer and float32 arithmetic on plain dtypes is used, so that every torch device can run it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from overleap.kernels.spec import Weight

FP8_BLOCK = 128  # weights: 128 x 128 share a scale
FP4_GROUP = 32  # weights and indexer keys: 32 neighbours along the last dim share a scale
KV_GROUP = 64  # cache entries: 64 neighbours share a scale
_KV_ALIGN = 8  # a cache entry is padded to this many bytes
_NAN_SCALE = 255  # the one e8m0 code that is not a power of two


@dataclass(frozen=True)
class _Format:
    """A small float: sign, exponent, `mantissa` bits; numbers below 2^lowest are subnormal.

    The largest value is (1 + top / 2^23) * 2^top_exponent; `top` is written as float32 bits.
    """

    lowest: int
    mantissa: int
    top_exponent: int
    top: int
    values: tuple[float, ...]

    @property
    def sign_bit(self) -> int:
        return len(self.values).bit_length() - 2


def _values(lowest: int, mantissa: int, codes: int) -> tuple[float, ...]:
    """Value of every code, positive half first, then the same with the sign."""
    half: list[float] = []
    for code in range(codes // 2):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        significand = fraction + ((1 << mantissa) if exponent else 0)
        half.append(significand * 2.0 ** (max(exponent, 1) - 1 + lowest - mantissa))
    return tuple(half + [-value for value in half])


_NAN = (float("nan"),)
_E4M3_HALF = _values(-6, 3, 256)[:127]  # "fn": no infinity, the last code of each half is a NaN
_E4M3_VALUES = _E4M3_HALF + _NAN + tuple(-value for value in _E4M3_HALF) + _NAN
_E2M1_VALUES = _values(0, 1, 16)
_E8M0_VALUES = (*(2.0 ** (code - 127) for code in range(255)), *_NAN)
_E4M3 = _Format(-6, 3, 8, 0x600000, _E4M3_VALUES)  # largest 1.75 * 2^8 = 448
_E2M1 = _Format(0, 1, 2, 0x400000, _E2M1_VALUES)  # largest 1.5 * 2^2 = 6
_E2M1_PAIRS = tuple(_E2M1_VALUES[byte >> s & 15] for byte in range(256) for s in (0, 4))
_FRACTION = 0x7FFFFF  # of a float32
_FP8_FLOOR = -22  # ceil(log2(1e-4 / 448)): activations (official code, act_quant)
_LOWEST = -126  # ceil(log2(6 * 2^-126 / 6)): FP4; also weights, which know no other floor


def round_fp8(x: Tensor, group: int) -> Tensor:
    """Quantise to e4m3 along the last dim and return the values in the dtype of x.

    x      float [..., K]   a last group of fewer than `group` members has its own scale
    scale  2^ceil(log2(amax / 448)) per group, amax at least 1e-4; ties go to the even code
    A group that holds a NaN or an infinity becomes NaN.   (official code, act_quant)
    """
    return _round(x, group, _E4M3, _FP8_FLOOR)


def round_fp4(x: Tensor, group: int = FP4_GROUP) -> Tensor:
    """Quantise to e2m1 along the last dim and return the values in the dtype of x.

    x      float [..., K]
    scale  2^ceil(log2(amax / 6)) per group, amax at least 6 * 2^-126; ties go to the even code
    A group that holds a NaN or an infinity becomes NaN.   (official code, fp4_act_quant)
    """
    return _round(x, group, _E2M1, _LOWEST)


def pack_kv(x: Tensor, rope_dims: int) -> Tensor:
    """Cache entries of the release format.

    x        float [N, K]
    returns  u8 [N, bytes]: K-R e4m3 codes, R bf16, ceil((K-R)/64) e8m0 scales, zeros to 8 bytes
    """
    rows, width = x.shape
    plain = width - rope_dims
    codes, scales = _encode(x[:, :plain].float(), KV_GROUP, _E4M3, _FP8_FLOOR)
    rope = x[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
    used = plain + 2 * rope_dims + scales.shape[1]
    padding = torch.zeros(rows, -used % _KV_ALIGN, dtype=torch.uint8, device=x.device)
    return torch.cat((codes, rope, scales, padding), dim=1)


def unpack_kv(rows: Tensor, head_dim: int, rope_dims: int) -> Tensor:
    """u8 [..., bytes] as written by pack_kv -> f32 [..., head_dim]."""
    plain = head_dim - rope_dims
    tail = plain + 2 * rope_dims
    values = _lookup(_E4M3.values, rows[..., :plain])
    scales = _lookup(_E8M0_VALUES, rows[..., tail : tail + -(-plain // KV_GROUP)])
    # A copy, since a view of another dtype wants its own alignment.
    rope = rows[..., plain:tail].clone(memory_format=torch.contiguous_format)
    scaled = values * _spread(scales, KV_GROUP, plain)
    return torch.cat((scaled, rope.view(torch.bfloat16).float()), dim=-1)


def pack_key(x: Tensor) -> Tensor:
    """Indexer keys of the release format.

    x        float [N, J], J even
    returns  u8 [N, J/2 + ceil(J/32)]: two e2m1 codes a byte, low nibble first, then e8m0 scales
    """
    codes, scales = _encode(x.float(), FP4_GROUP, _E2M1, _LOWEST)
    return torch.cat((_join_nibbles(codes), scales), dim=1)


def unpack_key(rows: Tensor, index_dim: int) -> Tensor:
    """u8 [..., bytes] as written by pack_key -> f32 [..., index_dim]."""
    half = index_dim // 2
    values = _lookup_pairs(rows[..., :half])
    scales = _lookup(_E8M0_VALUES, rows[..., half : half + -(-index_dim // FP4_GROUP)])
    return values * _spread(scales, FP4_GROUP, index_dim)


def fp8_weight(w: Tensor) -> Weight:
    """Quantise a linear weight [N, K] to e4m3 with one e8m0 scale per 128 x 128 block.

    Lossless for values that came from such a weight (the scale is never larger than theirs).
    """
    height, width = w.shape
    blocks_n, blocks_k = -(-height // FP8_BLOCK), -(-width // FP8_BLOCK)
    full = pad(w.float(), (0, blocks_k * FP8_BLOCK - width, 0, blocks_n * FP8_BLOCK - height))
    blocks = full.view(blocks_n, FP8_BLOCK, blocks_k, FP8_BLOCK)
    exponent, bad = _scale_exponent(blocks.abs().amax((1, 3), keepdim=True), _E4M3, _LOWEST)
    codes = _codes(blocks, exponent, bad, _E4M3).view(full.shape)[:height, :width]
    scales = _scale_bytes(exponent, bad).view(blocks_n, blocks_k)
    return Weight(codes.contiguous().view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu))


def fp4_weight(w: Tensor) -> Weight:
    """Quantise a linear weight [N, K] to e2m1 pairs with one e8m0 scale per 32 inputs.

    K is a multiple of 32. Lossless for values that came from such a weight.
    """
    assert w.shape[1] % FP4_GROUP == 0, f"{w.shape[1]} inputs are no multiple of {FP4_GROUP}"
    codes, scales = _encode(w.float(), FP4_GROUP, _E2M1, _LOWEST)
    return Weight(_join_nibbles(codes).view(torch.int8), scales.view(torch.float8_e8m0fnu))


def dequantize(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a stored weight, [N, K] in `dtype`; exact in float32 and bfloat16.

    A plain weight of this dtype is returned as it is, not copied.
    """
    if weight.scale is None:
        return weight.data.to(dtype)
    scale = _lookup(_E8M0_VALUES, weight.scale.view(torch.uint8))
    if weight.data.dtype is torch.int8:
        out = _lookup_pairs(weight.data.view(torch.uint8))
        out.view(*scale.shape, FP4_GROUP).mul_(scale[:, :, None])
        return out.to(dtype)
    out = _lookup(_E4M3.values, weight.data.view(torch.uint8))
    height, width = out.shape
    columns = _spread(scale, FP8_BLOCK, width)
    whole = height // FP8_BLOCK
    out[: whole * FP8_BLOCK].view(whole, FP8_BLOCK, width).mul_(columns[:whole, None])
    out[whole * FP8_BLOCK :].mul_(columns[whole:])
    return out.to(dtype)


def _round(x: Tensor, group: int, form: _Format, floor: int) -> Tensor:
    values = _grouped(x.float(), group)
    exponent, bad = _scale_exponent(values.abs().amax(-1, keepdim=True), form, floor)
    shifted, magic = _nearest(values, exponent, bad, form)
    rounded = shifted.sub_(magic).mul_(_power(exponent)).masked_fill_(bad, float("nan"))
    return rounded.copysign_(values).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _encode(x: Tensor, group: int, form: _Format, floor: int) -> tuple[Tensor, Tensor]:
    """f32 [N, K] -> codes u8 [N, K], one a byte, and e8m0 scales u8 [N, ceil(K / group)]."""
    values = _grouped(x, group)
    exponent, bad = _scale_exponent(values.abs().amax(-1, keepdim=True), form, floor)
    codes = _codes(values, exponent, bad, form).flatten(-2)[..., : x.shape[-1]]
    return codes, _scale_bytes(exponent, bad).squeeze(-1)


def _codes(values: Tensor, scale_exp: Tensor, bad: Tensor, form: _Format) -> Tensor:
    """Nearest code of every value / 2^scale_exp, ties to even, as u8."""
    shifted, magic = _nearest(values, scale_exp, bad, form)
    steps = shifted.view(torch.int32).bitwise_and_(_FRACTION)
    # Codes count steps: one binade up is 2^mantissa codes further, so a carry needs no case.
    binade = (magic.view(torch.int32) >> 23).sub_(form.lowest + 127 + 23 - form.mantissa)
    codes = binade.bitwise_left_shift_(form.mantissa).add_(steps)
    return codes.add_(torch.signbit(values), alpha=1 << form.sign_bit).to(torch.uint8)


def _nearest(
    values: Tensor, scale_exp: Tensor, bad: Tensor, form: _Format
) -> tuple[Tensor, Tensor]:
    """|value| / 2^scale_exp rounded to the nearest value of the format, plus a magic number.

    magic is the power of two at which float32 itself is spaced as the format is at the value, so
    that adding it rounds, ties to even, and leaves the number of steps in the fraction bits.
    """
    scaled = (values.abs() * _power(-scale_exp)).masked_fill_(bad, 0.0)
    binade = scaled.view(torch.int32) & ~_FRACTION
    # Below 2^lowest the spacing stays the same: subnormals.
    binade.clamp_(min=(form.lowest + 127) << 23).add_((23 - form.mantissa) << 23)
    magic = binade.view(torch.float32)
    return scaled.add_(magic), magic


def _scale_exponent(amax: Tensor, form: _Format, floor: int) -> tuple[Tensor, Tensor]:
    """ceil(log2(amax / largest)) from the bits of amax, and where amax is NaN or infinite."""
    bits = amax.view(torch.int32)
    raised = ((bits & _FRACTION) > form.top).to(torch.int32)
    exponent = (bits >> 23) - 127 - form.top_exponent + raised
    return exponent.clamp_(min=floor), (bits >> 23) == 255


def _scale_bytes(exponent: Tensor, bad: Tensor) -> Tensor:
    return (exponent + 127).masked_fill(bad, _NAN_SCALE).to(torch.uint8)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent as f32, for -126..127, from bits: pow() may be off by one on some devices."""
    return ((exponent + 127) << 23).view(torch.float32)


def _grouped(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., ceil(K / group), group], zeros behind the end."""
    groups = -(-x.shape[-1] // group)
    missing = groups * group - x.shape[-1]
    return (pad(x, (0, missing)) if missing else x).reshape(*x.shape[:-1], groups, group)


def _spread(scales: Tensor, group: int, width: int) -> Tensor:
    """[..., groups] -> [..., width], every scale over its group."""
    return scales.repeat_interleave(group, dim=-1)[..., :width]


def _join_nibbles(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


@cache
def _on_device(table: tuple[float, ...], device: torch.device) -> Tensor:
    """A table f32, brought to the device once and not for every weight; fit for training too."""
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.float32, device=device)


def _lookup(table: tuple[float, ...], codes: Tensor) -> Tensor:
    """table[code] for u8 [...] -> f32 [...]."""
    values = _on_device(table, codes.device)
    return values.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _lookup_pairs(codes: Tensor) -> Tensor:
    """u8 [..., n], two e2m1 codes each -> f32 [..., 2n]."""
    pairs = _on_device(_E2M1_PAIRS, codes.device)
    # Both values of a byte move as one 64-bit word: four times the speed of rows of two.
    found = pairs.view(torch.int64).index_select(0, codes.reshape(-1).to(torch.int32))
    return found.view(torch.float32).view(*codes.shape[:-1], 2 * codes.shape[-1])
