"""Spans and pools with pages in a random order, and poison in every row that nobody wrote.

at = layout([(300, 63), (0, 1)], generator)       # (first position, new tokens) per sequence
pool = paged(at, ratio, values, RowFormat(...))   # values: one [S, width] per sequence
"""

import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat
from overleap.kernels.torch.linear import quantize

SIZES = (1, 63, 127, 129, 1000)
PAGE = 128


def layout(parts: list[tuple[int, int]], generator: torch.Generator) -> Spans:
    """Spans whose pages and slots are scattered; two slots and two pages belong to nobody."""
    needed = [-(-(start + count) // PAGE) for start, count in parts]
    pages = (torch.randperm(sum(needed) + 2, generator=generator)[:-2]).tolist()
    slots = torch.randperm(len(parts) + 2, generator=generator).tolist()
    rows = []
    for (start, count), n, slot in zip(parts, needed, slots, strict=False):
        rows.append((start, count, slot, pages[:n]))
        pages = pages[n:]
    return Spans.of(rows, torch.device("cpu"))


def poisoned(*shape: int, row: RowFormat) -> Pool:
    """Rows of NaN."""
    fill = torch.nan if row.dtype is torch.float32 else 255
    return Pool(torch.full(shape, fill, dtype=row.dtype), row)


def paged(at: Spans, ratio: int, values: list[Tensor], row: RowFormat) -> Pool:
    """Entries [S, width] of every sequence in their pages, as `row` keeps them."""
    width = quantize(torch.zeros(1, row.width), row).shape[1]
    pool = poisoned(int(at.table_BP.max()) + 3, PAGE // ratio, width, row=row)
    for b, entries in enumerate(values):
        for s, stored in enumerate(quantize(entries, row) if len(entries) else []):
            page = int(at.table_BP[b, s // pool.per_page])
            pool.rows[page, s % pool.per_page] = stored
    return pool


def ringed(at: Spans, values: list[Tensor], capacity: int, row: RowFormat) -> Pool:
    """Rows [start, width] before each sequence's new tokens, in rings by position."""
    width = quantize(torch.zeros(1, row.width), row).shape[1]
    pool = poisoned(len(values) + 2, capacity, width, row=row)
    for b, rows in enumerate(values):
        for position, stored in enumerate(quantize(rows, row) if len(rows) else []):
            pool.rows[at.slot[b], position % capacity] = stored
    return pool
