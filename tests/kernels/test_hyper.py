"""Hyper-connections against the equations, one token at a time in float64.

The head that collapses the streams at the end is in ../model/test_hyper.py.
"""

import pytest
import torch
from torch import Tensor

from overleap.kernels.torch.hyper import hc_post, hc_pre
from tests.kernels.paged import SIZES

EPS = 1e-6


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixing(streams: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    rows = (2 + streams) * streams
    fn = torch.randn(rows, streams * width, generator=generator) * (streams * width) ** -0.5
    return fn, torch.randn(rows, generator=generator), torch.tensor([0.7, 1.3, 1.9])


def naive_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs 3-8 for one token [M, D], with loops for Sinkhorn's normalisations."""
    m = x.shape[0]
    flat = x.double().flatten()
    mix = (fn.double() @ flat) / (flat.square().mean() + EPS).sqrt()
    pre = torch.sigmoid(mix[:m] * scale[0] + base[:m]) + EPS
    post = 2 * torch.sigmoid(mix[m : 2 * m] * scale[1] + base[m : 2 * m])
    logits = (mix[2 * m :] * scale[2] + base[2 * m :]).view(m, m)
    comb = torch.stack([row.softmax(0) + EPS for row in logits])
    for step in range(2 * iterations - 1):
        axis = 0 if step % 2 == 0 else 1  # columns first: the softmax was over rows
        for i in range(m):
            line = comb[:, i] if axis == 0 else comb[i]
            line /= line.sum() + EPS
    return pre @ x.double(), post, comb


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("streams", [2, 4, 5])
def test_hc_pre(tokens: int, streams: int, generator: torch.Generator) -> None:
    width = 7
    x = torch.randn(tokens, streams, width, generator=generator)
    fn, base, scale = mixing(streams, width, generator)
    y, post, comb = hc_pre(x, fn, base, scale, 20, EPS, EPS)
    assert (y.shape, post.shape) == ((tokens, width), (tokens, streams))
    assert comb.shape == (tokens, streams, streams)
    for t in range(0, tokens, 1 if tokens < 200 else 9):
        expected = naive_pre(x[t], fn, base, scale, 20)
        for got, wanted in zip((y[t], post[t], comb[t]), expected, strict=True):
            assert (got - wanted).abs().max() <= 1e-5


def test_comb_is_doubly_stochastic(generator: torch.Generator) -> None:
    x = torch.randn(1000, 4, 9, generator=generator)
    fn, base, scale = mixing(4, 9, generator)
    # Of even logits: rows are reached by iterating, and of very uneven ones not in 20 rounds.
    _, _, comb = hc_pre(x, fn, base.clamp(-1, 1), scale / 8, 20, EPS, EPS)
    assert (comb > 0).all()
    assert (comb.sum(1) - 1).abs().max() <= 1e-5, "columns: normalised last"
    assert (comb.sum(2) - 1).abs().max() <= 1e-3
    # Products of such matrices stay so, and none makes a vector longer: eq. 1 is safe to stack.
    assert torch.linalg.matrix_norm(comb.double(), 2).max() <= 1 + 1e-3


def test_direction_of_the_normalisation(generator: torch.Generator) -> None:
    """After one iteration columns sum to 1 and rows do not: the order matters."""
    x = torch.randn(63, 4, 9, generator=generator)
    _, _, comb = hc_pre(x, *mixing(4, 9, generator), 1, EPS, EPS)
    assert (comb.sum(1) - 1).abs().max() <= 1e-3  # a small column divides by itself + epsilon
    assert (comb.sum(2) - 1).abs().max() > 1e-2


def test_extreme_mixing_stays_finite(generator: torch.Generator) -> None:
    x = torch.randn(63, 4, 9, generator=generator) * 1e4
    fn, base, scale = mixing(4, 9, generator)
    for part in hc_pre(x, fn, base, scale * 1e3, 20, EPS, EPS):
        assert part.isfinite().all()
    y, _, _ = hc_pre(torch.zeros(1, 4, 9), fn, base, scale, 20, EPS, EPS)
    assert y.equal(torch.zeros(1, 9))


@pytest.mark.parametrize("tokens", SIZES)
def test_hc_post(tokens: int, generator: torch.Generator) -> None:
    """Stream k gets column k of comb: sum over j of comb[j, k] x[j]."""
    streams, width = 4, 5
    y = torch.randn(tokens, width, generator=generator)
    x = torch.randn(tokens, streams, width, generator=generator)
    post = torch.randn(tokens, streams, generator=generator)
    comb = torch.rand(tokens, streams, streams, generator=generator)
    got = hc_post(y, x, post, comb)
    for k in range(streams):
        expected = post[:, k, None].double() * y.double()
        for j in range(streams):
            expected = expected + comb[:, j, k, None].double() * x[:, j].double()
        assert (got[:, k] - expected).abs().max() <= 1e-5
