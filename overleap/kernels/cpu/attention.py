"""The choice of entries and attention over them, in native code: index_topk, attend.

Not here: the arithmetic (src/kernel_index.cpp, src/kernel_attention.cpp), writing rows (rows.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, entry_bytes
from overleap.kernels.cpu import _native
from overleap.kernels.cpu.linear import FLOAT, made, norm_weight, plain, tables
from overleap.kernels.cpu.rows import rotary
from overleap.kernels.cpu.tape import sequences
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Joint, Pool, RowFormat

_KIND = {"kv": 0, "key": 1, "wide": 2}


def attention_inputs(
    x_TD: Tensor,
    of_input: tuple[Joint, ...],
    of_latent: tuple[Joint, ...],
    q_norm: Tensor,
    kv_norm: Tensor,
    eps: float,
    heads: int,
    position_T: Tensor,
    frequency: Tensor,
    row: RowFormat,
) -> tuple[Tensor, ...]:
    """See spec.Ops.attention_inputs."""
    x, position = plain(x_TD), position_T.contiguous()
    tokens, columns = x.shape
    rank, width, packed = of_input[0].outputs, row.width, row.kind != "wide"
    assert of_input[1].outputs == width and of_latent[0].outputs == heads * width
    assert all(part.inputs == columns for part in of_input)
    assert all(part.inputs == rank for part in of_latent)
    assert position.dtype is torch.int64 and position.shape[0] == tokens and row.kind != "key"
    size = entry_bytes(width, row.rope, CacheFormat.RELEASE) if packed else width
    q_THK = torch.empty(tokens, heads, width, dtype=x.dtype)
    fresh_T = torch.empty(tokens, size, dtype=row.dtype)
    others, more = made(x, of_input[2:]), made(x, of_latent[1:])
    kept = FLOAT[x.dtype]
    _native.attention_inputs(
        x.data_ptr(),
        kept,
        tokens,
        columns,
        *tables(of_input),
        [out.data_ptr() for out in others],
        [kept, kept, *(FLOAT[out.dtype] for out in others)],
        rank,
        *tables(of_latent),
        [q_THK.data_ptr(), *(out.data_ptr() for out in more)],
        [kept, *(FLOAT[out.dtype] for out in more)],
        *norm_weight(q_norm, rank),
        *norm_weight(kv_norm, width),
        eps,
        heads,
        width,
        position.data_ptr(),
        *rotary(frequency, width),
        packed,
        row.rope,
        size,
        fresh_T.data_ptr(),
        torch.get_num_threads(),
    )
    return q_THK, fresh_T, *others, *more


def index_topk(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
) -> Tensor:
    """See spec.Ops.index_topk."""
    tokens, heads, row = q_TI.shape
    rows, table = keys.rows, spans.table_BP
    assert weight_TI.dtype is torch.float32 and q_TI.dtype is rows.dtype is keys.format.dtype
    assert row == rows.shape[2] and rows.is_contiguous() and table.is_contiguous()
    q_TI, weight_TI = q_TI.contiguous(), weight_TI.contiguous()
    out = torch.empty(tokens, k, dtype=torch.int64)
    _native.index_topk(
        q_TI.data_ptr(),
        weight_TI.data_ptr(),
        heads,
        rows.data_ptr(),
        _KIND[keys.format.kind],
        keys.format.width,
        row * rows.itemsize,
        rows.shape[1],
        table.data_ptr(),
        table.shape[1],
        ratio,
        k,
        sequences(spans),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attend(
    q_THK: Tensor,
    fresh_T: Tensor,
    ring: Pool,
    entries: Pool | None,
    chosen_Tk: Tensor | None,
    ratio: int,
    sink_H: Tensor,
    scale: float,
    window: int,
    spans: Spans,
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.attend. Chosen entries count in the order of their numbers, so that naming every
    visible entry gives the bits of naming none."""
    return attend_write(
        q_THK, fresh_T, ring, entries, chosen_Tk, ratio, sink_H, scale, window, spans, None
    )


def attend_write(
    q_THK: Tensor,
    fresh_T: Tensor,
    ring: Pool,
    entries: Pool | None,
    chosen_Tk: Tensor | None,
    ratio: int,
    sink_H: Tensor,
    scale: float,
    window: int,
    spans: Spans,
    frequency: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.attend_write; as attend where frequency is None."""
    tokens, heads, width = q_THK.shape
    q_THK, fresh_T = plain(q_THK), plain(fresh_T)
    row, table = ring.format, spans.table_BP
    pages = entries.rows if entries is not None and ratio else None
    assert width == row.width and window <= ring.per_page and ring.rows.is_contiguous()
    assert fresh_T.dtype is ring.rows.dtype is row.dtype and table.is_contiguous()
    if pages is not None:
        assert entries is not None and entries.format == row and pages.is_contiguous()
    assert sink_H.dtype is torch.float32 and sink_H.is_contiguous()
    if chosen_Tk is not None:
        assert chosen_Tk.dtype is torch.int64
        chosen_Tk = chosen_Tk.contiguous()
    out = torch.empty_like(q_THK)
    log = torch.empty(tokens, heads, dtype=torch.float32)
    _native.attend(
        q_THK.data_ptr(),
        q_THK.dtype is torch.bfloat16,
        heads,
        fresh_T.data_ptr(),
        ring.rows.data_ptr(),
        ring.per_page,
        _KIND[row.kind],
        width,
        row.rope,
        ring.rows.shape[2] * ring.rows.itemsize,
        0 if pages is None else pages.data_ptr(),
        1 if pages is None else pages.shape[1],
        table.data_ptr(),
        table.shape[1],
        0 if chosen_Tk is None else chosen_Tk.data_ptr(),
        0 if chosen_Tk is None else chosen_Tk.shape[1],
        ratio,
        sink_H.data_ptr(),
        scale,
        window,
        sequences(spans),
        out.data_ptr(),
        log.data_ptr(),
        *((0, 0) if frequency is None else rotary(frequency, width)),
        spans.position_T.data_ptr(),
        torch.get_num_threads(),
    )
    return out, log


OPS: dict[str, Callable[..., Any]] = {
    "attention_inputs": attention_inputs,
    "index_topk": index_topk,
    "attend": attend,
    "attend_write": attend_write,
}
