"""The ops of kernels/spec.py for training: differentiable, of one float type, compiled in parts.

Not a general backend: every document of a step starts at position 0 and fills whole pages, in a
fresh cache, so rings and tails hold nothing yet and entries lie in order of their tokens.
tests/train/test_ops.py holds it against kernels/torch. Read next: attend.py, losses.py (who reads
`seen`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked

from overleap.kernels.composed import Composed
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Experts, Pool, RowFormat, Weight
from overleap.kernels.torch import linear, orthogonalise, quant, sample
from overleap.train.attend import Tiles, attend, choose, wide_type
from overleap.train.spread import Spread

ROPE_FREE_GROUP = 64
INPUT_GROUP = 128
EXPERT_ROWS = 128
# Torch 2.13 does. Before it, a compiled run that was resumed may differ from an unbroken one.
MARKS_AXES = "shape_id" in signature(mark_unbacked).parameters
LIKELY_TOKENS = 8192  # of one pass; compiled loops are divided among threads as if it were so many


@dataclass
class Seen:
    """What the losses need from one step, in layer order.

    attention  per CSA layer: queries [T, H, K], entries [S, K], sinks [H], log denominators
    routing    per routed layer: affinities f32 [T, E], chosen experts i64 [T, X], selection bias
    """

    attention: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    routing: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)


class TrainingOps(Composed):
    """See the file header. `seen` is filled by forward; take() empties it.

    rounding    round as the released form does (straight-through): cache rows, indexer queries,
                and the inputs of the weights in `packed`
    packed      ids of the weights whose inputs the released form rounds to FP8
    key_width   values of an indexer key; any other row is a window row or a main entry
    rope        rotary dims at the end of such a row
    spread      where the routed experts are, None: all of them here
    dtype       of products; sums and element-wise parts are float32 (float64 for float64)
    """

    def __init__(
        self,
        *,
        key_width: int,
        rope: int,
        compiled: bool = True,
        rounding: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.seen, self.packed = Seen(), frozenset[int]()
        self.spread: Spread | None = None
        self.rounding, self._key_width, self._rope = rounding, key_width, rope
        self.dtype, self.wide = dtype, wide_type(dtype)
        self._written: dict[int, Tensor] = {}
        self._tiles: tuple[Spans, Tiles] | None = None
        wrap: Callable[[Any], Any] = _compiled if compiled else (lambda f: f)
        self._norm, self._turn, self._norm_turn = wrap(_norm), wrap(_turn), wrap(_norm_turn)
        self._pre, self._post, self._gated = wrap(_pre), wrap(_post), wrap(_gated)
        self._head = wrap(_head)

    sample = staticmethod(sample.sample)
    orthogonalise = staticmethod(orthogonalise.orthogonalise)

    def take(self) -> Seen:
        """What was seen since the last call."""
        seen, self.seen = self.seen, Seen()
        self._written.clear()
        return seen

    def tiles(self, spans: Spans) -> Tiles:
        """Where the documents of a step lie."""
        if self._tiles is None or self._tiles[0] is not spans:
            assert set(spans.start) == {0}, "a training step starts its documents"
            self._tiles = (spans, Tiles.of(spans.count))
        return self._tiles[1]

    def rows_of(self, pool: Pool) -> Tensor:
        """The entries written in this step, with their gradient: [T / ratio, K]."""
        return self._written[id(pool.rows)]

    def matmul(self, x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
        """See spec.Ops.matmul; round_input is said by `packed`, since weights are plain here."""
        product = F.linear(self._rounded(x.to(self.dtype), weight), weight.data.to(self.dtype))
        return product.to(self.wide) if wide else product

    def grouped_matmul(self, x_TGI: Tensor, weight: Weight) -> Tensor:
        """See spec.Ops.grouped_matmul."""
        w_GNI = weight.data.to(self.dtype).unflatten(0, (x_TGI.shape[1], -1))
        product = torch.bmm(x_TGI.to(self.dtype).transpose(0, 1), w_GNI.transpose(1, 2))
        return product.transpose(0, 1)

    def _rounded(self, x: Tensor, weight: Weight) -> Tensor:
        if not self.rounding or id(weight.data) not in self.packed:
            return x
        with torch.no_grad():
            change = quant.round_fp8(x.detach().float(), INPUT_GROUP).to(x.dtype) - x
        return x + change

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """See spec.Ops.rms_norm."""
        out: Tensor = self._norm(_any(x), weight, eps, self.dtype)
        return out

    def norm_rope(
        self, x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
    ) -> Tensor:
        """See spec.Ops.norm_rope."""
        out: Tensor = self._norm_turn(_any(x), weight, eps, _any(position), frequency, self.dtype)
        return out

    def rotate(self, x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
        """See spec.Ops.rotate."""
        out: Tensor = self._turn(_any(x), _any(position), frequency, inverse, self.dtype)
        return out

    def hadamard(self, x: Tensor) -> Tensor:
        """See spec.Ops.hadamard; as a product with the constant matrix."""
        matrix = linear.hadamard(torch.eye(x.shape[-1], device=x.device))
        return F.linear(x.to(self.dtype), matrix.to(self.dtype))

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
                rounded = wide.bfloat16().float()  # as the rotary dims are kept
                rounded[..., :plain] = quant.round_fp8(
                    wide[..., :plain].contiguous(), ROPE_FREE_GROUP
                )
        return x + (rounded - wide).to(x.dtype)

    def window_write(self, ring: Tensor, rows_T: Tensor, spans: Spans) -> None:
        """Nothing: a fresh step never reads a ring or a tail."""

    def page_write(self, pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> None:
        """Kept as they are, for rows_of; the cache's own bytes stay untouched."""
        self._written[id(pool.rows)] = rows_E

    def compress(
        self, rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans
    ) -> Tensor:
        """See spec.Ops.compress."""
        begins = [begin // ratio for begin, _ in self.tiles(spans).documents]
        return _pool(rows_T2W, ape, ratio, torch.tensor(begins, device=ape.device))

    def index_topk(
        self, q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
    ) -> Tensor:
        """See spec.Ops.index_topk; ties are not ordered."""
        rows = self.rows_of(keys).to(self.dtype)
        return choose(q_TI.to(self.dtype), weight_TI, rows, ratio, self.tiles(spans), k)

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
        """See spec.Ops.attend."""
        far = None if entries is None else self.rows_of(entries)
        q, near = (q_THK * scale).to(self.dtype), fresh_T.to(self.dtype)
        cast = None if far is None else far.to(self.dtype)
        out, lse = attend(q, near, cast, chosen_Tk, sink_H, ratio, self.tiles(spans))
        if ratio == 4 and far is not None:
            self.seen.attention.append((q_THK, far, sink_H, lse))
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
        affinity = F.softplus(F.linear(x.to(self.wide), weight.to(self.wide))).sqrt()
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
        """See spec.Ops.experts."""
        if self.spread is None or len(experts.w1) < self.spread.experts:  # shared: on every rank
            return self._experts(x_TD, ids_TX, weight_TX, experts, limit)

        def local(x_ND: Tensor, ids_N1: Tensor, weight_N1: Tensor) -> Tensor:
            return self._experts(x_ND, ids_N1, weight_N1, own, limit)

        mine = self.spread.mine
        own = Experts(experts.w1[mine], experts.w2[mine], experts.w3[mine])
        return self.spread.through(x_TD.to(self.dtype), ids_TX, weight_TX, local)

    def _experts(
        self, x_TD: Tensor, ids_TX: Tensor, weight_TX: Tensor, experts: Experts, limit: float
    ) -> Tensor:
        """Rows sorted by expert, one product an expert.

        Each expert's rows are filled up to whole EXPERT_ROWS with rows of weight 0: the library
        that multiplies compiles each new shape, which takes longer than the product.
        """
        flat, number = ids_TX.flatten(), len(experts.w1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=number)
        room = (counts + EXPERT_ROWS - 1) // EXPERT_ROWS * EXPERT_ROWS
        shift = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
        place = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
        sizes = room.tolist()
        token = flat.new_zeros(sum(sizes)).index_copy(0, place, order // ids_TX.shape[1])
        chosen = weight_TX.flatten()[order]
        share = chosen.new_zeros(len(token)).index_copy(0, place, chosen)
        pairs = zip(experts.w1, experts.w3, strict=True)
        both = [torch.cat((gate.data, up.data)).to(self.dtype) for gate, up in pairs]
        rows = self._rounded(x_TD.to(self.dtype), experts.w1[0])[token].split(sizes)
        wide = torch.cat([F.linear(x, w) for x, w in zip(rows, both, strict=True)])
        hidden = self._gated(_any(wide), _any(share), limit, self.dtype)
        inner = self._rounded(hidden, experts.w2[0]).split(sizes)
        down = [F.linear(x, w.data.to(self.dtype)) for x, w in zip(inner, experts.w2, strict=True)]
        out = x_TD.new_zeros(x_TD.shape, dtype=self.wide)
        return out.index_add(0, token, torch.cat(down).to(self.wide))

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
        x_TMD = x_TMD.to(self.wide)
        mix = F.linear(x_TMD.flatten(1), fn.to(self.wide))
        y, post, comb = self._pre(_any(x_TMD), _any(mix), base, scale, eps, norm_eps, self.dtype)
        return y, post, balanced(comb.t().reshape(streams, streams, -1), iterations, eps)

    def hc_head(
        self, x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        """See spec.Ops.hc_head."""
        out: Tensor = self._head(_any(x_TMD.to(self.wide)), fn, base, scale, eps, norm_eps)
        return out

    def hc_post(self, y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
        """See spec.Ops.hc_post; comb comes as [M, M, T] from hc_pre above."""
        out: Tensor = self._post(_any(y_TD), _any(x_TMD), _any(post_TM), _any(comb_TMM, 2))
        return out


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the widths it meets, and once for all numbers of tokens: see _any."""
    return torch.compile(function, dynamic=False if MARKS_AXES else None)


def _any(x: Tensor, axis: int = 0) -> Tensor:
    """Tells torch.compile that there may be any number of tokens on this axis.

    Else it takes the first number that it meets for a constant and a second one for a variable,
    with sums in another order: a run that goes on would meet them otherwise and get other bits.
    """
    if MARKS_AXES:
        mark_unbacked(x, axis, hint_override=LIKELY_TOKENS, shape_id="tokens")
    return x


def balanced(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Doubly stochastic matrices [M, M, T] from logits [M, M, T] (eq. 8)."""
    out: Tensor = Sinkhorn.apply(logits, iterations, eps)  # type: ignore[no-untyped-call]
    return out


class Sinkhorn(torch.autograd.Function):
    """Balanced matrices from their logits, both [M, M, T]: tokens last, so that sums are wide."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        """Softmax over rows, then columns and rows in turn, ending on columns."""
        ctx.save_for_backward(logits)
        ctx.settings = iterations, eps
        _, *kept = _divisions(logits, iterations, eps)
        return kept[-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Each division by a sum: (g - sum(g * out)) / total. Made again, they are not held."""
        soft, *kept = _divisions(*ctx.saved_tensors, *ctx.settings)
        for step in reversed(range(len(kept) // 2)):
            state, total = kept[2 * step : 2 * step + 2]
            grad = (grad - (grad * state).sum(step % 2, keepdim=True)) / total
        return soft * (grad - (grad * soft).sum(1, keepdim=True)), None, None


def _divisions(logits: Tensor, iterations: int, eps: float) -> list[Tensor]:
    """The softmax, then of each division its result and the sums it was by."""
    soft = logits.softmax(1)
    state = soft + eps
    made = [soft]
    for step in range(2 * iterations - 1):
        total = state.sum(step % 2, keepdim=True) + eps
        state = state / total
        made += [state, total]
    return made


def _norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return _wide_norm(x, weight, eps).to(dtype)


def _wide_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(wide_type(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide if weight is None else wide * weight


def _turn(
    x: Tensor, position: Tensor, frequency: Tensor, inverse: bool, dtype: torch.dtype
) -> Tensor:
    wide = wide_type(x.dtype)
    angle = position.to(wide)[:, None] * frequency.to(wide)
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin()
    if inverse:
        sin = -sin
    width = 2 * frequency.numel()
    even, odd = x[..., -width::2].to(wide), x[..., 1 - width :: 2].to(wide)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-width].to(wide), turned), dim=-1).to(dtype)


def _norm_turn(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    position: Tensor,
    frequency: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return _turn(_wide_norm(x, weight, eps), position, frequency, False, dtype)


def _gated(wide: Tensor, share: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    gate, up = wide.to(wide_type(wide.dtype)).chunk(2, dim=-1)
    hidden = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return (hidden * share[:, None]).to(dtype)


def _pre(
    x_TMD: Tensor,
    mix: Tensor,
    base: Tensor,
    scale: Tensor,
    eps: float,
    norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapsed vector [T, D], post [T, M], logits of comb [T, M * M]."""
    streams = x_TMD.shape[1]
    factor = torch.rsqrt(x_TMD.square().mean((1, 2)) + norm_eps)
    mix = mix * factor[:, None]
    pre = torch.sigmoid(mix[:, :streams] * scale[0] + base[:streams]) + eps
    middle = slice(streams, 2 * streams)
    post = 2 * torch.sigmoid(mix[:, middle] * scale[1] + base[middle])
    comb = mix[:, 2 * streams :] * scale[2] + base[2 * streams :]
    return (pre[..., None] * x_TMD).sum(1).to(dtype), post, comb


def _post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_MMT: Tensor) -> Tensor:
    spread = post_TM[..., None] * y_TD.to(x_TMD.dtype)[:, None]
    streams = range(x_TMD.shape[1])
    mixed = [
        torch.stack([comb_MMT[j, k][:, None] * x_TMD[:, j] for j in streams]).sum(0)
        for k in streams
    ]
    return spread + torch.stack(mixed, dim=1)


def _head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    flat = x_TMD.flatten(1)
    mix = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    gate = torch.sigmoid(mix * scale + base) + eps
    return (gate[..., None] * x_TMD).sum(1)


def _pool(rows_T2W: Tensor, ape: Tensor, ratio: int, begins: Tensor) -> Tensor:
    """Entries [T / ratio, K]; `begins` are the documents' first blocks, which overlap nothing."""
    blocks = rows_T2W.unflatten(0, (-1, ratio))
    value, gate = blocks[:, :, 0], blocks[:, :, 1] + ape
    if ratio == 4:
        half = ape.shape[1] // 2
        old_value = F.pad(value[:-1, :, :half], (0, 0, 0, 0, 1, 0))
        old_gate = F.pad(gate[:-1, :, :half], (0, 0, 0, 0, 1, 0))
        fresh = torch.zeros(len(gate), dtype=torch.bool, device=gate.device)
        fresh[begins] = True
        old_gate = old_gate.masked_fill(fresh[:, None, None], -torch.inf)
        value = torch.cat((old_value, value[..., half:]), dim=1)
        gate = torch.cat((old_gate, gate[..., half:]), dim=1)
    pooled: Tensor = (value * gate.softmax(dim=1)).sum(dim=1)
    return pooled
