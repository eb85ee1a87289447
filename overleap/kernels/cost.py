"""Bytes that a call of an op must move, and operations it must count: one function for each op.

The least that any implementation can do: every input that counts is read once, every result written
once, whatever a cache holds. Not here: how fast a machine is (conformance/ceilings.py).
Read next: spec.py (the arguments), conformance/run.py (who divides by time).

An operation is an addition, a multiplication, a comparison or a function of one value; a
multiply-add is two.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, entry_bytes, key_bytes
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Choice, Experts, Joint, Pool, RowFormat, Weight

Unit = Literal["f32", "bf16", "int8"]


@dataclass(frozen=True)
class Cost:
    """Of one call.

    unit  in which numbers its products may be taken without a loss: says which ceiling holds
    """

    bytes: int
    operations: int
    unit: Unit = "f32"


def cost(op: str, args: Sequence[Any]) -> Cost:
    """Of a call of the op with these positional arguments."""
    found: Cost = COSTS[op](*args)
    return found


def nbytes(*things: Tensor | Weight | None) -> int:
    """Bytes of tensors and stored weights."""
    total = 0
    for thing in things:
        if isinstance(thing, Weight):
            total += nbytes(thing.data, thing.scale)
        elif thing is not None:
            total += thing.nbytes
    return total


def _unit(x: Tensor, weight: Weight, rounded: bool) -> Unit:
    """e4m3 and e2m1 values are exact in bf16; f32 on either side asks for f32."""
    if weight.data.dtype is torch.float32 or (x.dtype is torch.float32 and not rounded):
        return "f32"
    return "bf16"


def matmul(x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Cost:
    """The weight once, x and the result once; 2 T N K."""
    out = x.shape[0] * weight.data.shape[0]
    size = 4 if wide else x.itemsize
    return Cost(nbytes(x, weight) + size * out, 2 * out * x.shape[1], _unit(x, weight, round_input))


def grouped_matmul(x_TGI: Tensor, weight: Weight) -> Cost:
    """As matmul; every output has the I inputs of its group."""
    out = x_TGI.shape[0] * weight.data.shape[0]
    moved = nbytes(x_TGI, weight) + x_TGI.itemsize * out
    return Cost(moved, 2 * out * x_TGI.shape[2], _unit(x_TGI, weight, False))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Cost:
    """x, and the result; two for the square, one or two to scale."""
    return Cost(2 * nbytes(x) + nbytes(weight), x.numel() * (3 + (weight is not None)))


def rotate(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Cost:
    """x, and the result; six for each pair."""
    rows = x.numel() // max(1, x.shape[-1])
    return Cost(2 * nbytes(x) + nbytes(position, frequency), 6 * rows * frequency.numel())


def norm_rope(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Cost:
    """Both, but x is read and written once."""
    norm, turn = rms_norm(x, weight, eps), rotate(x, position, frequency, False)
    return Cost(norm.bytes + nbytes(position, frequency), norm.operations + turn.operations)


def hadamard(x: Tensor) -> Cost:
    """log2(width) additions for each value, and the scale."""
    return Cost(2 * nbytes(x), x.numel() * x.shape[-1].bit_length())


def row_bytes(row: RowFormat) -> int:
    """Bytes of a stored row."""
    form = CacheFormat.WIDE if row.kind == "wide" else CacheFormat.RELEASE
    if row.kind == "key":
        return key_bytes(row.width, form)
    return entry_bytes(row.width, row.rope, form)


def quantize(x: Tensor, row: RowFormat) -> Cost:
    """Values in, rows out; the largest, the scale, the product, the rounding."""
    rows = x.numel() // row.width
    return Cost(nbytes(x) + rows * row_bytes(row), 4 * x.numel() * (row.kind != "wide"))


def window_write(ring: Tensor, rows_T: Tensor, spans: Spans) -> Cost:
    """Rows that survive, read and written."""
    kept = sum(min(count, ring.shape[1]) for count in spans.count)
    return Cost(2 * kept * nbytes(rows_T) // max(1, rows_T.shape[0]), 0)


def page_write(pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> Cost:
    """Rows, read and written."""
    return Cost(2 * nbytes(rows_E), 0)


def compress(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Cost:
    """New rows, earlier rows of the blocks that end, entries; five for each value pooled."""
    overlap, width = ratio == 4, ape.shape[1]
    entries = earlier = 0
    for start, (first, last) in zip(spans.start, spans.emitted(ratio), strict=True):
        entries += last - first
        if last > first:
            earlier += start - max(0, (first - overlap) * ratio)
    channels = width // 2 if overlap else width
    pooled = entries * channels * ratio * (1 + overlap)
    moved = nbytes(rows_T2W, ape) + earlier * 8 * width + 4 * entries * channels
    return Cost(moved, 5 * pooled)


def index_topk(
    q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
) -> Cost:
    """Every visible key once for a sequence; 2 J + 3 for each key, head and token."""
    read = sum(last for _, last in spans.emitted(ratio)) * row_bytes(keys.format)
    seen = int(((spans.position_T + 1) // ratio).sum())
    tokens, heads = weight_TI.shape
    moved = nbytes(q_TI, weight_TI) + read + 8 * tokens * k
    unit: Unit = "int8" if keys.format.kind == "key" else "f32"
    return Cost(moved, seen * heads * (2 * keys.format.width + 3), unit)


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
) -> Cost:
    """Every row that some token sees once for a sequence; 4 K + 2 for each row, head and token."""
    tokens, heads, width = q_THK.shape
    before = sum(min(start, window - 1) for start in spans.start)
    seen = int((spans.position_T + 1).clamp(max=window).sum())
    moved = 2 * nbytes(q_THK) + 4 * tokens * heads + nbytes(fresh_T, sink_H)
    moved += before * row_bytes(ring.format)
    if entries is not None and chosen_Tk is not None:
        seen += int((chosen_Tk >= 0).sum())
        parts = zip(spans.offset[:-1], spans.offset[1:], strict=True)
        distinct = sum(_distinct(chosen_Tk[first:end]) for first, end in parts)
        moved += nbytes(chosen_Tk) + distinct * row_bytes(entries.format)
    elif entries is not None:
        seen += int(((spans.position_T + 1) // ratio).sum())
        last = sum(last for _, last in spans.emitted(ratio))
        moved += last * row_bytes(entries.format)
    unit: Unit = "bf16" if q_THK.dtype is torch.bfloat16 else "f32"
    return Cost(moved, seen * heads * (4 * width + 2), unit)


def _distinct(chosen: Tensor) -> int:
    return len(chosen[chosen >= 0].unique())


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed_TX: Tensor | None,
    k: int,
    scale: float,
) -> Cost:
    """A product with every expert's row, its affinity, and the choice."""
    tokens, experts = x.shape[0], weight.shape[0]
    chosen = k if fixed_TX is None else fixed_TX.shape[1]
    moved = nbytes(x, weight, bias) + 12 * tokens * chosen
    operations = 2 * tokens * experts * x.shape[1] + 3 * tokens * experts
    return Cost(moved, operations, _unit(x, Weight(weight), False))


