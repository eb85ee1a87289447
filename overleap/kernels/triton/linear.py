"""Products with stored weights: matmul, grouped_matmul, experts, route.

A weight is decoded in the tile that needs it; what is read from memory are its packed bytes.
Not here: number formats (formats.py).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from overleap.kernels.spec import Experts, Weight
from overleap.kernels.triton.formats import narrow, round_e4m3, times, weight_tile, wide
from overleap.kernels.triton.tuning import Tuning, tuning

FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}
DEPTH = 128  # inputs taken at a time: the group that shares a scale when they are rounded


def bits(x: Tensor) -> Tensor:
    """The same memory in a type that every chip has: bf16 as i16, packed bytes as u8."""
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16)
    return x if x.dtype.itemsize > 1 else x.view(torch.uint8)


def stored(weight: Weight) -> tuple[Tensor, Tensor, int]:
    """Bytes of the data, of the scale, and the form. Plain weights have no scale to point at."""
    data = bits(weight.data)
    return data, data if weight.scale is None else bits(weight.scale), FORMS[weight.data.dtype]


def multiplies_bf16(sizes: Tuning, x: Tensor, weight: Weight, rounded: bool) -> bool:
    """Whether no factor loses anything as bf16, and the chip multiplies those."""
    exact = x.dtype is torch.bfloat16 or rounded
    return sizes.bf16 and exact and weight.data.dtype is not torch.float32


@triton.jit
def product(
    x, data, scale, out, T, G, N, K,
    FORM: tl.constexpr, X: tl.constexpr, O: tl.constexpr, ROUND: tl.constexpr, BF16: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [T, G, N] = x [T, G, K] times weight [G * N, K] transposed, group by group."""
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.program_id(2)
    row = tl.where(n < N, g * N + n, G * N)  # beyond a group's last output: beyond the weight
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    for low in range(0, K, BK):
        k = low + tl.arange(0, BK)
        there = (t < T)[:, None] & (k < K)[None, :]
        value = wide(tl.load(x + (t * G + g)[:, None] * K + k[None, :], mask=there, other=0), X)
        if ROUND:
            value = round_e4m3(value)
        w = weight_tile(data, scale, row, k, G * N, K, FORM)
        acc = times(value, tl.trans(w), acc, BF16)
    there = (t < T)[:, None] & (n < N)[None, :]
    tl.store(out + (t * G + g)[:, None] * N + n[None, :], narrow(acc, O), mask=there)


def _product(x_TGK: Tensor, weight: Weight, rounds: bool, dtype: torch.dtype) -> Tensor:
    tokens, groups, inputs = x_TGK.shape
    outputs = weight.data.shape[0] // groups
    out = torch.empty((tokens, groups, outputs), dtype=dtype, device=x_TGK.device)
    if not tokens:
        return out
    sizes, x = tuning(x_TGK.device), x_TGK.contiguous()
    few = tokens <= sizes.few
    rows, columns = (16, sizes.outputs_few) if few else (sizes.tokens, sizes.outputs_many)
    data, scale, form = stored(weight)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(outputs, columns), groups)
    product[grid](
        bits(x), data, scale, bits(out), tokens, groups, outputs, inputs,
        FORM=form, X=FORMS[x.dtype], O=FORMS[dtype], ROUND=rounds,
        BF16=multiplies_bf16(sizes, x, weight, rounds), BT=rows, BN=columns, BK=DEPTH,
    )  # fmt: skip
    return out


