"""Native ops that know which tokens belong to which sequence: window_write, page_write, compress.

Not here: the choice of entries and attention (attention.py), the bytes of a row (rows.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.cpu import _native
from overleap.kernels.cpu.linear import plain
from overleap.kernels.cpu.tape import sequences
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool

MOST_POOLED = 256  # as in src/rows.h


def window_write(ring: Tensor, rows_T: Tensor, spans: Spans) -> None:
    """See spec.Ops.window_write."""
    assert ring.is_contiguous() and rows_T.shape[1:] == ring.shape[2:]
    rows_T = plain(rows_T).to(ring.dtype)
    _native.window_write(
        ring.data_ptr(),
        ring.shape[1],
        ring.stride(1) * ring.itemsize,
        rows_T.data_ptr(),
        sequences(spans),
    )


def page_write(pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> None:
    """See spec.Ops.page_write."""
    rows, table = pool.rows, spans.table_BP
    assert rows.is_contiguous() and table.is_contiguous() and rows_E.dtype is rows.dtype
    assert rows_E.shape[1] == rows.shape[2]
    rows_E = plain(rows_E)
    _native.page_write(
        rows.data_ptr(),
        rows.shape[1],
        rows.shape[2] * rows.itemsize,
        rows_E.data_ptr(),
        table.data_ptr(),
        table.shape[1],
        ratio,
        sequences(spans),
    )


def compress(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Tensor:
    """See spec.Ops.compress."""
    return _compress(rows_T2W, tail, ape, ratio, spans, False)


def compress_write(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Tensor:
    """See spec.Ops.compress_write."""
    return _compress(rows_T2W, tail, ape, ratio, spans, True)


def _compress(
    rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans, writes: bool
) -> Tensor:
    rows, width, overlapped = plain(rows_T2W), ape.shape[1], ratio == 4
    assert tail.is_contiguous() and ape.is_contiguous() and ratio <= MOST_POOLED
    assert rows.dtype is tail.dtype is ape.dtype is torch.float32
    assert rows.shape[1:] == tail.shape[2:] == (2, width)
    entries = sum(last - first for first, last in spans.emitted(ratio))
    out = torch.empty(entries, width // 2 if overlapped else width, dtype=torch.float32)
    if entries or writes:
        _native.compress(
            rows.data_ptr(),
            tail.data_ptr(),
            ape.data_ptr(),
            width,
            tail.shape[1],
            ratio,
            overlapped,
            writes,
            sequences(spans),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out


OPS: dict[str, Callable[..., Any]] = {
    "window_write": window_write,
    "page_write": page_write,
    "compress": compress,
    "compress_write": compress_write,
}
