"""What is tried with the ops that know sequences: window rings, pages, compressors, attention.

Several sequences at different positions in one step; every row that must not be read is NaN.
Read next: draw.py (how they are laid out), exact.py (what must come out).
"""

from collections.abc import Iterator

import torch

from overleap.kernels.conformance import exact
from overleap.kernels.conformance.cases import FLOATS, Case, nbytes
from overleap.kernels.conformance.compare import all_of, best_entries, close, same_bytes
from overleap.kernels.conformance.draw import KEY, KEY_SHORT, KV, KV_SHORT, WIDE, Draw
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat

# (start, count) of the sequences of a step: first chunk, decode, chunk across page borders, ...
STEPS = {
    "one token": [(0, 1)],
    "decode": [(127, 1), (1000, 1), (3, 1), (128, 1)],
    "prefill": [(0, 129)],
    "mixed": [(0, 63), (127, 2), (1000, 65), (255, 1), (129, 127)],
}


def window_write(draw: Draw, timed: bool) -> Iterator[Case]:
    """Packed rows and compressor rows; more tokens than the ring holds."""
    steps = STEPS | {"long": [(5, 300), (0, 2), (64, 1)]}
    for label, parts in steps.items():
        spans = draw.spans(*parts)
        for row in (KV_SHORT, WIDE):
            ring, rows = draw.ring(row, 128, spans).rows, draw.rows(row, spans.offset[-1])
            check = same_bytes(exact.window_write(ring, rows, spans), ring)
            args = (ring, rows, spans)
            yield Case("window_write", f"{row.kind} {label}", args, check, writes=0)
        tail, rows = draw.tail(6, 4, spans), draw.normal(spans.offset[-1], 2, 6)
        check = same_bytes(exact.window_write(tail, rows, spans), tail)
        yield Case("window_write", f"tail {label}", (tail, rows, spans), check, writes=0)
    if timed:
        spans = draw.spans(*[(500, 64)] * 16)
        ring, rows = draw.ring(KV, 128, spans).rows, draw.rows(KV, spans.offset[-1])
        check = same_bytes(exact.window_write(ring, rows, spans), ring)
        moved = 2 * nbytes(rows)
        args = (ring, rows, spans)
        yield Case("window_write", "16 x 64", args, check, writes=0, moved=moved)


def page_write(draw: Draw, timed: bool) -> Iterator[Case]:
    """Entries across page borders; steps that complete none."""
    steps = STEPS | {"nothing": [(1, 1), (128, 2)]}
    if timed:
        steps = steps | {"16 x 256": [(512, 256)] * 16}
    for label, parts in steps.items():
        spans = draw.spans(*parts)
        for ratio, row in ((4, KEY), (4, KV), (128, KV_SHORT), (128, WIDE)):
            pool = draw.pool(row, ratio, spans)
            count = sum(last - first for first, last in spans.emitted(ratio))
            rows = draw.rows(row, count)
            check = same_bytes(exact.page_write(pool, rows, ratio, spans), pool.rows)
            moved = 2 * nbytes(rows) if label == "16 x 256" and ratio == 4 else 0
            name, args = f"{row.kind} ratio {ratio} {label}", (pool, rows, ratio, spans)
            yield Case("page_write", name, args, check, writes=0, moved=moved)


def compress(draw: Draw, timed: bool) -> Iterator[Case]:
    """Blocks that begin in an earlier step, the first block of a text, steps without a block."""
    steps = STEPS | {"nothing": [(1, 1), (128, 2)], "tail only": [(3, 1), (127, 1), (255, 1)]}
    tried = [(4, 2), (4, 126), (128, 1), (128, 63)]
    for label, parts in steps.items():
        for ratio, width in tried:
            for size in (1.0, 30.0):  # 30: one row of a block takes nearly all
                spans = draw.spans(*parts)
                rows = draw.normal(spans.offset[-1], 2, width) * size
                ape, tail = draw.normal(ratio, width), draw.tail(width, ratio, spans) * size
                args = (rows, tail, ape, ratio, spans)
                check = close(exact.compress(*args), torch.float32)
                yield Case(
                    "compress", f"ratio {ratio} width {width} {label} x {size:g}", args, check
                )
    if timed:
        for ratio, width in ((4, 1024), (128, 512)):
            spans = draw.spans((128, 512))
            rows, ape = draw.normal(512, 2, width), draw.normal(ratio, width)
            args = (rows, draw.tail(width, ratio, spans), ape, ratio, spans)
            check = close(exact.compress(*args), torch.float32)
            name = f"ratio {ratio} width {width}, 512 tokens"
            yield Case("compress", name, args, check, moved=nbytes(rows, ape))


