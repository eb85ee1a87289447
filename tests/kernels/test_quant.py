"""The number formats against a second formulation, written from the rules in exact arithmetic.

The oracle knows no bits: it lists the values of a format, finds the scale with fractions and takes
the nearest value, an even code at a tie. Read next: overleap/kernels/torch/quant.py.
"""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from overleap.kernels.spec import Weight
from overleap.kernels.torch import quant

E4M3 = "e4m3"
E2M1 = "e2m1"
LARGEST = {E4M3: 448, E2M1: 6}
FLOOR = {E4M3: Fraction(float(np.float32(1e-4))), E2M1: 6 * Fraction(2) ** -126}
ROUND = {E4M3: quant.round_fp8, E2M1: quant.round_fp4}


def table(form: str) -> list[Fraction]:
    """Values of the codes without sign, ascending; code number = index."""
    mantissa, bias, codes = {E4M3: (3, 7, 127), E2M1: (1, 1, 8)}[form]
    values = []
    for code in range(codes):
        exponent, fraction = divmod(code, 2**mantissa)
        if exponent == 0:
            values.append(Fraction(fraction, 2**mantissa) * Fraction(2) ** (1 - bias))
        else:
            values.append((1 + Fraction(fraction, 2**mantissa)) * Fraction(2) ** (exponent - bias))
    assert values[-1] == LARGEST[form]
    return values


def scale_of(amax: Fraction, form: str) -> Fraction:
    """2^ceil(log2(amax / largest)): the smallest power of two s with s * largest >= amax."""
    k = math.frexp(float(amax))[1] - 12  # safely below
    while LARGEST[form] * Fraction(2) ** k < amax:
        k += 1
    return Fraction(2) ** k


def oracle(row: np.ndarray, group: int, form: str, floor: Fraction | None) -> np.ndarray:
    """One row, float64 in and out, every step exact."""
    values = table(form)
    grid = np.array([float(v) for v in values])
    out = np.empty(len(row))
    for start in range(0, len(row), group):
        part = row[start : start + group].astype(np.float64)
        amax = Fraction(float(np.abs(part).max()))
        scale = float(scale_of(max(amax, FLOOR[form] if floor is None else floor), form))
        scaled = np.abs(part) / scale  # a power of two: exact in float64
        distance = np.abs(scaled[:, None] - grid[None, :])
        best = distance.min(axis=1, keepdims=True)
        # Of the one or two nearest codes, the even one if there are two.
        odd = np.arange(len(grid)) % 2
        code = np.where(distance == best, odd, 2).argmin(axis=1)
        out[start : start + group] = np.copysign(grid[code] * scale, part)
    return out


def same_bits(got: Tensor, wanted: np.ndarray) -> None:
    # Just under 2^128 the nearest FP4 value is 2^128 itself, an infinity in float32.
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(wanted.astype(np.float32))
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def check_rounding(x: Tensor, group: int, form: str) -> None:
    wanted = np.stack([oracle(row, group, form, None) for row in x.double().numpy()])
    same_bits(ROUND[form](x, group), wanted)


def wild(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """Magnitudes over the whole float32 range, with zeros, negative zeros and subnormals."""
    exponent = torch.randint(-149, 128, (rows, 1), generator=generator)
    exponent = exponent + torch.randint(-12, 1, (rows, width), generator=generator)
    x = torch.randn(rows, width, generator=generator).clamp(-1.9, 1.9).double()
    x = (x * 2.0**exponent).float()
    kind = torch.randint(0, 20, x.shape, generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, -0.0, x))


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FORMS = [(E4M3, 64), (E4M3, 128), (E2M1, 32)]


@pytest.mark.parametrize(("form", "group"), FORMS)
@pytest.mark.parametrize("width", [1, 31, 63, 64, 65, 127, 200])
def test_rounding_of_wild_values(
    form: str, group: int, width: int, generator: torch.Generator
) -> None:
    check_rounding(wild(generator, 300, width), group, form)


@pytest.mark.parametrize(("form", "group"), FORMS)
def test_rounding_of_ties(form: str, group: int) -> None:
    """Halfway between neighbours, and one float32 step to either side, at several scales."""
    values = table(form)
    middles = [float((a + b) / 2) for a, b in pairwise(values)]
    for scale in (2.0**-22, 2.0**-3, 1.0, 2.0**40):
        exact = torch.tensor(middles, dtype=torch.float32)
        near = [torch.nextafter(exact, torch.tensor(side)) for side in (0.0, 1e9)]
        for points in (exact, *near):
            x = (points * scale).repeat(2, 1)
            x[1] *= -1
            # One member at the top of the range fixes the scale of every group.
            top = torch.full((2, 1), float(values[-1] * Fraction(scale)))
            parts = [torch.cat((top, part), 1) for part in x.split(group - 1, dim=1)]
            for part in parts:
                check_rounding(part, group, form)