def matmul(x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
    """See spec.Ops.matmul."""
    return _product(x[:, None], weight, round_input, torch.float32 if wide else x.dtype)[:, 0]


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Tensor:
    """See spec.Ops.grouped_matmul."""
    return _product(x_TGI, weight, False, x_TGI.dtype)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed_TX: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.route. The product is ours; torch sorts a few hundred numbers a token."""
    affinity = F.softplus(matmul(x, Weight(weight), False, wide=True)).sqrt()
    if fixed_TX is None:
        ranked = affinity if bias is None else affinity + bias
        ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :k]
    else:
        ids = fixed_TX
    chosen = affinity.gather(1, ids)
    return ids, chosen / chosen.sum(-1, keepdim=True) * scale


@triton.jit
def expert_hidden(
    x, addresses, order, share, expert, first, end, hidden, D, F, X, limit,
    FORM: tl.constexpr, XF: tl.constexpr, ROUND: tl.constexpr, BF16: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Weighted hidden values of a block of tokens of one expert, in the order of `order`."""
    block = tl.program_id(0)
    e = tl.load(expert + block)
    place = tl.load(first + block) + tl.arange(0, BT)
    live = place < tl.load(end + block)
    at = tl.load(order + place, mask=live, other=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    gate = tl.zeros((BT, BN), dtype=tl.float32)
    up = tl.zeros((BT, BN), dtype=tl.float32)
    if FORM == 0:
        kind = tl.pointer_type(tl.float32)
    elif FORM == 1:
        kind = tl.pointer_type(tl.int16)
    else:
        kind = tl.pointer_type(tl.uint8)
    w1 = tl.load(addresses + e * 6).to(kind)
    s1 = tl.load(addresses + e * 6 + 1).to(tl.pointer_type(tl.uint8))
    w3 = tl.load(addresses + e * 6 + 4).to(kind)
    s3 = tl.load(addresses + e * 6 + 5).to(tl.pointer_type(tl.uint8))
    for low in range(0, D, BK):
        k = low + tl.arange(0, BK)
        there = live[:, None] & (k < D)[None, :]
        value = wide(tl.load(x + (at // X)[:, None] * D + k[None, :], mask=there, other=0), XF)
        if ROUND:
            value = round_e4m3(value)
        gate = times(value, tl.trans(weight_tile(w1, s1, n, k, F, D, FORM)), gate, BF16)
        up = times(value, tl.trans(weight_tile(w3, s3, n, k, F, D, FORM)), up, BF16)
    # Comparisons, not minimum and maximum: a NaN stays one.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    weight = tl.load(share + at, mask=live, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    there = live[:, None] & (n < F)[None, :]
    tl.store(hidden + place[:, None] * F + n[None, :], narrow(value, XF), mask=there)


@triton.jit
def expert_down(
    hidden, addresses, order, expert, first, end, parts, D, F,
    FORM: tl.constexpr, XF: tl.constexpr, ROUND: tl.constexpr, BF16: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w2 of the hidden values, each to its own place: f32 [T * X, D]."""
    block = tl.program_id(0)
    e = tl.load(expert + block)
    place = tl.load(first + block) + tl.arange(0, BT)
    live = place < tl.load(end + block)
    at = tl.load(order + place, mask=live, other=0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
    if FORM == 0:
        kind = tl.pointer_type(tl.float32)
    elif FORM == 1:
        kind = tl.pointer_type(tl.int16)
    else:
        kind = tl.pointer_type(tl.uint8)
    w2 = tl.load(addresses + e * 6 + 2).to(kind)
    s2 = tl.load(addresses + e * 6 + 3).to(tl.pointer_type(tl.uint8))
    for low in range(0, F, BK):
        k = low + tl.arange(0, BK)
        there = live[:, None] & (k < F)[None, :]
        value = wide(tl.load(hidden + place[:, None] * F + k[None, :], mask=there, other=0), XF)
        if ROUND:
            value = round_e4m3(value)
        acc = times(value, tl.trans(weight_tile(w2, s2, n, k, D, F, FORM)), acc, BF16)
    there = live[:, None] & (n < D)[None, :]
    tl.store(parts + at[:, None] * D + n[None, :], acc, mask=there)


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
) -> Tensor:
    """See spec.Ops.experts. Nothing waits for the host: the grid is the largest there can be."""
    (tokens, width), slots, count = x_TD.shape, ids_TX.shape[1], len(experts.w1)
    if not tokens or not slots:
        return torch.zeros_like(x_TD)
    sizes, x, one = tuning(x_TD.device), x_TD.contiguous(), experts.w1[0]
    inner, form, device = one.data.shape[0], FORMS[one.data.dtype], x_TD.device
    pairs = tokens * slots
    few = pairs <= sizes.few * min(count, pairs)  # so many rows an expert, or fewer
    rows, columns = (16, sizes.outputs_few) if few else (sizes.tokens, sizes.outputs_many)
    order, plan = _blocks(ids_TX, count, rows)
    hidden = torch.empty((pairs, inner), dtype=x.dtype, device=device)
    parts = torch.empty((pairs, width), dtype=torch.float32, device=device)
    shape = {
        "FORM": form, "XF": FORMS[x.dtype], "ROUND": round_input,
        "BF16": multiplies_bf16(sizes, x, one, round_input), "BT": rows, "BN": columns, "BK": DEPTH,
    }  # fmt: skip
    blocks, addresses = plan[0].shape[0], experts.addresses
    expert_hidden[(blocks, triton.cdiv(inner, columns))](
        bits(x), addresses, order, weight_TX.contiguous(), *plan, bits(hidden),
        width, inner, slots, limit, **shape,
    )  # fmt: skip
    expert_down[(blocks, triton.cdiv(width, columns))](
        bits(hidden), addresses, order, *plan, parts, width, inner, **shape
    )
    return parts.view(tokens, slots, width).sum(1).to(x_TD.dtype)


def _blocks(ids_TX: Tensor, count: int, rows: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Pairs of token and slot by expert, and blocks of at most `rows` of them: expert, first, end.

    As many blocks as can be needed whatever is chosen; those too many are empty.
    """
    flat = ids_TX.flatten()
    order = torch.sort(flat, stable=True).indices
    counts = torch.zeros(count, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends, needed = counts.cumsum(0), (counts + rows - 1) // rows
    until = needed.cumsum(0)
    number = torch.arange(len(flat) // rows + min(count, len(flat)), device=flat.device)
    expert = torch.searchsorted(until, number, right=True).clamp(max=count - 1)
    first = ends[expert] - counts[expert] + (number - until[expert] + needed[expert]) * rows
    return order, (expert, first, ends[expert])
