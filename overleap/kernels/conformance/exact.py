"""Every op once more, as naive formulas in float64: what a backend is held against.

Independent of kernels/torch on purpose: it shares no code with any backend, and is written to be
read beside the report, not to be fast. Read next: cases.py (the inputs), compare.py (the verdict).

Letters: T packed tokens, D hidden width, M streams, H heads, K head width, I indexer heads,
J indexer width, X experts per token, E experts, W values of a compressor row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.spec import Experts, Pool, RowFormat, Weight

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
FLOOR_E4M3 = 1e-4
FLOOR_E2M1 = 6 * 2.0**-126


@dataclass(frozen=True)
class Exact:
    """A result and what its error is measured against.

    want   f64
    size   f64, same shape: the terms that were added up, without their signs, times the first-order
           sensitivity to errors of inner products; a float result is off by a few eps times this
    slack  f64 or None: what a rounding inside the op may add if it falls to the other side
    """

    want: Tensor
    size: Tensor
    slack: Tensor | None = None


# Number formats (section 3.4 and the released code): values, scales, nearest codes.


def scale_of(amax: Tensor, largest: float, floor: float) -> Tensor:
    """2^ceil(log2(max(amax, floor) / largest)), exactly."""
    mantissa, exponent = torch.frexp(amax.clamp(min=floor) / largest)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def nearest(size: Tensor, grid: Tensor) -> Tensor:
    """Codes of the nearest values of an ascending grid; halfway, the even code."""
    middle = (grid[1:] + grid[:-1]) / 2
    code = torch.searchsorted(middle, size.contiguous())  # below the middle, or on it
    on_middle = size == middle[code.clamp(max=len(middle) - 1)]
    return code + (on_middle & (code % 2 == 1))


def encode(x: Tensor, group: int, grid: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """f64 [..., K] -> codes i64 [..., K] without sign, scales f64 [..., ceil(K / group)]."""
    codes, scales = [], []
    for part in x.split(group, dim=-1):
        scale = scale_of(part.abs().amax(-1, keepdim=True), float(grid[-1]), floor)
        codes.append(nearest(part.abs() / scale, grid))
        scales.append(scale)
    return torch.cat(codes, -1), torch.cat(scales, -1)


def round_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """f64 [..., K] after e4m3, and the scale of every value; NaN where one of a group is none."""
    whole = [part.isfinite().all(-1, keepdim=True).expand_as(part) for part in x.split(group, -1)]
    codes, scales = encode(x.nan_to_num(0, 0, 0), group, E4M3, FLOOR_E4M3)
    spread = scales.repeat_interleave(group, -1)[..., : x.shape[-1]]
    values = E4M3[codes] * spread * torch.where(torch.signbit(x), -1.0, 1.0)
    return values.masked_fill(~torch.cat(whole, -1), math.nan), spread


def row_bytes(x: Tensor, row: RowFormat) -> Tensor:
    """Values [..., width] as stored rows: u8 bytes, or f32 for `wide`."""
    x = x.cpu().double()
    if row.kind == "wide":
        return x.float()
    if row.kind == "key":
        codes, scales = encode(x, 32, E2M1, FLOOR_E2M1)
        codes = codes + 8 * torch.signbit(x)
        return torch.cat((codes[..., 0::2] + 16 * codes[..., 1::2], _power(scales)), -1).byte()
    plain = x[..., : row.width - row.rope]
    codes, scales = encode(plain, 64, E4M3, FLOOR_E4M3)
    rope = x[..., row.width - row.rope :].bfloat16().contiguous().view(torch.uint8)
    parts = [codes + 128 * torch.signbit(plain), rope.long(), _power(scales)]
    used = sum(part.shape[-1] for part in parts)
    padding = torch.zeros((*x.shape[:-1], -used % 8), dtype=torch.int64)
    return torch.cat((*parts, padding), -1).byte()


def row_values(rows: Tensor, row: RowFormat) -> Tensor:
    """Stored rows [..., row] as values f64 [..., width]."""
    rows = rows.cpu()
    if row.kind == "wide":
        return rows.double()
    if row.kind == "key":
        packed = rows[..., : row.width // 2].long()
        codes = torch.stack((packed % 16, packed // 16), -1).flatten(-2)
        scales, group = rows[..., row.width // 2 :], 32
        values = E2M1[codes % 8] * torch.where(codes >= 8, -1.0, 1.0)
        return values * _scales(scales, group, row.width)
    plain = row.width - row.rope
    values = rows[..., :plain].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[..., plain + 2 * row.rope :][..., : -(-plain // 64)]
    rope = rows[..., plain : plain + 2 * row.rope].clone().view(torch.bfloat16).double()
    return torch.cat((values * _scales(scales, 64, plain), rope), -1)


def weight_values(weight: Weight) -> Tensor:
    """A stored weight as f64 [N, K]."""
    data = weight.data.cpu()
    if weight.scale is None:
        return data.double()
    scale = weight.scale.cpu().view(torch.uint8)
    if data.dtype is torch.int8:
        return row_values(
            torch.cat((data.view(torch.uint8), scale), -1),
            RowFormat("key", 2 * data.shape[1], 0),
        )
    rows, width = data.shape
    return data.double() * _scales(scale, 128, width).repeat_interleave(128, 0)[:rows]


def _power(scales: Tensor) -> Tensor:
    return torch.log2(scales).long() + 127


def _scales(codes: Tensor, group: int, width: int) -> Tensor:
    """e8m0 codes [..., groups] as f64 [..., width]; code 255 is NaN."""
    scales = torch.ldexp(torch.ones_like(codes, dtype=torch.float64), codes.int() - 127)
    scales = scales.masked_fill(codes == 255, torch.nan)
    return scales.repeat_interleave(group, -1)[..., :width]


# Linears, norms, rotation.


def matmul(x: Tensor, weight: Weight, round_input: bool) -> Exact:
    """x W^T, after x in e4m3 groups of 128 where asked."""
    x, w = x.cpu().double(), weight_values(weight)
    if round_input:
        x, _ = round_fp8(x, 128)
    return Exact(x @ w.T, x.abs() @ w.abs().T)


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Exact:
    """y[t, g, n] = sum over i of x[t, g, i] w[g, n, i]."""
    x = x_TGI.cpu().double()
    w = weight_values(weight).unflatten(0, (x.shape[1], -1))
    rule = "tgi,gni->tgn"
    return Exact(torch.einsum(rule, x, w), torch.einsum(rule, x.abs(), w.abs()))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Exact:
    """x / sqrt(mean(x^2) + eps) * weight."""
    x = x.cpu().double()
    out = x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        out = out * weight.cpu().double()
    return Exact(out, out.abs())


def rotate(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Exact:
    """Pairs of the last R dims as complex numbers, times e^(i angle).

    The angle is the product rounded to f32, as the released code has it: at a million tokens this
    is no rounding error but part of the definition.
    """
    x = x.cpu().double()
    angle = (position.float().cpu()[:, None] * frequency.cpu()).double()
    angle = -angle if inverse else angle
    if x.dim() == 3:
        angle = angle[:, None]
    split = x.shape[-1] - 2 * frequency.numel()
    pairs = torch.view_as_complex(x[..., split:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    size = pairs.abs().repeat_interleave(2, -1)
    plain = x[..., :split]
    return Exact(torch.cat((plain, turned), -1), torch.cat((plain.abs(), size), -1))


def norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Exact:
    """rms_norm, then rotate."""
    return rotate(rms_norm(x, weight, eps).want, position, frequency, False)


def hadamard(x: Tensor) -> Exact:
    """x times the Sylvester matrix H[i, j] = (-1)^popcount(i & j), over sqrt(width)."""
    x, width = x.cpu().double(), x.shape[-1]
    sign = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(width)] for i in range(width)]
    out = x @ torch.tensor(sign, dtype=torch.float64) / width**0.5
    return Exact(out, (x.abs().sum(-1, keepdim=True) / width**0.5).expand_as(out))


# Sequences.


def tokens(spans: Spans) -> Iterator[tuple[int, int, int]]:
    """(packed token, sequence, absolute position), one after another."""
    for b, (start, count) in enumerate(zip(spans.start, spans.count, strict=True)):
        for i in range(count):
            yield spans.offset[b] + i, b, start + i


def window_write(ring: Tensor, rows_T: Tensor, spans: Spans) -> Tensor:
    """The ring afterwards, token by token."""
    ring = ring.cpu().clone()
    for t, b, position in tokens(spans):
        ring[spans.slot[b], position % ring.shape[1]] = rows_T[t].cpu()
    return ring


def page_write(pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> Tensor:
    """The pool afterwards, entry by entry."""
    rows, table, e = pool.rows.cpu().clone(), spans.table_BP.cpu(), 0
    for _, b, position in tokens(spans):
        if (position + 1) % ratio == 0:
            page, row = divmod(position // ratio, pool.per_page)
            rows[table[b, page], row] = rows_E[e].cpu()
            e += 1
    return rows


def compress(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Exact:
    """Softmax-weighted sums over blocks; with ratio 4, over the block before as well."""
    rows, tail, ape = rows_T2W.cpu().double(), tail.cpu().double(), ape.cpu().double()
    width = ape.shape[1] // 2 if ratio == 4 else ape.shape[1]
    want, size = [], []
    for t, b, position in tokens(spans):
        if (position + 1) % ratio:
            continue
        values, gates = [], []
        for back in range(2 * ratio if ratio == 4 else ratio):
            p, own = position - back, back < ratio
            if p < 0:
                continue
            row = rows[t - back] if p >= spans.start[b] else tail[spans.slot[b], p % tail.shape[1]]
            series = slice(width, None) if own and ratio == 4 else slice(0, width)
            values.append(row[0, series])
            gates.append(row[1, series] + ape[p % ratio, series])
        gate, value = torch.stack(gates), torch.stack(values)
        share = gate.softmax(0)
        want.append((share * value).sum(0))
        size.append((share * value.abs()).sum(0) * (1 + gate.abs().amax(0)))
    if not want:
        return Exact(rows.new_zeros((0, width)), rows.new_zeros((0, width)))
    return Exact(torch.stack(want), torch.stack(size))


def entry_values(pool: Pool, ratio: int, spans: Spans) -> list[Tensor]:
    """Per sequence, f64 [entries completed by the end of this step, width]."""
    rows, table, found = pool.rows.cpu(), spans.table_BP.cpu(), []
    for b, (_, last) in enumerate(spans.emitted(ratio)):
        number = torch.arange(last)
        pages = table[b, number // pool.per_page]
        found.append(row_values(rows[pages, number % pool.per_page], pool.format))
    return found


def index_scores(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans
) -> tuple[list[Tensor], list[Tensor]]:
    """Per token: scores f64 of its visible entries (report eq. 16), and the size of each."""
    query, weight = row_values(q_TI, keys.format), weight_TI.cpu().double()
    stored, scores, sizes = entry_values(keys, ratio, spans), [], []
    for t, b, position in tokens(spans):
        key = stored[b][: (position + 1) // ratio]
        scores.append(weight[t] @ (query[t] @ key.T).relu())
        sizes.append(weight[t].abs() @ (query[t].abs() @ key.abs().T))
    return scores, sizes


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
) -> tuple[Exact, Exact]:
    """One softmax for each token over the rows it sees and the sink (eq. 27)."""
    q, sink = q_THK.cpu().double(), sink_H.cpu().double()
    fresh, old = row_values(fresh_T, ring.format), row_values(ring.rows, ring.format)
    stored = entry_values(entries, ratio, spans) if entries is not None else []
    parts = []
    for t, b, position in tokens(spans):
        first, start = max(0, position - window + 1), spans.start[b]
        before = torch.arange(min(first, start), start) % ring.per_page
        begin = t - (position - max(first, start))
        rows = [old[spans.slot[b], before], fresh[begin : t + 1]]
        if stored and chosen_Tk is not None:
            chosen = chosen_Tk[t].cpu()
            rows.append(stored[b][chosen[chosen >= 0]])
        elif stored:
            rows.append(stored[b][: (position + 1) // ratio])
        parts.append(_attend_rows(q[t], torch.cat(rows), sink, scale))
    want, size, log, log_size = (torch.stack(part) for part in zip(*parts, strict=True))
    underflow = torch.full_like(want, torch.finfo(torch.float32).tiny)
    return Exact(want, size, underflow), Exact(log, log_size)


def _attend_rows(
    q_HK: Tensor, rows_NK: Tensor, sink_H: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score = q_HK @ rows_NK.T * scale
    doubt = 1 + (q_HK.abs() @ rows_NK.abs().T * scale).amax(-1)  # an error in a score is a factor
    share = torch.cat((score, sink_H[:, None]), -1).softmax(-1)[:, :-1]
    log = torch.logsumexp(torch.cat((score, sink_H[:, None]), -1), -1)
    return share @ rows_NK, share @ rows_NK.abs() * doubt[:, None], log, doubt + sink_H.abs()


# Experts and streams.


def affinity(x: Tensor, weight: Tensor) -> Exact:
    """sqrt(softplus(x W^T)) f64 [T, E]."""
    logits = matmul(x, Weight(weight), False)
    want = torch.logaddexp(logits.want, torch.zeros(())).sqrt()
    return Exact(want, want * (1 + logits.size))


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
    doubt: float,
) -> Exact:
    """Sum over the chosen experts. `doubt`: relative error allowed before the inner rounding."""
    want = torch.zeros(x_TD.shape, dtype=torch.float64)
    size, slack = torch.zeros_like(want), torch.zeros_like(want)
    ids, weight = ids_TX.cpu(), weight_TX.cpu().double()
    for e in range(len(experts.w1)):
        t, x = (ids == e).nonzero(as_tuple=True)
        if not t.numel():
            continue
        rows = x_TD.cpu()[t]
        gate, up = (
            matmul(rows, experts.w1[e], round_input),
            matmul(rows, experts.w3[e], round_input),
        )
        g, u, share = gate.want.clamp(max=limit), up.want.clamp(-limit, limit), weight[t, x, None]
        silu = g * torch.sigmoid(g)
        hidden = silu * u * share
        # |silu'| <= 1.1; errors of both products reach the hidden values.
        reach = share.abs() * (1.1 * gate.size * u.abs() + silu.abs() * up.size) + hidden.abs()
        w = weight_values(experts.w2[e])
        if round_input:
            sign = torch.where(torch.signbit(hidden), -1.0, 1.0)
            high, scale_high = round_fp8(hidden + sign * doubt * reach, 128)
            low, scale_low = round_fp8((hidden.abs() - doubt * reach).clamp(min=0) * sign, 128)
            jump = (high - low).abs() + (scale_high != scale_low) * hidden.abs() / 8
            slack.index_add_(0, t, jump @ w.abs().T)
            broken = hidden.isnan()
            hidden = round_fp8(hidden, 128)[0].masked_fill(broken, torch.nan)
        want.index_add_(0, t, hidden @ w.T)
        size.index_add_(0, t, reach @ w.abs().T)
    return Exact(want, size, slack if round_input else None)


def hc_pre(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Exact, Exact, Exact]:
    """Gates and the doubly stochastic mix of every token (eqs 3-8, epsilons as released)."""
    x, m = x_TMD.cpu().double(), x_TMD.shape[1]
    flat = rms_norm(x.flatten(1), None, norm_eps)
    alpha = scale.cpu().double()[torch.tensor([0] * m + [1] * m + [2] * m * m)]
    product = matmul(flat.want, Weight(fn), False)
    logits = product.want * alpha + base.cpu().double()
    doubt = 1 + (product.size * alpha.abs() + base.cpu().double().abs()).amax(-1)[:, None]
    pre = torch.sigmoid(logits[:, :m]) + eps
    post = 2 * torch.sigmoid(logits[:, m : 2 * m])
    comb = logits[:, 2 * m :].unflatten(1, (m, m)).softmax(-1) + eps
    for number in range(iterations):
        if number:
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    y = torch.einsum("tm,tmd->td", pre, x)
    y_size = torch.einsum("tm,tmd->td", pre, x.abs()) * doubt
    # A gate that is nearly shut may be below what f32 holds, and be 0 then.
    shut = torch.full_like(post, torch.finfo(torch.float32).tiny)
    return Exact(y, y_size), Exact(post, post * doubt, shut), Exact(comb, comb * doubt[..., None])


def hc_head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Exact:
    """Sum over streams of (sigmoid(norm(x) fn * scale + base) + eps) x."""
    x = x_TMD.cpu().double()
    flat = rms_norm(x.flatten(1), None, norm_eps)
    product, alpha = matmul(flat.want, Weight(fn), False), scale.cpu().double()
    logits = product.want * alpha + base.cpu().double()
    doubt = 1 + (product.size * alpha.abs() + base.cpu().double().abs()).amax(-1)[:, None]
    gate = torch.sigmoid(logits) + eps
    return Exact(
        torch.einsum("tm,tmd->td", gate, x), torch.einsum("tm,tmd->td", gate, x.abs()) * doubt
    )


def hc_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Exact:
    """x_new[t, k] = post[t, k] y[t] + sum over j of comb[t, j, k] x[t, j]."""
    y, x, post, comb = (a.cpu().double() for a in (y_TD, x_TMD, post_TM, comb_TMM))
    rule = "tjk,tjd->tkd"
    want = post[..., None] * y[:, None] + torch.einsum(rule, comb, x)
    size = (post[..., None] * y[:, None]).abs() + torch.einsum(rule, comb.abs(), x.abs())
    return Exact(want, size)
