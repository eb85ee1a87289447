"""Rotary frequencies by layer kind, and linears that know when their input is rounded."""

import math
from itertools import pairwise

import pytest
import torch

from overleap.config import LayerKind, ModelConfig, Rope, Yarn
from overleap.kernels import select
from overleap.kernels.torch.quant import fp8_weight, round_fp8
from overleap.model.layers import Embedding, Linear, RMSNorm, rotary_frequencies


def test_frequencies_without_yarn() -> None:
    got = rotary_frequencies(Rope(10000.0, None), 64)
    assert got.tolist() == pytest.approx([10000.0 ** (-i / 32) for i in range(32)], rel=1e-6)


def test_frequencies_of_the_releases() -> None:
    """theta 160000, factor 16, 65536 tokens: fast pairs stay, slow pairs are 16 times slower."""
    config = ModelConfig.preset("v4-flash")
    plain = [160000.0 ** (-i / 32) for i in range(32)]
    got = rotary_frequencies(config.rope(LayerKind.CSA), 64).tolist()
    ratio = [g / p for g, p in zip(got, plain, strict=True)]
    turns = [65536 * p / (2 * math.pi) for p in plain]
    fast = sum(t > 32 for t in turns)
    assert ratio[: fast - 1] == pytest.approx([1.0] * (fast - 1), rel=1e-6)
    slow = next(i for i, t in enumerate(turns) if t < 1)
    assert ratio[slow:] == pytest.approx([1 / 16] * (32 - slow), rel=1e-6)
    assert all(a > b - 1e-6 for a, b in pairwise(ratio)), "falls between"
    assert 0 < fast < slow < 32
    # Rounded outwards: the linear part starts at a whole pair below and ends at one above.
    low, high = (math.floor(_pair(32)), math.ceil(_pair(1)))
    middle = [1 - (i - low) / (high - low) * 15 / 16 for i in range(low, high + 1)]
    assert ratio[low : high + 1] == pytest.approx(middle, rel=1e-5)


def _pair(turns: float) -> float:
    """The (fractional) pair that turns so often within 65536 tokens."""
    return 32 * math.log(65536 / (2 * math.pi * turns)) / math.log(160000)


def test_sliding_layers_have_their_own_base_and_no_yarn() -> None:
    config = ModelConfig.preset("v4-pro")
    assert config.rope(LayerKind.SLIDING) == Rope(10000.0, None)
    assert config.rope(LayerKind.HCA) == config.rope(LayerKind.CSA)
    assert config.rope(LayerKind.HCA).theta == 160000.0
    assert config.rope(LayerKind.HCA).yarn == Yarn(16.0, 65536, 32.0, 1.0)


def test_yarn_that_slows_everything_or_nothing() -> None:
    """Bounds outside the pairs are cut to them."""
    exponents = [100.0 ** (-i / 4) for i in range(4)]
    short = rotary_frequencies(Rope(100.0, Yarn(4.0, 2)), 8).tolist()
    assert short[1:] == pytest.approx([e / 4 for e in exponents[1:]], rel=1e-6)
    long = rotary_frequencies(Rope(100.0, Yarn(4.0, 10**9)), 8).tolist()
    assert long == pytest.approx(exponents, rel=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_linear_rounds_its_input_where_packed(exact: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(9, 130, generator=generator), torch.randn(5, 130, generator=generator)
    linear = Linear(130, 9, select(), exact=exact)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    assert not linear.rounds_input
    assert (linear(x) - x @ w.t()).abs().max() <= 1e-4

    packed = fp8_weight(w)
    assert packed.scale is not None
    linear.weight = torch.nn.Parameter(packed.data, requires_grad=False)
    linear.scale = torch.nn.Parameter(packed.scale, requires_grad=False)
    values = (
        packed.data.float()
        * torch.exp2(packed.scale.view(torch.uint8).float() - 127).repeat_interleave(128, 1)[
            :, :130
        ]
    )
    assert linear.rounds_input == (not exact)
    given = x if exact else round_fp8(x, 128)
    assert (linear(x) - given @ values.t()).abs().max() <= 1e-3
    assert (given.equal(x)) == exact


def test_norm_and_embedding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm, embed = RMSNorm(7, 1e-6, select()), Embedding(11, 7)
    assert norm.weight.is_meta and embed.weight.is_meta
    norm.weight = torch.nn.Parameter(torch.randn(7, generator=generator), requires_grad=False)
    embed.weight = torch.nn.Parameter(torch.randn(11, 7, generator=generator), requires_grad=False)
    ids = torch.tensor([0, 10, 10, 3])
    x = embed(ids)
    assert x.equal(embed.weight[ids])
    expected = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert (norm(x) - expected).abs().max() <= 1e-6 * expected.abs().max()
