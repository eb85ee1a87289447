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
from overleap.kernels.spec import Experts, Joint, Weight

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
    out = torch.empty(x.shape[0], outputs, dtype=torch.float32 if wide else x.dtype)
    _product(x, weight, 1, outputs, inputs, round_input, out)
    return out


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Tensor:
    """See spec.Ops.grouped_matmul."""
    tokens, groups, inputs = x_TGI.shape
    outputs = weight.data.shape[0]
    out = torch.empty(tokens, groups, outputs // groups, dtype=x_TGI.dtype)
    _product(x_TGI, weight, groups, outputs, inputs, False, out)
    return out


def _product(
    x: Tensor, weight: Weight, groups: int, outputs: int, inputs: int, rounds: bool, out: Tensor
) -> None:
    x, data, scale = plain(x), weight.data, weight.scale
    assert weight.lies_as_said() and weight.inputs == inputs, (data.shape, inputs)
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


def project(
    x: Tensor, parts: tuple[Joint, ...], norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, ...]:
    """See spec.Ops.project."""
    x = plain(x)
    tokens, columns = x.shape
    out = made(x, parts)
    assert all(part.inputs == columns for part in parts)
    _native.project(
        x.data_ptr(),
        FLOAT[x.dtype],
        tokens,
        columns,
        *norm_weight(norm, columns),
        eps,
        *tables(parts),
        [result.data_ptr() for result in out],
        [FLOAT[result.dtype] for result in out],
        torch.get_num_threads(),
    )
    return tuple(out)


def made(x: Tensor, parts: tuple[Joint, ...]) -> list[Tensor]:
    """Room for the result of every part."""
    return [
        torch.empty(x.shape[0], part.outputs, dtype=torch.float32 if part.wide else x.dtype)
        for part in parts
    ]


def tables(parts: tuple[Joint, ...]) -> tuple[list[int], list[int]]:
    """Addresses of the parts' tables, and how many weights each has."""
    return [part.table.data_ptr() for part in parts], [len(part.weights) for part in parts]


def norm_weight(weight: Tensor | None, width: int) -> tuple[int, int]:
    """Address and type of an rms_norm's weight."""
    if weight is None:
        return 0, 0
    assert weight.is_contiguous() and weight.shape[0] == width
    return weight.data_ptr(), FLOAT[weight.dtype]


def project_back(o_TGI: Tensor, inner: Weight, outer: Joint) -> Tensor:
    """See spec.Ops.project_back."""
    o = plain(o_TGI)
    tokens, groups, inputs = o.shape
    data, scale = inner.data, inner.scale
    assert inner.lies_as_said() and inner.inputs == inputs and outer.inputs == data.shape[0]
    out = torch.empty(tokens, outer.outputs, dtype=torch.float32 if outer.wide else o.dtype)
    _native.project_back(
        o.data_ptr(),
        FLOAT[o.dtype],
        tokens,
        groups,
        data.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        _FORM[data.dtype],
        data.shape[0],
        inputs,
        outer.table.data_ptr(),
        out.data_ptr(),
        FLOAT[out.dtype],
        torch.get_num_threads(),
    )
    return out


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
) -> Tensor:
    """See spec.Ops.experts."""
    return _mixture(x_TD, ids_TX, weight_TX, (experts, round_input), None, limit)


def mixture(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    routed: Experts,
    shared: Experts,
    limit: float,
) -> Tensor:
    """See spec.Ops.mixture."""
    many, every = ((part, part.w1[0].packed) for part in (routed, shared))
    return _mixture(x_TD, ids_TX, weight_TX, many, every, limit)


def _mixture(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    routed: tuple[Experts, bool],
    shared: tuple[Experts, bool] | None,
    limit: float,
) -> Tensor:
    x, ids, weight = plain(x_TD), ids_TX.contiguous(), weight_TX.contiguous()
    assert ids.dtype is torch.int64 and weight.dtype is torch.float32
    assert routed[0].w1[0].inputs == x.shape[1] and ids.shape == weight.shape
    out = torch.empty_like(x)
    _native.mixture(
        x.data_ptr(),
        FLOAT[x.dtype],
        *x.shape,
        ids.shape[1],
        ids.data_ptr(),
        weight.data_ptr(),
        *_expertise(*routed),
        *((0, 0, 0, 0, False) if shared is None else _expertise(*shared)),
        limit,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _expertise(experts: Experts, round_input: bool) -> tuple[int, int, int, int, bool]:
    """Address of the table, experts, inner width, form, whether inputs are rounded."""
    first = experts.w1[0].data
    address = experts.addresses.data_ptr()
    return address, len(experts.w1), first.shape[0], _FORM[first.dtype], round_input


OPS: dict[str, Callable[..., Any]] = {
    "matmul": matmul,
    "grouped_matmul": grouped_matmul,
    "experts": experts,
    "project": project,
    "project_back": project_back,
    "mixture": mixture,
}
