"""Manifold-constrained hyper-connections: streams in, streams out, defined in plain torch.

Report section 2.2; epsilons and the direction of the mix follow the released code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hc_pre(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec.Ops.hc_pre."""
    streams = x_TMD.shape[1]
    # Tokens innermost: 4 x 4 matrices a token are slow to reduce, 16 rows of tokens are not.
    mix = stream_projection(x_TMD, fn, norm_eps).t().contiguous()
    sizes = [streams, streams, streams * streams]
    pre, post, comb = mix.split(sizes)
    base_pre, base_post, base_comb = base[:, None].split(sizes)
    pre = torch.sigmoid(pre * scale[0] + base_pre) + eps
    post = 2 * torch.sigmoid(post * scale[1] + base_post)
    comb = (comb * scale[2] + base_comb).unflatten(0, (streams, streams)).softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    y = (pre.t()[:, None] @ x_TMD.float()).squeeze(1)
    return y.to(x_TMD.dtype), post.t(), comb.permute(2, 0, 1)


def stream_projection(x_TMD: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """RMSNorm of the flattened streams without weight, then fn; the factor after the product."""
    flat = x_TMD.flatten(1).float()
    square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square()
    factor = torch.rsqrt(square / flat.shape[1] + norm_eps)
    return F.linear(flat, fn).float() * factor


def hc_head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """See spec.Ops.hc_head."""
    gate = torch.sigmoid(stream_projection(x_TMD, fn, norm_eps) * scale + base)
    return ((gate + eps)[:, None] @ x_TMD.float()).squeeze(1).to(x_TMD.dtype)


def hc_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """See spec.Ops.hc_post."""
    mix = torch.cat((post_TM[..., None], comb_TMM.transpose(1, 2)), dim=2)
    rows = torch.cat((y_TD.float()[:, None], x_TMD.float()), dim=1)
    return (mix @ rows).to(x_TMD.dtype)