def index_topk(draw: Draw, timed: bool) -> Iterator[Case]:
    """Nothing visible, fewer than k, many ties, scores below zero."""
    for label, parts in STEPS.items():
        for row, heads in ((WIDE, 3), (KEY, 5), (KEY_SHORT, 1)):
            for k in (1, 20, 129):
                spans = draw.spans(*parts)
                tokens = spans.offset[-1]
                keys, q = draw.pool(row, 4, spans), draw.rows(row, tokens, heads)
                weight = draw.normal(tokens, heads)
                name = f"{row.kind} {row.width} {label} top {k}"
                yield _topk(name, (q, weight, keys, 4, spans, k), False)
        yield from _ties(draw, label, parts)
    if timed:
        spans = draw.spans((1 << 17, 1))
        keys, q = draw.pool(KEY, 4, spans), draw.rows(KEY, 1, 64)
        args = (q, draw.normal(1, 64), keys, 4, spans, 512)
        yield _topk("key 128, 32768 entries", args, False, 32768 * q.shape[-1])


def _ties(draw: Draw, label: str, parts: list[tuple[int, int]]) -> Iterator[Case]:
    """Scores that are exact in f32: few different values, so that ties decide."""
    for row, heads in ((WIDE, 2), (KEY, 3), (KEY_SHORT, 2)):
        spans = draw.spans(*parts)
        tokens = spans.offset[-1]
        keys = draw.pool(row, 4, spans)
        if row.kind == "wide":
            q = draw.integers(-1, 2, tokens, heads, row.width).float()
            keys = Pool(torch.where(keys.rows.isnan(), keys.rows, keys.rows.round().sign()), row)
        else:
            q = _unit_scales(draw.rows(row, tokens, heads), row)
            keys = Pool(_unit_scales(keys.rows, row), row)
        # Weights of both signs and zeros: scores below zero, and tokens whose entries all tie.
        weight = draw.integers(-1, 2, tokens, heads).float()
        for k in (3, 63):
            name = f"{row.kind} {row.width} {label} top {k} ties"
            yield _topk(name, (q, weight, keys, 4, spans, k), True)


def _unit_scales(rows: torch.Tensor, row: RowFormat) -> torch.Tensor:
    """The same codes with scale 1; NaN scales stay."""
    rows = rows.clone()
    scales = rows[..., row.width // 2 :]
    scales.masked_fill_(scales != 255, 127)
    return rows


def _topk(
    name: str,
    args: tuple[torch.Tensor, torch.Tensor, Pool, int, Spans, int],
    representable: bool,
    moved: int = 0,
) -> Case:
    scores, sizes = exact.index_scores(*args[:5])
    check = best_entries(scores, sizes, args[5], representable)
    return Case("index_topk", name, args, check, moved=moved)


def attend(draw: Draw, timed: bool) -> Iterator[Case]:
    """Window alone, all entries, chosen entries with gaps; sinks; rows that take everything."""
    for label, parts in STEPS.items():
        for row, heads, ratio, k in (
            (KV, 3, 0, 0),
            (KV, 2, 128, 0),
            (KV_SHORT, 1, 128, 0),
            (KV_SHORT, 5, 4, 20),
            (WIDE, 3, 4, 129),
            (WIDE, 3, 128, 0),
        ):
            for dtype, size in ((FLOATS[0], 1.0), (FLOATS[0], 8.0), (FLOATS[1], 2.0)):
                name = f"{row.kind} {row.width} ratio {ratio} {label} x {size:g}"
                yield _attend(draw, name, parts, row, heads, ratio, k, dtype, size)
        name = f"a sink far above every score {label}"
        yield _attend(draw, name, parts, KV, 3, 128, 0, FLOATS[0], 1.0, lift=200.0)
    if timed:
        tried = (("window", 0, 0), ("1024 entries", 128, 0), ("512 chosen", 4, 512))
        for name, ratio, k in tried:
            part = [(1 << 17, 1)] if not k else [(1 << 15, 1)]
            yield _attend(draw, name, part, KV, 64, ratio, k, torch.float32, 1.0, True)


def _attend(
    draw: Draw,
    name: str,
    parts: list[tuple[int, int]],
    row: RowFormat,
    heads: int,
    ratio: int,
    k: int,
    dtype: torch.dtype,
    size: float,
    timed: bool = False,
    lift: float = 0.0,
) -> Case:
    spans = draw.spans(*parts)
    tokens = spans.offset[-1]
    entries = draw.pool(row, ratio, spans) if ratio else None
    chosen = None
    if k:
        chosen = torch.full((tokens, k), -1)
        for t, _, position in exact.tokens(spans):
            seen = torch.randperm((position + 1) // ratio, generator=draw.generator)[:k]
            chosen[t, : len(seen)] = seen
        chosen = chosen.to(draw.device)
    q = (draw.normal(tokens, heads, row.width) * size).to(dtype)
    sink, scale = draw.normal(heads) * size + lift, row.width**-0.5
    fresh, ring = draw.rows(row, tokens), draw.ring(row, 128, spans)
    args = (q, fresh, ring, entries, chosen, ratio, sink, scale, 128, spans)
    out, log = exact.attend(*args)
    read = 128 + (k or (parts[0][0] + 1) // ratio if ratio else 0)
    moved = 2 * nbytes(q) + read * fresh.shape[-1] if timed else 0
    check = all_of(close(out, dtype), close(log, torch.float32))
    return Case("attend", name, args, check, dtype, moved=moved)
