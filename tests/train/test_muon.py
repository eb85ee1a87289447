"""Muon: updates as the report writes them, of the stated size; the rest is AdamW."""

import math

import pytest
import torch

from overleap.kernels import select
from overleap.kernels.torch.orthogonalise import STEPS, orthogonalise
from overleap.train.muon import UPDATE_RMS, Optimizer, is_matrix, logical_rows
from tests.train.small import lively_weights, pass_of, small_config

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


@pytest.mark.parametrize("shape", [(24, 128), (128, 128), (256, 640), (640, 128)])
def test_ten_steps_leave_less_than_a_hundredth(seed: int, shape: tuple[int, int]) -> None:
    """Of singular values down to 0.0001 of the Frobenius norm: as far as bf16 sees. The steps alone
    come ten times as near; a hundredth of that size does not get there in ten steps."""
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    given = torch.logspace(-3, 0, min(shape)).double()
    given = given / given.norm()
    assert given.min() > 1.2e-4
    found = (torch.linalg.svdvals(orthogonalise((u * given.float()) @ v)) - 1).abs().max()
    exact, tiny = given, torch.tensor(1e-6).double()
    for a, b, c in STEPS:
        exact, tiny = (a * s + b * s**3 + c * s**5 for s in (exact, tiny))
    print(f"{shape}: {found:.4f} in bf16, {(exact - 1).abs().max():.5f} by the steps alone")
    assert found < 0.01 and (exact - 1).abs().max() < 0.001 and tiny < 0.1


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
    optimizer = Optimizer([("layers.0.attn.wkv.weight", weight)], OPS, weight_decay=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step(0.5, 0.0)
    moved = (weight.detach() - before).square().mean().sqrt()
    assert moved == pytest.approx(0.5 * UPDATE_RMS, rel=0.05)


def test_updates_equal_an_independent_formulation(seed: int) -> None:
    """Algorithm 1 in float64 with loops, over several steps; bf16 products keep two digits."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(24, 40))
    optimizer = Optimizer([("layers.0.attn.wkv.weight", weight)], OPS)
    w, m = weight.detach().double().clone(), torch.zeros(24, 40, dtype=torch.float64)
    for _ in range(4):
        grad = torch.randn(24, 40)
        weight.grad = grad.clone()
        optimizer.step(0.05, 0.0)
        m = 0.95 * m + grad.double()
        x = 0.95 * m + grad.double()
        x = x / (x * x).sum().sqrt()
        for step in range(10):
            a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
            x = a * x + b * (x @ x.t() @ x) + c * (x @ x.t() @ x @ x.t() @ x)
        change = x * math.sqrt(40) * 0.18
        w = w * (1 - 0.05 * 0.1) - 0.05 * change
        total = (weight.detach() - w).norm() / (0.05 * change).norm()
        assert total < 0.1, "the sum of all rounding so far, as a share of one update"


def test_stored_matrices_are_updated_part_by_part(seed: int) -> None:
    """Groups of the output projection, series of a compressor, maps of a connection, experts."""
    torch.manual_seed(seed)
    config = small_config()
    assert logical_rows("layers.1.attn.wo_a.weight", config) == (16, 16)
    assert logical_rows("layers.1.attn.compressor.wkv.weight", config) == (80, 80)
    assert logical_rows("layers.2.attn.compressor.wkv.weight", config) is None
    assert logical_rows("layers.1.attn.indexer.compressor.wgate.weight", config) == (32, 32)
    assert logical_rows("layers.0.hc_ffn_fn", config) == (4, 4, 16)
    assert logical_rows("layers.0.attn.wkv.weight", config) is None
    assert logical_rows("layers.0.ffn.experts.1.w1.weight", config) is None
    name, shape = "layers.0.hc_attn_fn", (24, 128)
    whole = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Optimizer([(name, whole)], OPS, config)
    whole.grad = torch.randn(shape)
    optimizer.step(1.0, 0.0)
    parts, grads = (t.split([4, 4, 16]) for t in (whole.detach(), whole.grad))
    for part, grad in zip(parts, grads, strict=True):
        alone = torch.nn.Parameter(torch.zeros_like(part))
        other = Optimizer([("layers.0.w", alone)], OPS)
        alone.grad = grad.clone()
        other.step(1.0, 0.0)
        torch.testing.assert_close(part, alone.detach(), atol=2e-2, rtol=2e-2)
        assert torch.linalg.svdvals(part / (0.18 * math.sqrt(128))).min() > 0.9


def test_who_is_a_matrix(seed: int) -> None:
    model = pass_of(small_config(), lively_weights(small_config(), seed), torch.float32).model
    others = {n for n, p in model.named_parameters() if p.requires_grad and not is_matrix(n, p)}
    kinds = {".".join(n.split(".")[-2:]) if "norm" not in n else "norm" for n in others}
    kinds = {k.split(".")[-1] if k.split(".")[0].isdigit() else k for k in kinds}
    assert kinds == {
        "embed.weight", "head.weight", "norm", "attn.attn_sink", "compressor.ape", "hc_attn_base",
        "hc_attn_scale", "hc_ffn_base", "hc_ffn_scale", "hc_head_base", "hc_head_scale",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "muon"), [("embed.weight", True), ("layers.0.w", False)])
def test_adamw_takes_what_muon_does_not(name: str, muon: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ours = torch.nn.Parameter(torch.randn(40, 8))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = Optimizer([(name, ours)], OPS, muon=muon)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
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
