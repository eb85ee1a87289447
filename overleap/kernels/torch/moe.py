"""Routing and experts, defined in plain torch.

Not here: the shared expert and the hash table lookup (model/moe.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.kernels.spec import Experts
from overleap.kernels.torch.linear import matmul


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed_TX: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.route."""
    affinity = F.softplus(F.linear(x.float(), weight.float()).float()).sqrt()
    if fixed_TX is None:
        ranked = affinity if bias is None else affinity + bias
        order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
        ids = order[:, :k]
    else:
        ids = fixed_TX
    chosen = affinity.gather(1, ids)
    return ids, chosen / chosen.sum(-1, keepdim=True) * scale


def gated(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """SwiGLU with the released clamp, f32: silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
) -> Tensor:
    """See spec.Ops.experts."""
    flat = ids_TX.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=len(experts.w1)).tolist()
    token = order // ids_TX.shape[1]
    share = weight_TX.flatten()[order]
    result = torch.zeros_like(x_TD, dtype=torch.float32)
    end = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        here = slice(end, end + count)
        end += count
        x = x_TD[token[here]]
        gate = matmul(x, experts.w1[expert], round_input)
        up = matmul(x, experts.w3[expert], round_input)
        hidden = (gated(gate, up, limit) * share[here, None]).to(x_TD.dtype)
        down = matmul(hidden, experts.w2[expert], round_input)
        result = result.index_add(0, token[here], down.float())
    return result.to(x_TD.dtype)
