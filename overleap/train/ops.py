"""The ops of kernels/spec.py for training on a CPU: bf16 products, compiled element-wise parts.

Not a general backend: every sequence of a step starts at position 0 and has the same length, a
multiple of 128, in a fresh cache, so rings and tails hold nothing yet and pages lie in order.
tests/train/test_ops.py holds it against kernels/torch. Read next: losses.py (who reads `seen`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.kernels.composed import Composed
from overleap.kernels.spec import Experts, Pool, RowFormat, Spans, Weight
from overleap.kernels.torch import hyper, linear, orthogonalise, quant, sample

WINDOW = 128
ROPE_FREE_GROUP = 64


@dataclass
class Seen:
    """What the losses need from one step, in layer order.

    attention  per CSA layer: queries [T, H, K], entries [B, E, K], sinks [H], log denominators
    routing    per routed layer: affinities f32 [T, E], chosen experts i64 [T, X], selection bias
    """

    attention: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    routing: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)


class TrainingOps(Composed):
    """See the file header. `seen` is filled by forward; take() empties it.

    rounding    round cache rows and indexer queries as the release cache does (straight-through)
    key_width   values of an indexer key; any other row is a window row or a main entry
    rope        rotary dims at the end of such a row
    """

    def __init__(
        self, *, key_width: int, rope: int, compiled: bool = True, rounding: bool = False
    ) -> None:
        self.seen = Seen()
        self.rounding, self._key_width, self._rope = rounding, key_width, rope
        wrap: Callable[[Any], Any] = (
            (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        )
        self._norm, self._turn, self._norm_turn = wrap(_norm), wrap(_turn), wrap(_norm_turn)
        self._pre, self._post, self._gated = wrap(_pre), wrap(_post), wrap(_gated)
        self._mix, self._pool = wrap(_mix), wrap(_pool)

    sample = staticmethod(sample.sample)
    orthogonalise = staticmethod(orthogonalise.orthogonalise)

    def take(self) -> Seen:
        """What was seen since the last call."""
        seen, self.seen = self.seen, Seen()
        return seen

    def matmul(self, x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
        """See spec.Ops.matmul; bf16."""
        product = F.linear(x.bfloat16(), weight.data.bfloat16())
        return product.float() if wide else product

    def grouped_matmul(self, x_TGI: Tensor, weight: Weight) -> Tensor:
        """See spec.Ops.grouped_matmul; bf16."""
        w_GNI = weight.data.bfloat16().unflatten(0, (x_TGI.shape[1], -1))
        product = torch.bmm(x_TGI.bfloat16().transpose(0, 1), w_GNI.transpose(1, 2))
        return product.transpose(0, 1)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See spec.Ops.rms_norm; bf16 out."""
        out: Tensor = self._norm(x, weight, eps)
        return out

    def norm_rope(
        self, x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
    ) -> Tensor:
        """See spec.Ops.norm_rope; bf16 out."""
        out: Tensor = self._norm_turn(x, weight, eps, position, frequency)
        return out

    def rotate(self, x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
        """See spec.Ops.rotate."""
        out: Tensor = self._turn(x, position, frequency, inverse)
        return out

    def hadamard(self, x: Tensor) -> Tensor:
        """See spec.Ops.hadamard; as a product with the constant matrix."""
        matrix = linear.hadamard(torch.eye(x.shape[-1]))
        return F.linear(x.bfloat16(), matrix.bfloat16())

    def quantize(self, x: Tensor, row: RowFormat) -> Tensor:
        """Rows of a wide cache, rounded as a release cache would; straight-through gradient."""
        if not self.rounding:
            return x
        with torch.no_grad():
            wide = x.detach().float()
            if row.width == self._key_width:
                rounded = quant.round_fp4(wide)
            else:
                plain = row.width - self._rope
                rounded = wide.clone()
                rounded[..., :plain] = quant.round_fp8(
                    wide[..., :plain].contiguous(), ROPE_FREE_GROUP
                )
        return x + (rounded - wide).to(x.dtype)

    def window_write(self, ring: Tensor, rows_T: Tensor, spans: Spans) -> None:
        """Nothing: a fresh step never reads a ring or a tail."""

    def page_write(self, pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> None:
        """See spec.Ops.page_write; pages of a fresh cache lie in order."""
        assert set(spans.start) == {0} and len(set(spans.count)) == 1
        assert spans.count[0] % WINDOW == 0
        pool.rows.view(-1, pool.rows.shape[-1])[: rows_E.shape[0]].copy_(rows_E)

    def compress(
        self, rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans
    ) -> Tensor:
        """See spec.Ops.compress."""
        out: Tensor = self._pool(rows_T2W, ape, ratio, len(spans.count))
        return out

    def index_topk(
        self, q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
    ) -> Tensor:
        """See spec.Ops.index_topk; ties are not ordered."""
        sequences, length = len(spans.count), spans.count[0]
        with torch.no_grad():
            q = q_TI.bfloat16().unflatten(0, (sequences, length))
            w = weight_TI.unflatten(0, (sequences, length))
            key = keys.rows.view(-1, keys.rows.shape[-1])[: sequences * length // ratio]
            key = key.bfloat16().unflatten(0, (sequences, -1))
            score = torch.zeros(sequences, length, key.shape[1])
            for head in range(q.shape[2]):
                part = torch.bmm(q[:, :, head], key.transpose(1, 2)).relu().float()
                score.addcmul_(part, w[:, :, head, None])
            entry = torch.arange(key.shape[1])
            visible = (torch.arange(length)[:, None] + 1) // ratio
            score.masked_fill_(entry >= visible, -torch.inf)
            best = score.topk(min(k, key.shape[1]), dim=-1, sorted=False)
            return best.indices.masked_fill(best.values == -torch.inf, -1).flatten(0, 1)

    def attend(
        self,
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
        """See spec.Ops.attend; chosen entries are a mask over all of them."""
        sequences, length = len(spans.count), spans.count[0]
        heads, width = q_THK.shape[1:]
        chunks = length // WINDOW
        q = (q_THK * scale).bfloat16()
        near = fresh_T.bfloat16().view(sequences, chunks, WINDOW, width)
        before = F.pad(near[:, :-1], (0, 0, 0, 0, 1, 0))
        near = torch.cat((before, near), dim=2).flatten(0, 1)
        q_near = q.view(sequences * chunks, WINDOW * heads, width)
        score = torch.bmm(q_near, near.transpose(1, 2))
        far, far_score, hidden = None, None, None
        if entries is not None:
            count = sequences * length // ratio
            rows = entries.rows.view(-1, width)[:count].view(sequences, -1, width)
            far = rows.bfloat16()
            far_score = torch.bmm(q.view(sequences, length * heads, width), far.transpose(1, 2))
            if chosen_Tk is not None:
                hidden = torch.ones(sequences * length, far.shape[1] + 1, dtype=torch.bool)
                hidden.scatter_(1, chosen_Tk.masked_fill(chosen_Tk < 0, far.shape[1]), False)
                hidden = hidden[:, :-1].contiguous()
        p_near, p_far, lse = self._mix(
            score, far_score, hidden, sink_H, sequences, length, heads, ratio
        )
        out = torch.bmm(p_near, near).view(-1, heads, width)
        if far is not None:
            out = out + torch.bmm(p_far, far).view(-1, heads, width)
        if ratio == 4 and entries is not None:
            self.seen.attention.append((q_THK, rows, sink_H, lse))
        return out, lse

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed_TX: Tensor | None,
        k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """See spec.Ops.route."""
        affinity = F.softplus(F.linear(x.float(), weight)).sqrt()
        if fixed_TX is None:
            ranked = affinity.detach() if bias is None else affinity.detach() + bias
            ids = ranked.topk(k, dim=-1).indices
            self.seen.routing.append((affinity, ids, bias))
        else:
            ids = fixed_TX
        chosen = affinity.gather(1, ids)
        return ids, chosen / chosen.sum(-1, keepdim=True) * scale

    def experts(
        self,
        x_TD: Tensor,
        ids_TX: Tensor,
        weight_TX: Tensor,
        experts: Experts,
        limit: float,
        round_input: bool,
    ) -> Tensor:
        """See spec.Ops.experts; rows sorted by expert, one product an expert."""
        flat = ids_TX.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(experts.w1)).tolist()
        token = order // ids_TX.shape[1]
        pairs = zip(experts.w1, experts.w3, strict=True)
        both = [torch.cat((gate.data, up.data)).bfloat16() for gate, up in pairs]
        rows = x_TD.bfloat16()[token].split(counts)
        wide = torch.cat([F.linear(x, w) for x, w in zip(rows, both, strict=True)])
        hidden = self._gated(wide, weight_TX.flatten()[order], limit).split(counts)
        down = [F.linear(x, w.data.bfloat16()) for x, w in zip(hidden, experts.w2, strict=True)]
        out = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
        return out.index_add(0, token, torch.cat(down).float())

    def hc_pre(
        self,
        x_TMD: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iterations: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See spec.Ops.hc_pre."""
        streams = x_TMD.shape[1]
        x_TMD = x_TMD.float()
        mix = F.linear(x_TMD.flatten(1), fn)
        y, post, comb = self._pre(x_TMD, mix, base, scale, eps, norm_eps)
        return y, post, balanced(comb.t().reshape(streams, streams, -1), iterations, eps)

    def hc_head(
        self, x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        """See spec.Ops.hc_head."""
        return hyper.hc_head(x_TMD, fn, base, scale, eps, norm_eps)

    def hc_post(self, y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
        """See spec.Ops.hc_post; comb comes as [M, M, T] from hc_pre above."""
        out: Tensor = self._post(y_TD, x_TMD, post_TM, comb_TMM)
        return out


def balanced(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic matrices [M, M, T] from logits [M, M, T] (eq. 8)."""
    out: Tensor = Sinkhorn.apply(logits, iterations, eps)  # type: ignore[no-untyped-call]
    return out


class Sinkhorn(torch.autograd.Function):
    """Balanced matrices from their logits, both [M, M, T]: tokens last, so that sums are wide."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        """Softmax over rows, then columns and rows in turn, ending on columns."""
        soft = logits.softmax(1)
        state = soft + eps
        kept = [soft]
        for step in range(2 * iterations - 1):
            total = state.sum(step % 2, keepdim=True) + eps
            state = state / total
            kept += [state, total]
        ctx.save_for_backward(*kept)
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Each division by a sum: (g - sum(g * out)) / total."""
        soft, *kept = ctx.saved_tensors
        for step in reversed(range(len(kept) // 2)):
            state, total = kept[2 * step : 2 * step + 2]
            grad = (grad - (grad * state).sum(step % 2, keepdim=True)) / total
        return soft * (grad - (grad * soft).sum(1, keepdim=True)), None, None


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight).bfloat16()


def _turn(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    angle = position.float()[:, None] * frequency
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    if inverse:
        sin = -sin
    width = 2 * frequency.numel()
    even, odd = x[..., -width::2].float(), x[..., 1 - width :: 2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-width].float(), turned), dim=-1).bfloat16()


def _norm_turn(
    x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _turn(wide if weight is None else wide * weight, position, frequency, False)


def _gated(wide: Tensor, share: Tensor, limit: float) -> Tensor:
    gate, up = wide.float().chunk(2, dim=-1)
    hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (hidden * share[:, None]).bfloat16()


def _pre(
    x_TMD: Tensor, mix: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapsed vector bf16 [T, D], post f32 [T, M], logits of comb f32 [T, M * M]."""
    streams = x_TMD.shape[1]
    factor = torch.rsqrt(x_TMD.square().mean((1, 2)) + norm_eps)
    mix = mix * factor[:, None]
    pre = torch.sigmoid(mix[:, :streams] * scale[0] + base[:streams]) + eps
    middle = slice(streams, 2 * streams)
    post = 2 * torch.sigmoid(mix[:, middle] * scale[1] + base[middle])
    comb = mix[:, 2 * streams :] * scale[2] + base[2 * streams :]
    return (pre[..., None] * x_TMD).sum(1).bfloat16(), post, comb


def _post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_MMT: Tensor) -> Tensor:
    spread = post_TM[..., None] * y_TD.float()[:, None]
    streams = range(x_TMD.shape[1])
    mixed = [
        torch.stack([comb_MMT[j, k][:, None] * x_TMD[:, j] for j in streams]).sum(0)
        for k in streams
    ]
    return spread + torch.stack(mixed, dim=1)


def _pool(rows_T2W: Tensor, ape: Tensor, ratio: int, sequences: int) -> Tensor:
    blocks = rows_T2W.float().unflatten(0, (sequences, -1, ratio))
    value, gate = blocks[:, :, :, 0], blocks[:, :, :, 1] + ape
    if ratio == 4:
        half = ape.shape[1] // 2
        old_value = F.pad(value[:, :-1, :, :half], (0, 0, 0, 0, 1, 0))
        old_gate = F.pad(gate[:, :-1, :, :half], (0, 0, 0, 0, 1, 0), value=-1e30)
        value = torch.cat((old_value, value[..., half:]), dim=2)
        gate = torch.cat((old_gate, gate[..., half:]), dim=2)
    pooled: Tensor = (value * gate.softmax(dim=2)).sum(dim=2)
    return pooled.flatten(0, 1)


def _mix(
    near: Tensor,
    far: Tensor | None,
    hidden: Tensor | None,
    sink_H: Tensor,
    sequences: int,
    length: int,
    heads: int,
    ratio: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Joint softmax over window scores, entry scores and the sink.

    near  bf16 [B * chunks, 128 * H, 256]; far bf16 [B, L * H, E]; hidden bool [T, E]
    returns probabilities of the same shapes, and the log denominator f32 [T, H]
    """
    chunks = length // WINDOW
    score = near.float().view(sequences, chunks, WINDOW, heads, 2 * WINDOW)
    at = torch.arange(WINDOW)[:, None]
    row = torch.arange(2 * WINDOW) - WINDOW
    inside = (row <= at) & (row > at - WINDOW)
    there = (row >= 0) | (torch.arange(chunks)[:, None] > 0)
    seen = inside[None] & there[:, None]
    score = torch.where(seen[None, :, :, None], score, -1e30)
    top = score.amax(-1).view(sequences * length, heads)
    sink = sink_H.expand(sequences * length, heads)
    wide = None
    if far is not None:
        wide = far.float().view(sequences, length, heads, -1)
        visible = (torch.arange(length) + 1) // ratio
        mask = torch.arange(wide.shape[-1]) < visible[:, None]
        wide = torch.where(mask[None, :, None], wide, -1e30)
        if hidden is not None:
            wide = torch.where(hidden.view(sequences, length, 1, -1), -1e30, wide)
        top = torch.maximum(top, wide.amax(-1).view(sequences * length, heads))
    top = torch.maximum(top, sink).detach()
    near_e = torch.exp(score - top.view(sequences, chunks, WINDOW, heads, 1))
    total = near_e.sum(-1).view(sequences * length, heads) + torch.exp(sink - top)
    far_e = None
    if wide is not None:
        far_e = torch.exp(wide - top.view(sequences, length, heads, 1))
        total = total + far_e.sum(-1).view(sequences * length, heads)
    inverse = 1.0 / total
    p_near = near_e * inverse.view(sequences, chunks, WINDOW, heads, 1)
    p_far = None
    if far_e is not None and far is not None:
        p_far = (far_e * inverse.view(sequences, length, heads, 1)).view(far.shape).bfloat16()
    return p_near.view(near.shape).bfloat16(), p_far, top + total.log()
