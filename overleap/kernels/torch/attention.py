"""Attention over window rows and compressed entries, and the choice of entries.

One sequence at a time, tiles of fixed size, an online softmax: no temporary grows with the context.
Not here: how entries come to be (compress.py), rotation and projections (linear.py).
"""

import torch
from torch import Tensor

from overleap.cache.layout import TILE_BYTES
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool
from overleap.kernels.torch.linear import values_of

TILE_VALUES = TILE_BYTES // 4  # f32 values in the largest temporary
QUERY_TILE = 128  # queries that share one slice of window rows


def window_write(ring: Tensor, rows_T: Tensor, spans: Spans) -> None:
    """See spec.Ops.window_write."""
    slot, position, keep = spans.slot_T, spans.position_T, spans.last_rows(ring.shape[1])
    if keep is not None:
        slot, position, rows_T = slot[keep], position[keep], rows_T[keep]
    ring[slot, position % ring.shape[1]] = rows_T.to(ring.dtype)


def page_write(pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> None:
    """See spec.Ops.page_write."""
    if not rows_E.shape[0]:
        return
    sequence, entry = spans.known(_completed, ratio)
    page = spans.table_BP[sequence, entry // pool.per_page]
    pool.rows[page, entry % pool.per_page] = rows_E


def _completed(spans: Spans, ratio: int) -> Tensor:
    """i64 [2, completed]: sequence and number of every entry that the step completes."""
    pairs = [(b, e) for b, (a, z) in enumerate(spans.emitted(ratio)) for e in range(a, z)]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.contiguous()


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
    outs, logs = [], []
    for b, start in enumerate(spans.start):
        here = slice(spans.offset[b], spans.offset[b + 1])
        q = q_THK[here] * scale
        rows = _window_rows(fresh_T[here], ring, spans.slot[b], start, window)
        part = _attend_window(q, rows, start, window)
        if entries is not None and ratio:
            visible = (spans.position_T[here] + 1) // ratio
            count = (start + spans.count[b]) // ratio
            if chosen_Tk is not None:
                part = _attend_chosen(q, entries, spans.table_BP[b], chosen_Tk[here], part)
            else:
                part = _attend_visible(q, entries, spans.table_BP[b], visible, count, part)
        top, total, mixed = part
        sink = sink_H.float() - top
        over = sink.detach().clamp(min=0)  # a sink far above every score must not overflow
        total = total * torch.exp(-over) + torch.exp(sink - over)
        outs.append(mixed * (torch.exp(-over) / total)[..., None])
        logs.append(top + over + total.log())
    return torch.cat(outs).to(q_THK.dtype), torch.cat(logs)


_Part = tuple[Tensor, Tensor, Tensor]  # running max [T, H], sum [T, H], weighted rows [T, H, K]


def _window_rows(fresh: Tensor, ring: Pool, slot: int, start: int, window: int) -> Tensor:
    """f32 rows of positions max(0, start - window + 1) .. start + n - 1."""
    first = max(0, start - window + 1)
    if first < start:
        old = torch.arange(first, start, device=fresh.device) % ring.per_page
        fresh = torch.cat((ring.rows[slot, old], fresh))
    return values_of(fresh, ring.format)


def _attend_window(q_THK: Tensor, rows_NK: Tensor, start: int, window: int) -> _Part:
    """Every query against the `window` positions up to its own."""
    first = start - (rows_NK.shape[0] - q_THK.shape[0])
    parts = []
    for low in range(0, q_THK.shape[0], QUERY_TILE):
        q = q_THK[low : low + QUERY_TILE]
        n = q.shape[0]
        near = max(0, start + low - window + 1 - first)
        rows = rows_NK[near : start + low + n - first]
        query_at = torch.arange(start + low, start + low + n, device=q.device)[:, None]
        row_at = torch.arange(first + near, start + low + n, device=q.device)
        hidden = (row_at > query_at) | (row_at <= query_at - window)
        score = _scores(q, rows).masked_fill(hidden[:, None], -torch.inf)
        parts.append(_first_part(score, rows))
    tops, totals, mixes = zip(*parts, strict=True)
    return torch.cat(tops), torch.cat(totals), torch.cat(mixes)


def _attend_visible(
    q_THK: Tensor, entries: Pool, table: Tensor, visible_T: Tensor, count: int, part: _Part
) -> _Part:
    """Every query against all entries it may see, a tile of entries at a time."""
    tile = max(64, TILE_VALUES // (q_THK.shape[0] * q_THK.shape[1]))
    tile = -(-tile // entries.per_page) * entries.per_page
    for low in range(0, count, tile):
        number = torch.arange(low, min(low + tile, count), device=q_THK.device)
        rows = values_of(entry_rows(entries, table, number), entries.format)
        score = _scores(q_THK, rows)
        hidden = number >= visible_T[:, None]
        part = _join(part, score.masked_fill(hidden[:, None], -torch.inf), rows)
    return part


def _attend_chosen(
    q_THK: Tensor, entries: Pool, table: Tensor, chosen_Tk: Tensor, part: _Part
) -> _Part:
    """Every query against its own entries, gathered for a tile of queries at a time."""
    tile = max(1, TILE_VALUES // (chosen_Tk.shape[1] * q_THK.shape[2]))
    parts = []
    for low in range(0, q_THK.shape[0], tile):
        here = slice(low, low + tile)
        chosen = chosen_Tk[here]
        rows = values_of(entry_rows(entries, table, chosen.clamp(min=0)), entries.format)
        rows = rows.masked_fill(chosen[..., None] < 0, 0.0)
        score = torch.bmm(q_THK[here], rows.to(q_THK.dtype).transpose(1, 2)).float()
        score = score.masked_fill(chosen[:, None] < 0, -torch.inf)
        old = (part[0][here], part[1][here], part[2][here])
        parts.append(_join(old, score, rows))
    tops, totals, mixes = zip(*parts, strict=True)
    return torch.cat(tops), torch.cat(totals), torch.cat(mixes)


def entry_rows(pool: Pool, table: Tensor, number: Tensor) -> Tensor:
    """Stored rows of entries `number` (any shape) of the sequence with this page table."""
    return pool.rows[table[number // pool.per_page], number % pool.per_page]


def _scores(q_THK: Tensor, rows_NK: Tensor) -> Tensor:
    """f32 [T, H, N]; one matrix product, since all heads share the rows."""
    flat = q_THK.flatten(0, 1) @ rows_NK.to(q_THK.dtype).t()
    return flat.float().view(*q_THK.shape[:2], -1)


def _first_part(score_THN: Tensor, rows_NK: Tensor) -> _Part:
    top = score_THN.amax(-1).detach()
    weight = torch.exp(score_THN - top[..., None])
    return top, weight.sum(-1), _mix(weight, rows_NK)


def _join(part: _Part, score_THN: Tensor, rows: Tensor) -> _Part:
    """Add scored rows [N, K] or [T, N, K] to a running softmax. `part` has seen a finite score."""
    old_top, total, mixed = part
    top = torch.maximum(old_top, score_THN.amax(-1).detach())
    keep = torch.exp(old_top - top)
    weight = torch.exp(score_THN - top[..., None])
    total = total * keep + weight.sum(-1)
    return top, total, mixed * keep[..., None] + _mix(weight, rows)


def _mix(weight_THN: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 3:
        return torch.bmm(weight_THN, rows.to(weight_THN.dtype)).float()
    return (weight_THN.flatten(0, 1) @ rows).float().view(*weight_THN.shape[:2], -1)


def index_topk(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
) -> Tensor:
    """See spec.Ops.index_topk."""
    q_TIJ = values_of(q_TI, keys.format)
    picked = []
    for b, start in enumerate(spans.start):
        here = slice(spans.offset[b], spans.offset[b + 1])
        count = (start + spans.count[b]) // ratio
        visible = (spans.position_T[here] + 1) // ratio
        picked.append(
            _best(q_TIJ[here], weight_TI[here], keys, spans.table_BP[b], visible, count, k)
        )
    return torch.cat(picked)


def _best(
    q_TIJ: Tensor,
    weight_TI: Tensor,
    keys: Pool,
    table: Tensor,
    visible_T: Tensor,
    count: int,
    k: int,
) -> Tensor:
    """Entry numbers [T, k], best first; score and number share one sortable i64."""
    tokens, heads = q_TIJ.shape[:2]
    tile = max(64, TILE_VALUES // (tokens * heads))
    best = torch.full((tokens, k), _NOTHING, dtype=torch.int64, device=q_TIJ.device)
    for low in range(0, count, tile):
        number = torch.arange(low, min(low + tile, count), device=q_TIJ.device)
        score = index_scores(
            q_TIJ, weight_TI, values_of(entry_rows(keys, table, number), keys.format)
        )
        ranked = _sortable(score, number)
        ranked = ranked.masked_fill(number >= visible_T[:, None], _NOTHING)
        best = torch.cat((best, ranked), dim=1).topk(k, dim=1).values
    chosen = _NUMBER_BITS - (best & _NUMBER_BITS)
    return torch.where(best == _NOTHING, -1, chosen)


def index_scores(q_TIJ: Tensor, weight_TI: Tensor, keys_NJ: Tensor) -> Tensor:
    """f32 [T, N]: sum over heads of weight * relu(q . key) (report eq. 16)."""
    dots = (q_TIJ.flatten(0, 1) @ keys_NJ.to(q_TIJ.dtype).t()).unflatten(0, q_TIJ.shape[:2])
    return torch.bmm(weight_TI[:, None].to(dots.dtype), dots.relu()).squeeze(1).float()


_NUMBER_BITS = (1 << 31) - 1
_NOTHING = -(1 << 63)


def _sortable(score: Tensor, number: Tensor) -> Tensor:
    """i64 keys ordered by score, then smaller number: float bits above, inverted number below."""
    bits = (score + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    order = torch.where(bits < 0, bits ^ _NUMBER_BITS, bits)
    return (order << 31) | (_NUMBER_BITS - number)
