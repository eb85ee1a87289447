"""Linears, norms, rotation and the Hadamard transform, defined in plain torch.

Not here: attention.py, compress.py, moe.py, hyper.py. Packed weights are decoded by quant.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.kernels.spec import RowFormat, Weight
from overleap.kernels.torch import quant

ACTIVATION_GROUP = 128  # inputs of a packed linear share one scale per 128 values
CONVERTED_ROWS = 8192  # of a plain weight that is brought to the type of its input at once


def matmul(x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
    """See spec.Ops.matmul."""
    if round_input:
        x = quant.round_fp8(x, ACTIVATION_GROUP)
    if wide:
        x = x.float()
    if weight.packed or weight.data.dtype is x.dtype:
        return F.linear(x, _values(weight, x.dtype))
    # The head is the largest weight there is: in parts, it is never wholly there twice.
    parts = [F.linear(x, part.to(x.dtype)) for part in weight.data.split(CONVERTED_ROWS)]
    return torch.cat(parts, dim=-1)


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Tensor:
    """See spec.Ops.grouped_matmul."""
    groups = x_TGI.shape[1]
    w_GNI = _values(weight, x_TGI.dtype).unflatten(0, (groups, -1))
    return torch.bmm(x_TGI.transpose(0, 1), w_GNI.transpose(1, 2)).transpose(0, 1)


def _values(weight: Weight, dtype: torch.dtype) -> Tensor:
    return quant.dequantize(weight, dtype) if weight.packed else weight.data.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See spec.Ops.rms_norm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight.float()).to(x.dtype)


def rotate(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    """See spec.Ops.rotate."""
    angle = position.float()[:, None] * frequency
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    if inverse:
        sin = -sin
    width = 2 * frequency.numel()
    plain, rotary = x[..., :-width], x[..., -width:].float().unflatten(-1, (-1, 2))
    even, odd = rotary.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)


def norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Tensor:
    """See spec.Ops.norm_rope."""
    return rotate(rms_norm(x, weight, eps), position, frequency, inverse=False)


def hadamard(x: Tensor) -> Tensor:
    """See spec.Ops.hadamard."""
    width = x.shape[-1]
    scale: float = width**-0.5
    flat, half = x.float().reshape(-1, width), 1
    while half < width:
        pair = flat.view(-1, width // (2 * half), 2, half)
        low, high = pair.unbind(2)
        flat = torch.stack((low + high, low - high), dim=2).view(-1, width)
        half *= 2
    return (flat * scale).view(x.shape).to(x.dtype)


def quantize(x: Tensor, row: RowFormat) -> Tensor:
    """See spec.Ops.quantize."""
    if row.kind == "wide":
        return x.float()
    flat = x.flatten(0, -2)
    packed = quant.pack_kv(flat, row.rope) if row.kind == "kv" else quant.pack_key(flat)
    return packed.view(*x.shape[:-1], packed.shape[1])


def values_of(rows: Tensor, row: RowFormat) -> Tensor:
    """Cache rows [..., row] back to f32 values [..., width]."""
    if row.kind == "wide":
        return rows
    if row.kind == "kv":
        return quant.unpack_kv(rows, row.width, row.rope)
    return quant.unpack_key(rows, row.width)
