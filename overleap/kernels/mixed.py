"""Ops of a model whose routed experts stay on the host: a large model beside a small accelerator.

The accelerator computes the shared experts while the host's kernels compute the routed ones; a step
moves its tokens' vectors there and back, and no weight. Who stays: checkpoint/placing.py.
"""

import torch
from torch import Tensor

from overleap.kernels.composed import Assembled
from overleap.kernels.spec import Experts, Ops


def mixed(ops: Ops, host: Ops) -> Ops:
    """`ops` of a device, but routed experts that lie on the CPU are computed there, by `host`."""

    def mixture(
        x_TD: Tensor,
        ids_TX: Tensor,
        weight_TX: Tensor,
        routed: Experts,
        shared: Experts,
        limit: float,
    ) -> Tensor:
        ids = torch.arange(len(shared.w1), device=x_TD.device).expand(x_TD.shape[0], -1)
        whole = torch.ones(ids.shape, device=x_TD.device)
        # Asked for first: a device works on it while the host is busy.
        common = ops.experts(x_TD, ids, whole, shared, limit, shared.w1[0].packed)
        there = routed.w1[0].data.device
        x, ids, weight = (tensor.to(there) for tensor in (x_TD, ids_TX, weight_TX))
        chosen = host.experts(x, ids, weight, routed, limit, routed.w1[0].packed)
        return common + chosen.to(x_TD.device)

    return Assembled(vars(ops) | {"mixture": mixture})  # type: ignore[abstract]
