"""Linears, norms, rotation and the Hadamard transform against float64 and plain loops.

Number formats are in test_quant.py; here only that they are applied where the contract says.
"""

import pytest
import torch
from torch import Tensor

from overleap.kernels.spec import RowFormat, Weight
from overleap.kernels.torch.linear import (
    grouped_matmul,
    hadamard,
    matmul,
    norm_rope,
    quantize,
    rms_norm,
    rotate,
    values_of,
)
from overleap.kernels.torch.quant import dequantize, fp4_weight, fp8_weight, round_fp8
from tests.kernels.paged import SIZES


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got.double() - expected.double()).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("form", ["plain", "bf16", "fp8", "fp4"])
@pytest.mark.parametrize("round_input", [False, True])
def test_matmul(tokens: int, form: str, round_input: bool, generator: torch.Generator) -> None:
    """Outputs 129 and inputs 160: neither is a whole number of FP8 blocks.

    A large input, unused itself, takes accuracy from the others that share its scale: all up to
    the 128th and none beyond.
    """
    x, w = torch.randn(tokens, 160, generator=generator), torch.randn(129, 160, generator=generator)
    x[:, 0], w[:, 0] = 1e4, 0.0
    weight = {
        "plain": Weight(w),
        "bf16": Weight(w.bfloat16()),
        "fp8": fp8_weight(w),
        "fp4": fp4_weight(w),
    }[form]
    assert weight.packed == (form in ("fp8", "fp4"))
    inputs = round_fp8(x, 128) if round_input else x
    got = matmul(x, weight, round_input)
    assert got.dtype is torch.float32
    assert near(got, inputs.double() @ dequantize(weight).double().t())
    if round_input:
        assert not near(got, x.double() @ dequantize(weight).double().t(), 1e-4)


@pytest.mark.parametrize("tokens", SIZES)
def test_grouped_matmul(tokens: int, generator: torch.Generator) -> None:
    """Group g of the input meets rows g * N .. of the weight and no others."""
    groups, outputs, inputs = 3, 5, 7
    x = torch.randn(tokens, groups, inputs, generator=generator)
    w = torch.randn(groups * outputs, inputs, generator=generator)
    got = grouped_matmul(x, Weight(w))
    assert got.shape == (tokens, groups, outputs)
    for g in range(groups):
        assert near(got[:, g], x[:, g].double() @ w[g * outputs : (g + 1) * outputs].double().t())


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn(tokens, 33, generator=generator) * 1e-2).to(dtype)
    weight, eps = torch.randn(33, generator=generator).to(dtype), 1e-6
    plain = x.double() / (x.double().square().mean(1, keepdim=True) + eps).sqrt()
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    for given, expected in ((weight, plain * weight.double()), (None, plain)):
        got = rms_norm(x, given, eps)
        assert got.dtype is dtype
        assert near(got, expected, tolerance)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert rms_norm(torch.zeros(1, 9), None, 1e-6).equal(torch.zeros(1, 9))


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("heads", [None, 3])
def test_rotate(tokens: int, heads: int | None, generator: torch.Generator) -> None:
    """Pairs (2i, 2i + 1) of the last dims turn; the others stay bit for bit."""
    shape = (tokens, 20) if heads is None else (tokens, heads, 20)
    x = torch.randn(shape, generator=generator)
    position = torch.randint(0, 2000, (tokens,), generator=generator)
    frequency = torch.rand(4, generator=generator)
    got = rotate(x, position, frequency, False)
    assert got[..., :12].equal(x[..., :12])
    angle = (position.float()[:, None] * frequency).double()
    if heads is not None:
        angle = angle[:, None]
    for i in range(4):
        a, b = x[..., 12 + 2 * i].double(), x[..., 13 + 2 * i].double()
        cos, sin = angle[..., i].cos(), angle[..., i].sin()
        assert near(got[..., 12 + 2 * i], a * cos - b * sin)
        assert near(got[..., 13 + 2 * i], a * sin + b * cos)


@pytest.mark.parametrize("tokens", SIZES)
def test_inverse_rotation_undoes_it(tokens: int, generator: torch.Generator) -> None:
    x = torch.randn(tokens, 2, 16, generator=generator)
    position = torch.randint(100, 10**6, (tokens,), generator=generator)
    frequency = 0.1 + torch.rand(8, generator=generator)  # all dims turn
    there = rotate(x, position, frequency, False)
    assert near(rotate(there, position, frequency, True), x)
    assert not near(there, x, 1e-2)


def test_rotated_products_depend_on_the_distance_alone(generator: torch.Generator) -> None:
    q = torch.randn(1, 16, generator=generator)
    frequency = 0.1 + torch.rand(8, generator=generator)
    k = rotate(q, torch.tensor([4]), frequency, False)  # of all distances, 4 gives the most

    def product(at: int, other: int) -> float:
        turned = [rotate(x, torch.tensor([p]), frequency, False) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) > product(7, 4) + 1e-3


@pytest.mark.parametrize("tokens", [1, 63])
def test_norm_rope_is_one_after_the_other(tokens: int, generator: torch.Generator) -> None:
    x = torch.randn(tokens, 3, 16, generator=generator)
    position = torch.arange(5, 5 + tokens)
    frequency, weight = torch.rand(4, generator=generator), torch.randn(16, generator=generator)
    for given in (weight, None):
        got = norm_rope(x, given, 1e-6, position, frequency)
        assert near(got, rotate(rms_norm(x, given, 1e-6), position, frequency, False), 1e-6)


@pytest.mark.parametrize("width", [1, 2, 16, 128])
@pytest.mark.parametrize("shape", [(1,), (63, 3), (129,)])
def test_hadamard(width: int, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Entry (i, j) of the matrix is (-1)^(bits in common) / sqrt(width): Sylvester's order."""
    x = torch.randn(*shape, width, generator=generator)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    matrix = torch.tensor(signs, dtype=torch.float64) / width**0.5
    assert near(hadamard(x), x.double() @ matrix)
    assert near(hadamard(hadamard(x)), x)


@pytest.mark.parametrize("shape", [(1,), (63, 3), (5, 2, 2)])
def test_rows_of_any_shape(shape: tuple[int, ...], generator: torch.Generator) -> None:
    """quantize and values_of keep leading dims; the bytes are those of each row alone."""
    for row in (RowFormat("kv", 40, 8), RowFormat("key", 64, 0), RowFormat("wide", 40, 0)):
        x = torch.randn(*shape, row.width, generator=generator)
        rows = quantize(x, row)
        assert rows.dtype is row.dtype
        assert rows.shape[:-1] == shape
        one_by_one = torch.stack([quantize(v[None], row)[0] for v in x.flatten(0, -2)])
        assert rows.flatten(0, -2).equal(one_by_one)
        values = values_of(rows, row)
        assert values.shape == x.shape
        assert values.equal(x) == (row.kind == "wide")
