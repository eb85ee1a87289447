"""Routing and experts against loops over single tokens.

The shared expert and the hash table are in ../model/test_moe.py.
"""

import math

import pytest
import torch
from torch import Tensor

from overleap.kernels.spec import Experts, Weight
from overleap.kernels.torch.moe import experts, gated, route
from overleap.kernels.torch.quant import dequantize, fp4_weight, fp8_weight, round_fp8
from tests.kernels.paged import SIZES


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def affinity(logit: float) -> float:
    """sqrt(softplus(logit)), without overflow."""
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("biased", [True, False])
def test_route(tokens: int, biased: bool, generator: torch.Generator) -> None:
    """Whole numbers, and two pairs of equal experts: products are exact, ties are certain."""
    width, count, k, scale = 5, 8, 3, 2.5
    x = torch.randint(-2, 3, (tokens, width), generator=generator).float()
    weight = torch.randint(-2, 3, (count, width), generator=generator).float()
    weight[5], weight[6] = weight[1], weight[1]
    bias = torch.tensor([0.0, 0.5, 0, -3, 0, 0.5, 0.5, 8]) if biased else None
    ids, shares = route(x, weight, bias, None, k, scale)
    assert (ids.dtype, shares.dtype) == (torch.int64, torch.float32)
    for t in range(tokens):
        plain = [affinity(v) for v in (x[t] @ weight.t()).tolist()]
        ranked = [a + (0 if bias is None else float(bias[e])) for e, a in enumerate(plain)]
        best = sorted(range(count), key=lambda e: (-ranked[e], e))[:k]
        assert ids[t].tolist() == best
        total = sum(plain[e] for e in best)
        expected = [plain[e] / total * scale for e in best]
        assert shares[t].tolist() == pytest.approx(expected, rel=1e-5)
        assert float(shares[t].sum()) == pytest.approx(scale, rel=1e-5)
        if biased:
            assert best[0] == 7, "a large bias selects"


def test_equal_experts_smaller_first() -> None:
    ids, shares = route(torch.ones(1, 3), torch.zeros(6, 3), None, None, 4, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert shares.tolist() == [[0.25] * 4]


def test_bias_selects_and_does_not_weigh(generator: torch.Generator) -> None:
    x, weight = torch.randn(63, 9, generator=generator), torch.randn(4, 9, generator=generator)
    bias = torch.tensor([0.0, 100.0, 0.0, 100.0])
    ids, shares = route(x, weight, bias, None, 2, 1.5)
    assert all(set(row) == {1, 3} for row in ids.tolist())
    chosen = torch.nn.functional.softplus((x @ weight.t()).double()).sqrt().gather(1, ids)
    assert (shares - chosen / chosen.sum(1, keepdim=True) * 1.5).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", SIZES)
def test_fixed_experts(tokens: int, generator: torch.Generator) -> None:
    x, weight = torch.randn(tokens, 9, generator=generator), torch.randn(6, 9, generator=generator)
    fixed = torch.rand(tokens, 6, generator=generator).argsort(1)[:, :2]
    ids, shares = route(x, weight, None, fixed, 2, 1.5)
    assert ids.equal(fixed)
    for t in range(tokens):
        pair = [affinity(float(x[t].double() @ weight[e].double())) for e in fixed[t].tolist()]
        expected = [a / sum(pair) * 1.5 for a in pair]
        assert shares[t].tolist() == pytest.approx(expected, rel=1e-4)


def test_gated_clamps() -> None:
    """The gate is cut above only, up on both sides."""
    gate = torch.tensor([-30.0, 3, 30])
    up = torch.tensor([-30.0, 30, 2])
    got = gated(gate, up, 10.0).tolist()

    def silu(v: float) -> float:
        return v / (1 + math.exp(-v))

    assert got == pytest.approx([silu(-30.0) * -10, silu(3.0) * 10, silu(10.0) * 2], rel=1e-6)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("form", ["plain", "fp8", "fp4"])
def test_experts(tokens: int, form: str, generator: torch.Generator) -> None:
    """Loop over tokens and their experts; the weight comes before the rounding of `down`."""
    width, inner, count, limit = 32, 64, 5, 0.7
    packed = form != "plain"
    pack = {"plain": Weight, "fp8": fp8_weight, "fp4": fp4_weight}[form]

    def some(rows: int, columns: int) -> tuple[Weight, ...]:
        return tuple(
            pack(torch.randn(rows, columns, generator=generator) * columns**-0.5)
            for _ in range(count)
        )

    w1, w2, w3 = some(inner, width), some(width, inner), some(inner, width)
    x = torch.randn(tokens, width, generator=generator)
    ids = torch.randint(0, count - 1, (tokens, 2), generator=generator)  # the last one is idle
    shares = torch.rand(tokens, 2, generator=generator)
    got = experts(x, ids, shares, Experts(w1, w2, w3), limit, packed)

    def linear(v: Tensor, weight: Weight) -> Tensor:
        v = round_fp8(v.float(), 128) if packed else v
        return dequantize(weight).double() @ v.double()

    largest = hidden = 0.0
    for t in range(tokens):
        total = torch.zeros(width, dtype=torch.float64)
        for expert, share in zip(ids[t].tolist(), shares[t].tolist(), strict=True):
            gate = linear(x[t], w1[expert]).clamp(max=limit)
            up = linear(x[t], w3[expert]).clamp(-limit, limit)
            inside = gate * torch.sigmoid(gate) * up * share
            hidden = max(hidden, float(inside.abs().max()))
            total += linear(inside, w2[expert])
        largest = max(largest, float((got[t] - total).abs().max()))
    # A float32 ulp before the rounding of `down` may move one of its inputs to the next code, which
    # is up to 1 / 8 of it away.
    flip = hidden / 8 * max(float(dequantize(w).abs().max()) for w in w2)
    assert largest <= 1e-5 + packed * flip


def test_experts_of_a_token_do_not_depend_on_the_others(generator: torch.Generator) -> None:
    width, inner, count = 8, 16, 6
    weights = Experts(
        *(
            tuple(Weight(torch.randn(a, b, generator=generator)) for _ in range(count))
            for a, b in ((inner, width), (width, inner), (inner, width))
        )
    )
    x = torch.randn(63, width, generator=generator)
    ids = torch.rand(63, count, generator=generator).argsort(1)[:, :3]
    shares = torch.rand(63, 3, generator=generator)
    together = experts(x, ids, shares, weights, 10.0, False)
    for t in range(63):
        alone = experts(x[t : t + 1], ids[t : t + 1], shares[t : t + 1], weights, 10.0, False)
        assert (together[t] - alone[0]).abs().max() <= 1e-4 * alone.abs().max()
