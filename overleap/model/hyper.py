"""Hyper-connections: residual streams around a sub-layer, and the head that ends them.

Report section 2.2. The official tensors lie flat on their block (hc_attn_fn, ...), so these are
functions over a block's parameters, not a module of their own.
"""

from torch import Tensor, nn

from overleap.config import ModelConfig
from overleap.kernels.spec import Ops
from overleap.model.layers import parameter


def register_connection(block: nn.Module, name: str, config: ModelConfig) -> None:
    """hc_<name>_fn [(2 + M) M, M D], hc_<name>_base [(2 + M) M], hc_<name>_scale [3]; f32."""
    streams = config.hc_mult
    rows = (2 + streams) * streams
    block.register_parameter(f"hc_{name}_fn", parameter(rows, streams * config.hidden_size))
    block.register_parameter(f"hc_{name}_base", parameter(rows))
    block.register_parameter(f"hc_{name}_scale", parameter(3))


def register_head(block: nn.Module, config: ModelConfig) -> None:
    """hc_head_fn f32 [M, M D], hc_head_base f32 [M], hc_head_scale f32 [1]."""
    streams = config.hc_mult
    block.register_parameter("hc_head_fn", parameter(streams, streams * config.hidden_size))
    block.register_parameter("hc_head_base", parameter(streams))
    block.register_parameter("hc_head_scale", parameter(1))


# fn, base, scale; Sinkhorn iterations, eps, eps of the norm: arguments of ops.hc_pre behind x.
Connection = tuple[Tensor, Tensor, Tensor, int, float, float]


def connection(block: nn.Module, name: str, config: ModelConfig) -> Connection:
    """How the streams become the input of sub-layer `name`; the weights must be in place."""
    fn, base, scale = (getattr(block, f"hc_{name}_{part}") for part in _PARTS)
    return fn, base, scale, config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps


def collapse_head(block: nn.Module, x_TMD: Tensor, config: ModelConfig, ops: Ops) -> Tensor:
    """The last collapse before the final norm: gated sum of the streams -> [T, D]."""
    fn, base, scale = (getattr(block, f"hc_head_{part}") for part in _PARTS)
    return ops.hc_head(x_TMD, fn, base, scale, config.hc_eps, config.rms_norm_eps)


_PARTS = ("fn", "base", "scale")
