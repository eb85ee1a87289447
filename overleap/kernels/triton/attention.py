"""Attention over window rows and compressed entries, and the choice of entries.

A program has a tile of neighbouring tokens of one sequence and some of the heads, and goes through
its rows block by block, straight from their packed bytes. Blocks begin at multiples of their size
in the text, whatever the step is cut to, so a row's result does not depend on the tile it is in.
Long texts are split among programs, and their parts joined. Entries are scored in slices of bounded
size. Not here: rows and their formats (formats.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overleap.cache.layout import TILE_BYTES
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat
from overleap.kernels.triton.formats import narrow, row_tile, times, wide
from overleap.kernels.triton.linear import FORMS, bits
from overleap.kernels.triton.tuning import Tuning, pow2, tuning

KINDS = {"wide": 0, "kv": 1, "key": 2}
WINDOW, VISIBLE, CHOSEN = 0, 1, 2  # which rows are attended
COLUMNS = 6  # of a tile: first row, rows, sequence, position of the first, slot, first new position
NOTHING = -(1 << 63)
NUMBER_BITS = (1 << 31) - 1


def tiles(spans: Spans, size: int) -> Tensor:
    """i64 [tiles, COLUMNS]: packed tokens in tiles of at most `size`, none of two sequences."""
    rows = [
        (offset + low, min(size, count - low), b, start + low, slot, start)
        for b, (start, count, slot, offset) in enumerate(
            zip(spans.start, spans.count, spans.slot, spans.offset[:-1], strict=True)
        )
        for low in range(0, count, size)
    ]
    return torch.tensor(rows, dtype=torch.int64)


@triton.jit
def add_rows(q, rows, seen, scale, top, total, mix, BF16: tl.constexpr):
    """A block of rows into a running softmax: largest score, sum, weighted rows."""
    M: tl.constexpr = q.shape[0]
    N: tl.constexpr = rows.shape[0]
    score = times(q, tl.trans(rows), tl.zeros((M, N), dtype=tl.float32), BF16) * scale
    score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(top, tl.max(score, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # no row was seen yet
    keep = tl.exp(top - safe)
    weight = tl.exp(score - safe[:, None])
    total = total * keep + tl.sum(weight, axis=1)
    return new, total, times(weight, rows, mix * keep[:, None], BF16)


@triton.jit
def attend_part(
    q, fresh, ring, pool, chosen, table, tile, tops, totals, mixes,
    H, P, capacity, per_page, count_chosen, scale, window, ratio, row_bytes, splits, place,
    X: tl.constexpr, KIND: tl.constexpr, K: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr, BF16: tl.constexpr, SPLITS: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Window rows or entries of a tile of tokens, one split of `splits`, as part `place` + split of
    SPLITS: largest score, sum, and weighted rows."""
    head = tile + tl.program_id(0) * 6
    first_row, count, b = tl.load(head), tl.load(head + 1), tl.load(head + 2)
    at, slot, start = tl.load(head + 3), tl.load(head + 4), tl.load(head + 5)
    split = tl.program_id(2)
    m = tl.arange(0, BT * BH)
    h = tl.program_id(1) * BH + m % BH
    live = (m // BH < count) & (h < H)
    position, t = at + m // BH, first_row + m // BH
    k = tl.arange(0, KP)[None, :]
    inside = live[:, None] & (k < K)
    query = wide(tl.load(q + (t * H + h)[:, None] * K + k, mask=inside, other=0), X)
    top = tl.full((BT * BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BT * BH,), dtype=tl.float32)
    mix = tl.zeros((BT * BH, KP), dtype=tl.float32)
    n = tl.arange(0, BN)

    last = at + count - 1
    if ROWS == 0:
        begin, end = tl.maximum(at - window + 1, 0) // BN, last // BN + 1
    elif ROWS == 1:
        begin, end = at * 0, ((last + 1) // ratio + BN - 1) // BN
    else:
        begin, end = at * 0, (at * 0 + count_chosen + BN - 1) // BN
    for block in range(begin + split, end, splits):
        e = (block * BN + n).to(tl.int64)
        if ROWS == 0:
            there = (e <= last) & (e > at - window)
            from_fresh = fresh + (first_row - at + e) * row_bytes
            from_ring = ring + (slot * capacity + e % capacity) * row_bytes
            where = tl.where(e >= start, from_fresh, from_ring)
            seen = (e[None, :] <= position[:, None]) & (e[None, :] > position[:, None] - window)
        else:
            if ROWS == 1:
                there = e < (last + 1) // ratio
                seen = e[None, :] < ((position + 1) // ratio)[:, None]
            else:
                e = tl.load(chosen + first_row * count_chosen + e, mask=e < count_chosen, other=-1)
                there = e >= 0
                seen = tl.broadcast_to(there[None, :], (BT * BH, BN))
            page = tl.load(table + b * P + e // per_page, mask=there, other=0)
            where = pool + (page * per_page + e % per_page) * row_bytes
        rows = row_tile(where, there, KIND, K, ROPE, KP)
        top, total, mix = add_rows(query, rows, seen, scale, top, total, mix, BF16)

    out = (t * SPLITS + place + split) * H + h
    tl.store(tops + out, top, mask=live)
    tl.store(totals + out, total, mask=live)
    tl.store(mixes + out[:, None] * K + k, mix, mask=live[:, None] & (k < K))


@triton.jit
def attend_join(
    tops, totals, mixes, sink, out, log, ROWS, H,
    O: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The parts of BR rows (a row is a token and a head) and the sink."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    live = row < ROWS
    t, h = row // H, row % H
    own = tl.load(sink + h, mask=live, other=0.0)
    top = own
    for s in range(SPLITS):
        part = tl.load(tops + (t * SPLITS + s) * H + h, mask=live, other=float("-inf"))
        top = tl.maximum(top, part)
    total = tl.exp(own - top)
    k = tl.arange(0, KP)[None, :]
    mix = tl.zeros((BR, KP), dtype=tl.float32)
    for s in range(SPLITS):
        at = (t * SPLITS + s) * H + h
        factor = tl.exp(tl.load(tops + at, mask=live, other=float("-inf")) - top)
        total += factor * tl.load(totals + at, mask=live, other=0.0)
        inside = live[:, None] & (k < K)
        mix += factor[:, None] * tl.load(mixes + at[:, None] * K + k, mask=inside, other=0.0)
    result = narrow(mix / total[:, None], O)
    tl.store(out + row[:, None] * K + k, result, mask=live[:, None] & (k < K))
    tl.store(log + row, top + tl.log(total), mask=live)


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
    """See spec.Ops.attend."""
    (tokens, heads, width), device = q_THK.shape, q_THK.device
    sizes, q, form = tuning(device), q_THK.contiguous(), ring.format
    chosen = spans.table_BP if chosen_Tk is None else chosen_Tk.contiguous()
    pool, kinds = ring, [(WINDOW, sizes.attend_tokens, window)]
    if entries is not None and ratio:
        pool = entries
        # A token's own choice is shared with no other token.
        one = (VISIBLE, sizes.attend_tokens, spans.reach // ratio)
        kinds.append(one if chosen_Tk is None else (CHOSEN, 1, chosen.shape[1]))
    parts = []
    for rows, together, count in kinds:
        block = max(min(pow2(heads), sizes.attend_queries // together), 16 // together, 1)
        plan, groups = spans.known(tiles, together), triton.cdiv(heads, block)
        splits = _splits(sizes, plan.shape[0] * groups, count)
        parts.append((rows, together, block, plan, groups, splits))
    whole = sum(part[-1] for part in parts)
    tops = torch.empty((tokens, whole, heads), dtype=torch.float32, device=device)
    totals, mixes = torch.empty_like(tops), tops.new_empty((*tops.shape, width))
    place, shape = 0, {"K": width, "SPLITS": whole, "KP": pow2(width, 16)}
    for rows, together, block, plan, groups, splits in parts:
        attend_part[(plan.shape[0], groups, splits)](
            bits(q), fresh_T.contiguous(), ring.rows, pool.rows, chosen, spans.table_BP, plan,
            tops, totals, mixes, heads, spans.table_BP.shape[1], ring.per_page, pool.per_page,
            chosen.shape[1], scale, window, max(ratio, 1), ring.rows.shape[-1], splits, place,
            X=FORMS[q.dtype], KIND=KINDS[form.kind], ROPE=form.rope, ROWS=rows,
            BF16=sizes.bf16 and q.dtype is torch.bfloat16,
            BT=together, BH=block, BN=sizes.attend_rows, num_stages=1, **shape,
        )  # fmt: skip
        place += splits
    out, log = torch.empty_like(q), torch.empty((tokens, heads), dtype=torch.float32, device=device)
    tile = max(1, 4096 // shape["KP"])
    attend_join[(triton.cdiv(tokens * heads, tile),)](
        tops, totals, mixes, sink_H, bits(out), log, tokens * heads, heads,
        O=FORMS[q.dtype], BR=tile, **shape,
    )  # fmt: skip
    return out, log


def _splits(sizes: Tuning, programs: int, rows: int) -> int:
    """Parts to cut the rows into, a power of two, so that no multiprocessor is idle."""
    wanted = min(sizes.waves * sizes.cores // programs, rows // sizes.attend_rows, 64)
    return 1 << max(0, wanted.bit_length() - 1)


@triton.jit
def score_entries(
    q, weight, keys, table, tile, ranked, low, high, wide_out, P, I, per_page, ratio, row_bytes,
    KIND: tl.constexpr, J: tl.constexpr, BF16: tl.constexpr,
    BT: tl.constexpr, IP: tl.constexpr, BN: tl.constexpr, JP: tl.constexpr,
):  # fmt: skip
    """Entries low .. high - 1 for a tile of tokens: score and number in one sortable i64."""
    head = tile + tl.program_id(0) * 6
    first_row, count, b = tl.load(head), tl.load(head + 1), tl.load(head + 2)
    at = tl.load(head + 3)
    first = low + tl.program_id(1) * BN
    e = (first + tl.arange(0, BN)).to(tl.int64)
    t = tl.arange(0, BT)
    key = tl.full((BT, BN), -1, dtype=tl.int64) << 63
    if first < (at + count) // ratio:  # else no token of the tile sees any of them
        m = tl.arange(0, BT * IP)
        live = (m // IP < count) & (m % IP < I)
        pair = (first_row + m // IP) * I + m % IP
        query = row_tile(q + pair * row_bytes, live, KIND, J, 0, JP)
        share = tl.load(weight + pair, mask=live, other=0.0)
        there = (e < high) & (e < (at + count) // ratio)
        page = tl.load(table + b * P + e // per_page, mask=there, other=0)
        where = keys + (page * per_page + e % per_page) * row_bytes
        rows = row_tile(where, there, KIND, J, 0, JP)
        dots = times(query, tl.trans(rows), tl.zeros((BT * IP, BN), dtype=tl.float32), BF16)
        dots = tl.where(dots < 0, 0.0, dots) * share[:, None]
        score = tl.sum(tl.reshape(dots, (BT, IP, BN)), axis=1)
        score = tl.where(score == 0, 0.0, score)  # -0.0 is 0.0
        order = score.to(tl.int32, bitcast=True)
        order = tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.int64)
        seen = e[None, :] < ((at + t + 1) // ratio)[:, None]
        key = tl.where(seen, (order << 31) | (0x7FFFFFFF - e)[None, :], key)
    out = ranked + (first_row + t)[:, None] * wide_out + (e - low)[None, :]
    tl.store(out, key, mask=(t < count)[:, None] & (e < high)[None, :])


def index_topk(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
) -> Tensor:
    """See spec.Ops.index_topk. Slices of entries are scored here and merged by torch.topk."""
    (tokens, heads), device = weight_TI.shape, weight_TI.device
    sizes, form = tuning(device), keys.format
    plan, padded = spans.known(tiles, sizes.index_tokens), pow2(heads, 16)
    q, weight, count = q_TI.contiguous(), weight_TI.contiguous(), spans.reach // ratio
    best = torch.full((tokens, k), NOTHING, dtype=torch.int64, device=device)
    block = sizes.index_entries
    slice_ = max(1, TILE_BYTES // (8 * tokens * block)) * block
    for low in range(0, count, slice_):
        high = min(low + slice_, count)
        ranked = torch.empty((tokens, high - low), dtype=torch.int64, device=device)
        score_entries[(plan.shape[0], triton.cdiv(high - low, block))](
            q, weight, keys.rows, spans.table_BP, plan, ranked, low, high, high - low,
            spans.table_BP.shape[1], heads, keys.per_page, ratio, keys.rows.shape[-1],
            KIND=KINDS[form.kind], J=form.width, BF16=_index_in_bf16(sizes, form),
            BT=sizes.index_tokens, IP=padded, BN=block, JP=pow2(form.width, 16),
        )  # fmt: skip
        best = torch.cat((best, ranked), dim=1).topk(k, dim=1).values
    return torch.where(best == NOTHING, -1, NUMBER_BITS - (best & NUMBER_BITS))


def _index_in_bf16(sizes: Tuning, form: RowFormat) -> bool:
    """e2m1 values with their scales lose nothing as bf16."""
    return sizes.bf16 and form.kind == "key"
