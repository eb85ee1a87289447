"""Packed bytes to numbers and back, by integer operations: any chip with 32-bit integers will do.

No kernel here or beside asks the chip for an FP8, FP4 or scale type, nor for bfloat16 in memory:
all of those travel as integers. Values of the formats: kernels/torch/quant.py. Not here: where rows
lie.

FORM of a weight or vector: 0 f32, 1 bits of bf16 in i16, 2 e4m3 bytes, 3 e2m1 pairs.
KIND of a cache row: 0 wide, 1 kv, 2 key.
"""

import triton
import triton.language as tl


@triton.jit
def power(code):
    """2^(code - 127) as f32, from an e8m0 code in i32; 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    """f32 from codes in i32."""
    body = code & 127
    small = (body.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)  # steps of 2^-9
    bits = tl.where(body < 8, small, (body << 20) + (120 << 23))
    bits = tl.where(body == 127, 0x7FC00000, bits) | ((code & 128) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e2m1(code):
    """f32 from codes 0..15 in i32."""
    body = code & 7
    bits = tl.where(body < 2, body * 0x3F000000, (body << 22) + (126 << 23))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def wide(value, FORM: tl.constexpr):
    """f32 from what lies in memory: f32 itself, or the bits of a bf16 in i16."""
    if FORM == 1:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def narrow(value, FORM: tl.constexpr):
    """What lies in memory for f32: itself, or bits of the nearest bf16 in i16, ties to even."""
    if FORM == 1:
        bits = value.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, near).to(tl.int16)
    else:
        return value


@triton.jit
def scale_exponent(amax, TOP: tl.constexpr, TOP_EXPONENT: tl.constexpr, FLOOR: tl.constexpr):
    """ceil(log2(amax / largest)) in i32, and where amax is not finite."""
    bits = amax.to(tl.int32, bitcast=True)
    raised = ((bits & 0x7FFFFF) > TOP).to(tl.int32)
    exponent = (bits >> 23) - 127 - TOP_EXPONENT + raised
    return tl.maximum(exponent, FLOOR), (bits >> 23) == 255


@triton.jit
def nearest(value, exponent, bad, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """|value| / 2^exponent rounded to the format, plus a number that rounds; and that number."""
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(bad, 0.0, tl.abs(value) * down)
    binade = scaled.to(tl.int32, bitcast=True) & 0x7F800000
    binade = tl.maximum(binade, (LOWEST + 127) << 23) + ((23 - MANTISSA) << 23)
    magic = binade.to(tl.float32, bitcast=True)
    return scaled + magic, magic


@triton.jit
def codes(value, exponent, bad, LOWEST: tl.constexpr, MANTISSA: tl.constexpr, SIGN: tl.constexpr):
    """Nearest code of value / 2^exponent, in i32."""
    shifted, magic = nearest(value, exponent, bad, LOWEST, MANTISSA)
    steps = shifted.to(tl.int32, bitcast=True) & 0x7FFFFF
    binade = (magic.to(tl.int32, bitcast=True) >> 23) - (LOWEST + 127 + 23 - MANTISSA)
    sign = (value.to(tl.int32, bitcast=True) < 0).to(tl.int32)
    return (binade << MANTISSA) + steps + (sign << SIGN)


@triton.jit
def amax(value, AXIS: tl.constexpr):
    """Largest size along an axis, which it keeps; bits compare as sizes do, so a NaN is largest."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=AXIS, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(value):
    """[rows, 128] as e4m3 with one scale a row would give them back (activations)."""
    exponent, bad = scale_exponent(amax(value, 1), 0x600000, 8, -22)
    shifted, magic = nearest(value, exponent, bad, -6, 3)
    up = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    size = tl.where(bad, float("nan"), (shifted - magic) * up)
    sign = value.to(tl.int32, bitcast=True) & -0x80000000
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def weight_tile(data, scale, row, column, rows, columns, FORM: tl.constexpr):
    """f32 [len(row), len(column)] of a stored weight [rows, columns]; zeros beyond it."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    r, c = row.to(tl.int64)[:, None], column[None, :]
    if FORM == 2:
        code = tl.load(data + r * columns + c, mask=there, other=0).to(tl.int32)
        at = (r // 128) * ((columns + 127) // 128) + c // 128
        return e4m3(code) * power(tl.load(scale + at, mask=there, other=127).to(tl.int32))
    elif FORM == 3:
        byte = tl.load(data + r * (columns // 2) + c // 2, mask=there, other=0).to(tl.int32)
        at = r * (columns // 32) + c // 32
        size = power(tl.load(scale + at, mask=there, other=127).to(tl.int32))
        return e2m1((byte >> ((c & 1) * 4)) & 15) * size
    else:
        return wide(tl.load(data + r * columns + c, mask=there, other=0), FORM)


@triton.jit
def row_tile(
    pointer, there, KIND: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr, KP: tl.constexpr
):
    """f32 [len(pointer), KP] of the cache rows that begin at these addresses; zeros elsewhere."""
    column = tl.arange(0, KP)[None, :]
    p, there = pointer[:, None], there[:, None]
    if KIND == 0:
        return tl.load(p + column, mask=there & (column < K), other=0.0)
    elif KIND == 1:
        PLAIN: tl.constexpr = K - ROPE
        plain = column < PLAIN
        code = tl.load(p + column, mask=there & plain, other=0).to(tl.int32)
        at = PLAIN + 2 * ROPE + column // 64
        size = power(tl.load(p + at, mask=there & plain, other=127).to(tl.int32))
        turned = there & (column >= PLAIN) & (column < K)
        at = PLAIN + 2 * (column - PLAIN)
        low = tl.load(p + at, mask=turned, other=0).to(tl.int32)
        high = tl.load(p + at + 1, mask=turned, other=0).to(tl.int32)
        rope = ((low | (high << 8)) << 16).to(tl.float32, bitcast=True)
        return tl.where(plain, e4m3(code) * size, rope)
    else:
        inside = there & (column < K)
        byte = tl.load(p + column // 2, mask=inside, other=0).to(tl.int32)
        size = power(tl.load(p + K // 2 + column // 32, mask=inside, other=127).to(tl.int32))
        return e2m1((byte >> ((column & 1) * 4)) & 15) * size


@triton.jit
def times(a, b, acc, BF16: tl.constexpr):
    """acc + a @ b in f32; factors as bf16, which a chip multiplies faster, where that is right."""
    if BF16:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
