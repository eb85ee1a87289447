"""Native products with stored weights: matmul, grouped_matmul, experts.

Not here: arithmetic (src/kernel_linear.cpp, src/kernel_experts.cpp). Packed weights are read where
they lie, in the memory map of their file if that is where they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.errors import BackendError
from overleap.kernels.cpu import _native
from overleap.kernels.spec import Experts, Weight

FLOAT = {torch.float32: 0, torch.bfloat16: 1}
_FORM = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}


def plain(x: Tensor) -> Tensor:
    """x without gaps. BackendError where a gradient would be lost."""
    if x.requires_grad:
        raise BackendError(
            "the native kernels carry no gradients", 'train with select("torch") or TrainingOps'
        )
    return x.contiguous()


def matmul(x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
    """See spec.Ops.matmul."""
    data = weight.data
    outputs, inputs = data.shape[0], x.shape[-1]
    out = torch.empty((x.shape[0], outputs), dtype=torch.float32 if wide else x.dtype)
    _product(x, weight, 1, outputs, inputs, round_input, out)
    return out


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Tensor:
    """See spec.Ops.grouped_matmul."""
    tokens, groups, inputs = x_TGI.shape
    outputs = weight.data.shape[0]
    out = torch.empty((tokens, groups, outputs // groups), dtype=x_TGI.dtype)
    _product(x_TGI, weight, groups, outputs, inputs, False, out)
    return out


def _product(
    x: Tensor, weight: Weight, groups: int, outputs: int, inputs: int, rounds: bool, out: Tensor
) -> None:
    x, data, scale = plain(x), weight.data, weight.scale
    assert data.is_contiguous() and (scale is None or scale.is_contiguous())
    _native.product(
        x.data_ptr(),
        FLOAT[x.dtype],
        x.shape[0],
        groups,
        data.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        _FORM[data.dtype],
        outputs,
        inputs,
        rounds,
        out.data_ptr(),
        FLOAT[out.dtype],
        torch.get_num_threads(),
    )


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
) -> Tensor:
    """See spec.Ops.experts."""
    x, ids, weight = plain(x_TD), ids_TX.contiguous(), weight_TX.contiguous()
    first = experts.w1[0].data
    assert ids.dtype is torch.int64 and weight.dtype is torch.float32
    out = torch.empty_like(x)
    _native.mixture(
        x.data_ptr(),
        FLOAT[x.dtype],
        *x.shape,
        ids.shape[1],
        ids.data_ptr(),
        weight.data_ptr(),
        experts.addresses.data_ptr(),
        len(experts.w1),
        first.shape[0],
        _FORM[first.dtype],
        round_input,
        0, 0, 0, 0, False,
        limit,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


OPS: dict[str, Callable[..., Any]] = {
    "matmul": matmul,
    "grouped_matmul": grouped_matmul,
    "experts": experts,
}
