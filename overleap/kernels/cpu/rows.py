"""Native ops on single rows: norms, rotation, Hadamard, cache rows, the choice of experts.

Not here: the arithmetic (src/kernel_rows.cpp, kernel_quantize.cpp, kernel_pooling.cpp).
Read next: streams.py, sequences.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, entry_bytes, key_bytes
from overleap.kernels.cpu import _native
from overleap.kernels.cpu.linear import FLOAT, norm_weight, plain
from overleap.kernels.spec import RowFormat

MOST_ROTARY, MOST_HADAMARD = 512, 4096  # as in src/rows.h


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See spec.Ops.rms_norm."""
    x = plain(x)
    width, out = x.shape[-1], torch.empty_like(x)
    _native.rms_norm(
        x.data_ptr(),
        FLOAT[x.dtype],
        x.numel() // width,
        width,
        *norm_weight(weight, width),
        eps,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Tensor:
    """See spec.Ops.norm_rope."""
    x = plain(x)
    out, position = torch.empty_like(x), position.contiguous()
    _native.norm_rope(
        x.data_ptr(),
        FLOAT[x.dtype],
        *_heads(x, position),
        *norm_weight(weight, x.shape[-1]),
        eps,
        position.data_ptr(),
        *rotary(frequency, x.shape[-1]),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def rotate(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    """See spec.Ops.rotate."""
    x = plain(x)
    out, position = torch.empty_like(x), position.contiguous()
    _native.rotate(
        x.data_ptr(),
        FLOAT[x.dtype],
        *_heads(x, position),
        position.data_ptr(),
        *rotary(frequency, x.shape[-1]),
        inverse,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _heads(x: Tensor, position: Tensor) -> tuple[int, int, int]:
    """Rows, rows a token, width."""
    shape = x.shape
    assert position.dtype is torch.int64 and position.shape[0] == shape[0]
    heads = shape[1] if len(shape) == 3 else 1
    return shape[0] * heads, heads, shape[-1]


def rotary(frequency: Tensor, width: int) -> tuple[int, int]:
    """Address and rotary dims."""
    rotary = 2 * frequency.shape[0]
    assert frequency.dtype is torch.float32 and frequency.is_contiguous()
    assert rotary <= min(width, MOST_ROTARY), f"{rotary} rotary dims of {width}"
    return frequency.data_ptr(), rotary


def hadamard(x: Tensor) -> Tensor:
    """See spec.Ops.hadamard."""
    x = plain(x)
    width, out = x.shape[-1], torch.empty_like(x)
    assert width & (width - 1) == 0 and width <= MOST_HADAMARD
    _native.hadamard(
        x.data_ptr(),
        FLOAT[x.dtype],
        x.numel() // width,
        width,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def quantize(x: Tensor, row: RowFormat) -> Tensor:
    """See spec.Ops.quantize."""
    x = plain(x)
    if row.kind == "wide":
        return x.float()
    out = torch.empty(*x.shape[:-1], _size(x, row), dtype=torch.uint8)
    _native.quantize(
        x.data_ptr(),
        FLOAT[x.dtype],
        x.numel() // row.width,
        row.width,
        row.kind == "key",
        row.rope,
        out.shape[-1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _size(x: Tensor, row: RowFormat) -> int:
    """Bytes of a packed row."""
    width = row.width
    assert x.shape[-1] == width and (width % 2 == 0 or row.kind != "key")
    if row.kind == "key":
        return key_bytes(width, CacheFormat.RELEASE)
    return entry_bytes(width, row.rope, CacheFormat.RELEASE)


def norm_rope_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    position: Tensor,
    frequency: Tensor,
    mixed: bool,
    row: RowFormat,
) -> Tensor:
    """See spec.Ops.norm_rope_quantize."""
    x, position = plain(x), position.contiguous()
    width, packed = x.shape[-1], row.kind != "wide"
    assert not mixed or (width & (width - 1) == 0 and width <= MOST_HADAMARD)
    size = _size(x, row) if packed else width
    out = torch.empty(*x.shape[:-1], size, dtype=row.dtype)
    _native.norm_rope_quantize(
        x.data_ptr(),
        FLOAT[x.dtype],
        *_heads(x, position),
        eps is not None,
        *norm_weight(weight, width),
        eps or 0.0,
        position.data_ptr(),
        *rotary(frequency, width),
        mixed,
        packed,
        row.kind == "key",
        row.rope,
        size,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed_TX: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.route."""
    x = plain(x)
    tokens, width = x.shape
    experts = weight.shape[0]
    assert weight.shape[1] == width and weight.is_contiguous()
    if fixed_TX is None:
        ids = torch.empty(tokens, k, dtype=torch.int64)
    else:
        ids, k = fixed_TX.contiguous(), fixed_TX.shape[1]
    assert ids.dtype is torch.int64 and k <= experts
    assert bias is None or (bias.dtype is torch.float32 and bias.is_contiguous())
    share = torch.empty(tokens, k, dtype=torch.float32)
    _native.route(
        x.data_ptr(),
        FLOAT[x.dtype],
        tokens,
        width,
        weight.data_ptr(),
        FLOAT[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if fixed_TX is None else ids.data_ptr(),
        experts,
        k,
        scale,
        ids.data_ptr(),
        share.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, share


OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "norm_rope": norm_rope,
    "rotate": rotate,
    "hadamard": hadamard,
    "quantize": quantize,
    "norm_rope_quantize": norm_rope_quantize,
    "route": route,
}
