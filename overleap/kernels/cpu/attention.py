"""The choice of entries and attention over them, in native code: index_topk, attend.

Not here: the arithmetic (src/kernel_index.cpp, src/kernel_attention.cpp), writing rows (rows.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.cpu import _native
from overleap.kernels.spec import Pool, Spans

_KIND = {"kv": 0, "key": 1, "wide": 2}


def index_topk(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
) -> Tensor:
    """See spec.Ops.index_topk."""
    tokens, heads, row = q_TI.shape
    rows, table = keys.rows, spans.table_BP
    assert weight_TI.dtype is torch.float32 and q_TI.dtype is rows.dtype is keys.format.dtype
    assert row == rows.shape[2] and rows.is_contiguous() and table.is_contiguous()
    q_TI, weight_TI = q_TI.contiguous(), weight_TI.contiguous()
    out = torch.empty((tokens, k), dtype=torch.int64)
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
        spans.start,
        spans.count,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


OPS: dict[str, Callable[..., Any]] = {"index_topk": index_topk}
