"""The head that ends the streams, and that a block's tensors meet the right sub-layer."""

import pytest
import torch
from torch import nn

from overleap.kernels import select
from overleap.model.hyper import collapse_head, connection, register_connection, register_head
from tests.checkpoints import tiny_config


def filled(seed: int, streams: int) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = tiny_config(seed, hc_mult=streams)
    block = nn.Module()
    register_connection(block, "attn", config)
    register_connection(block, "ffn", config)
    register_head(block, config)
    for name, p in list(block.named_parameters()):
        value = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
        setattr(block, name, nn.Parameter(value, requires_grad=False))
    return block, torch.randn(63, streams, config.hidden_size, generator=generator)


@pytest.mark.parametrize("streams", [2, 4])
def test_head(streams: int, seed: int) -> None:
    """sigmoid(norm(x) W scale + base) + eps, one weight a stream, summed."""
    config = tiny_config(seed, hc_mult=streams)
    block, x = filled(seed, streams)
    got = collapse_head(block, x, config, select())
    assert got.shape == (63, config.hidden_size)
    fn, base, scale = (
        block.get_parameter(f"hc_head_{p}").double() for p in ("fn", "base", "scale")
    )
    for t in range(63):
        flat = x[t].double().flatten()
        flat = flat / (flat.square().mean() + config.rms_norm_eps).sqrt()
        gate = torch.sigmoid(fn @ flat * scale + base) + config.hc_eps
        assert (got[t] - gate @ x[t].double()).abs().max() <= 1e-5


def test_collapse_takes_the_tensors_of_its_sub_layer(seed: int) -> None:
    config = tiny_config(seed, hc_mult=4)
    block, x = filled(seed, 4)
    ops = select()
    for name in ("attn", "ffn"):
        parts = (block.get_parameter(f"hc_{name}_{part}") for part in ("fn", "base", "scale"))
        norm = torch.randn(config.hidden_size)
        expected = ops.hc_pre_norm(
            x, *parts, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps, norm
        )
        found = ops.hc_pre_norm(x, *connection(block, name, config), norm)
        for got, wanted in zip(found, expected, strict=True):
            assert got.equal(wanted)
    attn, ffn = (ops.hc_pre(x, *connection(block, name, config))[0] for name in ("attn", "ffn"))
    assert not attn.equal(ffn)