@pytest.mark.parametrize(("form", "group"), FORMS)
def test_scale_at_every_power_of_two(form: str, group: int) -> None:
    """amax = largest * 2^k keeps 2^k; one step more doubles the scale; one step less does not."""
    limit = torch.tensor([LARGEST[form] * 2.0**k for k in range(-126, 119)], dtype=torch.float32)
    for amax in (
        limit,
        torch.nextafter(limit, torch.tensor(0.0)),
        torch.nextafter(limit, torch.tensor(float("inf"))),
    ):
        x = torch.stack((amax, amax * 0.3, -amax * 0.011), dim=1)
        check_rounding(x, group, form)


@pytest.mark.parametrize(("form", "group"), FORMS)
def test_zeros_and_floor(form: str, group: int) -> None:
    floor = float(FLOOR[form])
    smallest = 2.0**-149
    x = torch.tensor([[0.0, -0.0, 0.0], [floor, -floor / 3, floor / 900], [smallest, 0.0, 0.0]])
    check_rounding(x, group, form)
    assert ROUND[form](x[:1], group).signbit().tolist() == [[False, True, False]]


@pytest.mark.parametrize("form", [E4M3, E2M1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_spoils_its_group_only(form: str, bad: float) -> None:
    x = torch.ones(2, 96)
    x[1, 40] = bad
    rounded = ROUND[form](x, 32)
    assert rounded[1, 32:64].isnan().all()
    rounded[1, 32:64] = 1.0
    assert torch.equal(rounded, torch.ones(2, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_keeps_the_dtype(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(5, 7, 70, generator=generator).to(torch.bfloat16)
    for round_to in ROUND.values():
        got = round_to(x.to(dtype), 32)
        assert got.dtype is dtype
        assert torch.equal(got.float(), round_to(x.float(), 32))


def test_fp8_against_the_cast_of_torch(generator: torch.Generator) -> None:
    """A third opinion: torch's own float8 cast of the scaled values."""
    x = wild(generator, 2000, 64).clamp(-1e30, 1e30)
    scale = [float(scale_of(max(Fraction(a), FLOOR[E4M3]), E4M3)) for a in x.abs().amax(1).tolist()]
    factor = torch.tensor(scale, dtype=torch.float64)[:, None]
    cast = (x.double() / factor).float().to(torch.float8_e4m3fn)
    assert torch.equal(quant.round_fp8(x, 64), (cast.double() * factor).float())


def test_every_e4m3_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    scale = torch.full((1, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = quant.dequantize(Weight(codes.view(torch.float8_e4m3fn), scale))
    half = [float(v) for v in table(E4M3)]
    wanted = torch.tensor([*half, np.nan, *[-v for v in half], np.nan])[None]
    assert got[0, 127].isnan() and got[0, 255].isnan() and got.isnan().sum() == 2
    same_bits(got.nan_to_num(1.0), wanted.nan_to_num(1.0).numpy())
    rounded = quant.dequantize(Weight(codes.view(torch.float8_e4m3fn), scale), torch.bfloat16)
    assert torch.equal(rounded.float().nan_to_num(1.0), got.nan_to_num(1.0))


def test_every_pair_of_e2m1_codes() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(4, 64).view(torch.int8)
    scale = torch.full((4, 4), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    got = quant.dequantize(Weight(data, scale))
    half = [float(v) for v in table(E2M1)]
    signed = half + [-v for v in half]
    wanted = [signed[code] for byte in range(256) for code in (byte % 16, byte // 16)]
    same_bits(got, np.array(wanted).reshape(4, 128))


def test_every_e8m0_scale() -> None:
    """2^(code - 127), the lowest a float32 subnormal, the last a NaN; for both kinds of weight."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = torch.tensor([float(Fraction(2) ** (code - 127)) for code in range(255)] + [np.nan])
    ones = torch.full((256, 16), 0x22, dtype=torch.int8)
    fp4 = quant.dequantize(Weight(ones, codes[:, None].view(torch.float8_e8m0fnu)))
    data = torch.ones(1, 256 * 128).to(torch.float8_e4m3fn)
    fp8 = quant.dequantize(Weight(data, codes[None].view(torch.float8_e8m0fnu)))
    for got in (fp4[:, 5], fp8[0, 7::128]):
        assert got[255].isnan()
        same_bits(got[:255], wanted[:255].numpy())


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 130), (129, 63), (300, 257)])
def test_fp8_weight(shape: tuple[int, int], generator: torch.Generator) -> None:
    height, width = shape
    blocks = ((height + 127) // 128, (width + 127) // 128)
    steps = torch.randint(-30, 30, blocks, generator=generator)
    spread = 2.0 ** steps.repeat_interleave(128, 0).repeat_interleave(128, 1)
    w = torch.randn(shape, generator=generator) * spread[:height, :width]
    packed = quant.fp8_weight(w)
    assert packed.scale is not None
    assert packed.data.dtype is torch.float8_e4m3fn and packed.data.shape == shape
    assert packed.scale.dtype is torch.float8_e8m0fnu and packed.scale.shape == steps.shape
    got = quant.dequantize(packed)
    tiny = Fraction(2) ** -130
    for top in range(0, height, 128):
        for left in range(0, width, 128):
            block = w[top : top + 128, left : left + 128]
            wanted = oracle(block.double().flatten().numpy(), block.numel(), E4M3, tiny)
            same_bits(
                got[top : top + 128, left : left + 128].contiguous(), wanted.reshape(block.shape)
            )
    again = quant.fp8_weight(got)
    assert torch.equal(quant.dequantize(again), got), "a second pass must lose nothing"
    assert torch.equal(quant.dequantize(quant.fp8_weight(w.T)), got.T), "blocks are square"


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (127, 96), (130, 256)])
def test_fp4_weight(shape: tuple[int, int], generator: torch.Generator) -> None:
    w = wild(generator, *shape).clamp(-1e38, 1e38)
    packed = quant.fp4_weight(w)
    assert packed.scale is not None
    assert packed.data.dtype is torch.int8 and packed.data.shape == (shape[0], shape[1] // 2)
    assert packed.scale.dtype is torch.float8_e8m0fnu
    assert packed.scale.shape == (shape[0], shape[1] // 32)
    got = quant.dequantize(packed)
    same_bits(got, np.stack([oracle(row, 32, E2M1, None) for row in w.double().numpy()]))
    assert torch.equal(quant.dequantize(quant.fp4_weight(got)), got)


def test_a_plain_weight_is_not_copied() -> None:
    data = torch.randn(3, 5)
    assert quant.dequantize(Weight(data, None)) is data
    assert quant.dequantize(Weight(data, None), torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize(("width", "rope"), [(512, 64), (64, 16), (70, 2), (130, 64), (65, 8)])
def test_cache_entry(width: int, rope: int, generator: torch.Generator) -> None:
    x = torch.randn(57, width, generator=generator)
    x = x * 2.0 ** torch.randint(-30, 30, (57, 1), generator=generator)
    plain, groups = width - rope, -(-(width - rope) // 64)
    rows = quant.pack_kv(x, rope)
    used = plain + 2 * rope + groups
    assert rows.dtype is torch.uint8 and rows.shape == (57, (used + 7) // 8 * 8)
    assert not rows[:, used:].any()

    wanted = np.stack([oracle(row, 64, E4M3, None) for row in x[:, :plain].double().numpy()])
    got = quant.unpack_kv(rows, width, rope)
    same_bits(got[:, :plain].contiguous(), wanted)
    assert torch.equal(got[:, plain:], x[:, plain:].to(torch.bfloat16).float())
    assert torch.equal(got[:, :plain], quant.round_fp8(x[:, :plain], 64))
    # Field by field, as another reader of the bytes would take them.
    codes = rows[:, :plain].contiguous().view(torch.float8_e4m3fn).double()
    scales = 2.0 ** (rows[:, plain + 2 * rope : used].double() - 127)
    assert torch.equal(codes * scales.repeat_interleave(64, 1)[:, :plain], got[:, :plain].double())
    kept = rows[:, plain : plain + 2 * rope].clone().view(torch.bfloat16)
    assert torch.equal(kept.float(), got[:, plain:])
    # Rows of any leading shape, and a strided pool.
    pool = torch.zeros(57, 3, rows.shape[1], dtype=torch.uint8)
    pool[:, 1] = rows
    assert torch.equal(quant.unpack_kv(pool, width, rope)[:, 1], got)
    assert torch.equal(quant.unpack_kv(pool[5:6, 1], width, rope), got[5:6])


def test_released_entry_sizes() -> None:
    assert quant.pack_kv(torch.zeros(1, 512), 64).shape == (1, 584)
    assert quant.pack_key(torch.zeros(1, 128)).shape == (1, 68)
    assert quant.pack_kv(torch.zeros(0, 512), 64).shape == (0, 584)
    assert quant.unpack_kv(torch.zeros(0, 584, dtype=torch.uint8), 512, 64).shape == (0, 512)


@pytest.mark.parametrize("width", [2, 16, 32, 64, 128])
def test_index_key(width: int, generator: torch.Generator) -> None:
    x = wild(generator, 63, width)
    rows = quant.pack_key(x)
    groups = -(-width // 32)
    assert rows.dtype is torch.uint8 and rows.shape == (63, width // 2 + groups)
    got = quant.unpack_key(rows, width)
    same_bits(got, np.stack([oracle(row, 32, E2M1, None) for row in x.double().numpy()]))
    assert torch.equal(got, quant.round_fp4(x))
    first = rows[:, 0] % 16
    half = [float(v) for v in table(E2M1)]
    low = torch.tensor(half + [-v for v in half], dtype=torch.float64)[first.long()]
    scale = 2.0 ** (rows[:, width // 2].double() - 127)
    assert torch.equal(low * scale, got[:, 0].double()), "the low nibble comes first"
    assert torch.equal(quant.unpack_key(rows.view(9, 7, -1), width), got.view(9, 7, width))