def experts(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    experts: Experts,
    limit: float,
    round_input: bool,
) -> Cost:
    """The weights of experts that some token chose, once; three products for each choice."""
    chosen = ids_TX.unique().tolist()
    weights = sum(nbytes(w[e]) for w in (experts.w1, experts.w2, experts.w3) for e in chosen)
    first = experts.w1[0]
    inner, width = first.data.shape[0], x_TD.shape[1]
    moved = 2 * nbytes(x_TD) + nbytes(ids_TX, weight_TX) + weights
    operations = ids_TX.numel() * inner * (6 * width + 5)
    return Cost(moved, operations, _unit(x_TD, first, round_input))


def hc_pre(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> Cost:
    """The streams once, one stream and the gates; the product with fn, the norm, Sinkhorn."""
    tokens, streams, width = x_TMD.shape
    gates = streams + streams**2
    values = tokens * streams * width
    moved = nbytes(x_TMD, fn, base, scale) + tokens * (width * x_TMD.itemsize + 4 * gates)
    mixing = tokens * 4 * iterations * streams**2
    return Cost(moved, values * (2 * fn.shape[0] + 4) + mixing)


def hc_head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Cost:
    """As hc_pre, without gates for the way back."""
    tokens, _, width = x_TMD.shape
    moved = nbytes(x_TMD, fn, base, scale) + tokens * width * x_TMD.itemsize
    return Cost(moved, x_TMD.numel() * (2 * fn.shape[0] + 4))


def hc_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Cost:
    """The streams in and out; a multiply-add for each stream and y."""
    moved = nbytes(y_TD, post_TM, comb_TMM) + 2 * nbytes(x_TMD)
    return Cost(moved, x_TMD.numel() * (2 * x_TMD.shape[1] + 1))


def sample(
    logits_YV: Tensor, choices: Sequence[Choice], allowed_YB: Tensor | None, best: int | None
) -> Cost:
    """The logits once; a comparison each, and three for each probability that is needed."""
    rows, vocabulary = logits_YV.shape
    passes = sum(choice.temperature > 0 for choice in choices) + rows * (best is not None)
    out = rows * (8 if best is None else 16 * (1 + best))
    return Cost(nbytes(logits_YV, allowed_YB) + out, vocabulary * (rows + 3 * passes))


def orthogonalise(matrix: Tensor) -> Cost:
    """In and out; three products for each of ten steps."""
    short, long = sorted(matrix.shape[-2:])
    batch = matrix[..., :1, :1].numel()
    operations = 10 * batch * (4 * short**2 * long + 2 * short**3)
    return Cost(matrix.numel() * (matrix.itemsize + 4), operations, "bf16")


# Coarse ops: what lies between the fine ones is neither written nor read.


def project(
    x: Tensor, parts: tuple[Joint, ...], norm: Tensor | None = None, eps: float = 0.0
) -> Cost:
    """x once, all weights, all results."""
    bytes_, operations = nbytes(x, norm), 0 if norm is None else 4 * x.numel()
    for part in parts:
        bytes_ += nbytes(*part.weights)
        bytes_ += x.shape[0] * part.outputs * (4 if part.wide else x.itemsize)
        operations += 2 * x.numel() * part.outputs
    first = parts[0]
    return Cost(bytes_, operations, _unit(x, first.weights[0], first.round_input))


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
) -> Cost:
    """Both projections, the norms and the rotation; the latent and the row stay inside."""
    latent_TQ = x_TD.new_empty((x_TD.shape[0], of_input[0].outputs))
    kv_TK = x_TD.new_empty((x_TD.shape[0], row.width))
    q_THK = x_TD.new_empty((x_TD.shape[0], heads, row.width))
    first, second = project(x_TD, of_input), project(latent_TQ, of_latent, q_norm, eps)
    turned = norm_rope(q_THK, None, eps, position_T, frequency)
    packed = norm_rope_quantize(kv_TK, kv_norm, eps, position_T, frequency, False, row)
    parts = first, second, turned, packed
    inside = 2 * nbytes(latent_TQ) + 2 * nbytes(kv_TK) + 2 * nbytes(q_THK)
    moved = sum(part.bytes for part in parts) - inside
    return Cost(moved, sum(part.operations for part in parts), first.unit)


