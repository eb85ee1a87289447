"""The V3.2 baseline: its bytes, its arithmetic against plain floats; both generations measured."""

import pytest
import torch

from overleap.config import ModelConfig
from overleap.errors import CapacityError
from overleap.eval.generations import generations
from overleap.eval.previous import Layer, Shape, pack, unpack
from overleap.kernels import select
from overleap.plan.compare import Assumptions, cache_bytes
from overleap.plan.flops import Previous

FLASH, PRO = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")
SMALL = Shape(heads=3, latent=160, rope=16, index_heads=5, index_dim=64, topk=37)


def layer(rows: int, seed: int, shape: Shape = SMALL) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.latent, shape.rope, shape.index_dim)
    return Layer.of(shape, *(torch.randn(rows, size, generator=generator) for size in sizes))


def test_a_row_takes_what_the_release_takes() -> None:
    found = layer(3, 0, Shape.like(PRO))
    assert (found.rows.shape[1], found.keys.shape[1]) == (656, 132)
    assert found.nbytes == 3 * Previous().bytes_per_layer()


@pytest.mark.parametrize("width", [1, 127, 128, 129, 512])
def test_packing_is_e4m3_with_a_scale_for_128(width: int, seed: int) -> None:
    values = torch.randn(63, width, generator=torch.Generator().manual_seed(seed)) * 30
    values[5] = 0
    got = unpack(pack(values), width)
    groups = torch.split(torch.arange(width), 128)
    for group in groups:
        top = values[:, group].abs().amax(1, keepdim=True)
        # Half a step of three mantissa bits, or of the smallest subnormal of the group.
        allowed = values[:, group].abs() / 16 + top.clamp(min=1e-4) / 448 * 2**-10
        assert ((got[:, group] - values[:, group]).abs() <= 1.001 * allowed).all()


@pytest.mark.parametrize("rows", [1, 36, 37, 1000, 20000])
def test_the_chosen_are_the_best(rows: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overleap.eval.previous.TILE_VALUES", 5 * 700)  # several tiles
    found, generator = layer(rows, seed), torch.Generator().manual_seed(seed + 1)
    q, weight = torch.randn(5, 64, generator=generator), torch.randn(5, generator=generator)
    chosen = found.choose(q, weight)
    assert len(set(chosen.tolist())) == len(chosen) == min(37, rows)
    score = (unpack(found.keys, 64).double() @ q.double().t()).relu() @ weight.double()
    best = score.sort(descending=True).values[: len(chosen)]
    assert torch.allclose(score[chosen].sort(descending=True).values, best, atol=1e-4)


def test_attention_is_that_of_keys_and_values_written_out(seed: int) -> None:
    """Not absorbed: a key is W_k of the latent beside the rotary dims, a value W_v of it."""
    found, generator = layer(50, seed), torch.Generator().manual_seed(seed + 1)
    nope, heads = 24, SMALL.heads
    w_k, w_v = (torch.randn(heads, nope, SMALL.latent, generator=generator).double() for _ in "kv")
    q = torch.randn(heads, nope + SMALL.rope, generator=generator).double()
    latent = unpack(found.rows, SMALL.latent).double()
    rotary = found.rows[:, -2 * SMALL.rope :].clone().view(torch.bfloat16).double()
    chosen = torch.randperm(50, generator=generator)[:37]
    key = torch.einsum("hnc,tc->htn", w_k, latent[chosen])
    score = torch.einsum("hn,htn->ht", q[:, :nope], key) + q[:, nope:] @ rotary[chosen].t()
    value = torch.einsum("hnc,tc->htn", w_v, latent[chosen])
    expected = torch.einsum("ht,htn->hn", (score * 0.1).softmax(-1), value)

    absorbed = torch.cat((torch.einsum("hn,hnc->hc", q[:, :nope], w_k), q[:, nope:]), dim=1)
    mixed = found.attend(absorbed.float(), chosen, 0.1).double()
    got = torch.einsum("hnc,hc->hn", w_v, mixed)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "config"), [("v4-flash", FLASH), ("v4-pro", PRO)])
def test_measured_bytes_are_the_computed_ones(name: str, config: ModelConfig) -> None:
    (both,) = generations(config, select("cpu"), [4096], repeats=1)
    assert both.own_bytes == both.own_formula_bytes
    assert both.own_bytes == cache_bytes(config, 4096, Assumptions())
    assert both.previous_bytes == both.previous_formula_bytes
    assert both.previous_bytes == config.num_hidden_layers * 788 * 4096
    if name == "v4-pro":  # as deep and wide as V3.2
        assert both.previous_bytes == Previous().cache_bytes(4096)
        flops = Previous().token_flops(4096)
        assert both.previous_flops.core == flops.core
        assert both.previous_flops.index == flops.index
    row = both.row()
    assert row["cache_ratio"] == row["cache_ratio_computed"]
    assert both.own_s > both.own_scan_s > 0 and both.previous_s > both.previous_scan_s > 0


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overleap.eval.generations.free_bytes", lambda: 10**8)
    with pytest.raises(CapacityError, match=r"a layer of 1048576 tokens takes 1\.5 GiB"):
        generations(PRO, select("torch"), [1048576])
