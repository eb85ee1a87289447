"""Muon: updates are orthogonal, of the stated size, and a run resumes where it stopped."""

import pytest
import torch

from overleap.kernels import select
from overleap.kernels.torch.orthogonalise import orthogonalise
from overleap.train.muon import UPDATE_RMS, Optimizer, is_matrix

OPS = select("torch")


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (24, 128), (3, 40, 64)])
def test_singular_values_become_one(seed: int, shape: tuple[int, ...]) -> None:
    """Of matrices whose least singular value is a fiftieth of the largest, or more."""
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    given = 0.02 + 0.98 * torch.rand(*shape[:-2], 1, min(shape[-2:]))
    result = orthogonalise((u * given) @ v)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.95 and values.max() < 1.05
    assert torch.nn.functional.cosine_similarity((u @ v).flatten(), result.flatten(), dim=0) > 0.99


def test_zero_stays_zero_and_scale_does_not_matter(seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(32, 48)
    assert orthogonalise(torch.zeros(4, 8)).eq(0).all()
    torch.testing.assert_close(
        orthogonalise(matrix), orthogonalise(matrix * 1024), atol=2e-2, rtol=0
    )


def test_an_update_has_the_stated_size(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(48, 96))
    before = weight.detach().clone()
    optimizer = Optimizer([("layers.0.attn.wkv.weight", weight)], OPS)
    weight.grad = torch.randn_like(weight)
    optimizer.step(0.5, 0.0)
    moved = (weight.detach() - before).square().mean().sqrt()
    assert moved == pytest.approx(0.5 * UPDATE_RMS, rel=0.05)


def test_adam_takes_what_is_not_a_matrix(seed: int) -> None:
    torch.manual_seed(seed)
    ours = torch.nn.Parameter(torch.randn(40, 8))
    theirs = torch.nn.Parameter(ours.detach().clone())
    assert not is_matrix("embed.weight", ours) and is_matrix("layers.0.attn.wkv.weight", ours)
    optimizer = Optimizer([("embed.weight", ours)], OPS)
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-12)
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        optimizer.step(0.0, 0.01)
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_a_resumed_optimizer_goes_on_as_if_never_stopped(seed: int) -> None:
    torch.manual_seed(seed)
    named = [("layers.0.w", torch.nn.Parameter(torch.randn(8, 8)))]
    named.append(("norm.weight", torch.nn.Parameter(torch.randn(8))))
    optimizer = Optimizer(named, OPS)
    for step in range(3):
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step(0.1, 0.1)
        if step == 1:
            kept = {name: t.clone() for name, t in optimizer.state().items()}
            copies = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
    other = Optimizer(copies, OPS)
    other.load(kept)
    for (_, p), (_, copy) in zip(named, copies, strict=True):
        copy.grad = p.grad
    other.step(0.1, 0.1)
    for (_, p), (_, copy) in zip(named, copies, strict=True):
        assert torch.equal(p, copy)