def project_back(o_TGI: Tensor, inner: Weight, outer: Joint) -> Cost:
    """Both products."""
    (weight,) = outer.weights
    latent = o_TGI.shape[0] * inner.data.shape[0]
    out = o_TGI.shape[0] * outer.outputs
    moved = nbytes(o_TGI, inner, weight) + out * (4 if outer.wide else o_TGI.itemsize)
    operations = 2 * latent * (o_TGI.shape[2] + outer.outputs)
    return Cost(moved, operations, _unit(o_TGI, inner, False))


def norm_rope_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    position: Tensor,
    frequency: Tensor,
    mixed: bool,
    row: RowFormat,
) -> Cost:
    """Values in, rows out."""
    stored, turn = quantize(x, row), rotate(x, position, frequency, False)
    operations = stored.operations + turn.operations
    if eps is not None:
        operations += rms_norm(x, weight, eps).operations
    if mixed:
        operations += hadamard(x).operations
    return Cost(stored.bytes + nbytes(weight, position, frequency), operations)


def compress_write(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Cost:
    """As compress, and the tail's rows written."""
    pooled = compress(rows_T2W, tail, ape, ratio, spans)
    return Cost(pooled.bytes + window_write(tail, rows_T2W, spans).bytes // 2, pooled.operations)


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
    frequency: Tensor,
) -> Cost:
    """As attend, and the ring's rows written."""
    seen = attend(q_THK, fresh_T, ring, entries, chosen_Tk, ratio, sink_H, scale, window, spans)
    written = window_write(ring.rows, fresh_T, spans).bytes // 2
    turn = rotate(q_THK, spans.position_T, frequency, True).operations
    return Cost(seen.bytes + written + nbytes(frequency), seen.operations + turn, seen.unit)


def mixture(
    x_TD: Tensor,
    ids_TX: Tensor,
    weight_TX: Tensor,
    routed: Experts,
    shared: Experts,
    limit: float,
) -> Cost:
    """As experts, and the shared ones for every token."""
    chosen = experts(x_TD, ids_TX, weight_TX, routed, limit, routed.w1[0].packed)
    always = sum(nbytes(*part) for part in (shared.w1, shared.w2, shared.w3))
    inner = sum(w.data.shape[0] for w in shared.w1)
    operations = x_TD.shape[0] * inner * (6 * x_TD.shape[1] + 4)
    return Cost(chosen.bytes + always, chosen.operations + operations, chosen.unit)


def hc_pre_norm(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    norm: Tensor,
) -> Cost:
    """As hc_pre, and the norm of its y."""
    made = hc_pre(x_TMD, fn, base, scale, iterations, eps, norm_eps)
    extra = 4 * x_TMD.shape[0] * x_TMD.shape[2]
    return Cost(made.bytes + nbytes(norm), made.operations + extra)


COSTS: dict[str, Callable[..., Cost]] = {
    "matmul": matmul,
    "grouped_matmul": grouped_matmul,
    "rms_norm": rms_norm,
    "norm_rope": norm_rope,
    "rotate": rotate,
    "hadamard": hadamard,
    "quantize": quantize,
    "window_write": window_write,
    "page_write": page_write,
    "compress": compress,
    "index_topk": index_topk,
    "attend": attend,
    "route": route,
    "experts": experts,
    "hc_pre": hc_pre,
    "hc_head": hc_head,
    "hc_post": hc_post,
    "sample": sample,
    "orthogonalise": orthogonalise,
    "project": project,
    "attention_inputs": attention_inputs,
    "project_back": project_back,
    "norm_rope_quantize": norm_rope_quantize,
    "compress_write": compress_write,
    "attend_write": attend_write,
    "mixture": mixture,
    "hc_pre_norm": hc_pre_norm,
}
