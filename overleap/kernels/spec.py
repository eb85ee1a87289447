"""The contract of every op: what goes in, what comes out, which ties win. Chips implement this.

Not here: any arithmetic. The definition in plain torch is kernels/torch/; a chip is a folder.
Read next: kernels/torch/attention.py (the op that matters most), kernels/__init__.py (who serves).

Letters: T packed tokens of this step, B sequences, D hidden width, M residual streams, H query
heads, K head width, R rotary width, I indexer heads, J indexer width, S entries of a sequence,
P pages, E experts, X experts per token, F expert inner width, N outputs of a linear, G groups,
V vocabulary, Y rows of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from overleap.kernels.spans import Spans


@dataclass(frozen=True)
class Weight:
    """A linear weight [N, K] as stored; packed bytes stay packed.

    data   bf16 | f32 [N, K], or float8_e4m3fn [N, K], or int8 [N, K/2] (two e2m1 values a
           byte, low nibble is the even input)
    scale  None for plain; float8_e8m0fnu [ceil(N/128), ceil(K/128)] with e4m3 data,
           [N, K/32] with e2m1 data (report section 3.4; released layout)
    """

    data: Tensor
    scale: Tensor | None = None

    @property
    def packed(self) -> bool:
        """True for FP8 and FP4 bytes."""
        return self.scale is not None

    @property
    def inputs(self) -> int:
        """K, whatever a byte holds."""
        return self.data.shape[1] * (2 if self.data.dtype is torch.int8 else 1)

    def lies_as_said(self) -> bool:
        """Whether native code may go over its bytes: no gaps, a scale of the right shape."""
        if self.scale is None:
            return self.data.is_contiguous()
        rows, columns = self.data.shape[0], self.inputs
        fp4 = self.data.dtype is torch.int8
        shape = (rows, columns // 32) if fp4 else (-(-rows // 128), -(-columns // 128))
        there = self.data.is_contiguous() and self.scale.is_contiguous()
        return there and tuple(self.scale.shape) == shape


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: w1 gate [F, D], w2 down [D, F], w3 up [F, D], all of one form."""

    w1: tuple[Weight, ...]
    w2: tuple[Weight, ...]
    w3: tuple[Weight, ...]

    @cached_property
    def addresses(self) -> Tensor:
        """i64 [E, 6]: where w1, its scale, w2, its scale, w3, its scale begin; 0 for no scale."""
        inner, width = self.w1[0].data.shape[0], self.w1[0].inputs
        for part, shape in ((self.w1, (inner, width)), (self.w3, (inner, width)),
                            (self.w2, (width, inner))):  # fmt: skip
            for w in part:
                assert w.lies_as_said() and (w.data.shape[0], w.inputs) == shape, shape
        rows = [
            [part.data_ptr() for w in trio for part in (w.data, w.scale) if part is not None]
            if trio[0].packed
            else [n for w in trio for n in (w.data.data_ptr(), 0)]
            for trio in zip(self.w1, self.w2, self.w3, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64).to(self.w1[0].data.device)


@dataclass(frozen=True)
class Joint:
    """Linears of one input whose results lie side by side.

    weights      in order
    round_input  the input is rounded to e4m3 in groups of 128 first
    wide         the result is f32 whatever the input is
    detached     no gradient goes from the result to the input
    """

    weights: tuple[Weight, ...]
    round_input: bool
    wide: bool = False
    detached: bool = False

    @cached_property
    def outputs(self) -> int:
        """Width of the result."""
        return sum(weight.data.shape[0] for weight in self.weights)

    @cached_property
    def inputs(self) -> int:
        """Width of the input."""
        (inputs,) = {weight.inputs for weight in self.weights}
        return inputs

    @cached_property
    def table(self) -> Tensor:
        """For native code, i64 [weights, 5]: address of the data, of the scale (0 for none), type
        of the elements (0 f32, 1 bf16, 2 e4m3, 3 e2m1), rows, whether the input is rounded."""
        assert all(weight.lies_as_said() for weight in self.weights)
        types = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2, torch.int8: 3}
        rows = [
            (
                w.data.data_ptr(),
                0 if w.scale is None else w.scale.data_ptr(),
                types[w.data.dtype],
                w.data.shape[0],
                self.round_input,
            )
            for w in self.weights
        ]
        return torch.tensor(rows, dtype=torch.int64)


@dataclass(frozen=True)
class RowFormat:
    """How a cache row is kept.

    kind   `kv`: e4m3 plain dims in groups of 64, bf16 rotary dims, ue8m0 scales, padded to 8;
           `key`: e2m1 in groups of 32, e8m0 scales; `wide`: float32
    width  values in a row (K or J)
    rope   rotary dims at the end of a `kv` row
    """

    kind: Literal["kv", "key", "wide"]
    width: int
    rope: int

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored rows: uint8 bytes or float32."""
        return torch.float32 if self.kind == "wide" else torch.uint8


@dataclass(frozen=True)
class Pool:
    """Paged rows of one layer: [P, rows a page, row]. A sequence counts its rows as entries."""

    rows: Tensor
    format: RowFormat

    @property
    def per_page(self) -> int:
        """Rows in one page."""
        return self.rows.shape[1]


@dataclass(frozen=True)
class Choice:
    """How a row of logits becomes a token.

    temperature  0 takes the largest logit, and nothing below counts; else logits are divided by it
    top_k        keep the k largest logits; None keeps all
    top_p        of those, keep the likeliest up to and with the one that reaches this share
    min_p        and of those, the ones at least this fraction as likely as the likeliest
    number       in [0, 1), says which of those it is; from a counter-based generator: a function
                 of the seed and of the token's number in its answer, and of nothing else
    """

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    number: float = 0.0


class Ops(Protocol):
    """Every op: first the fine ones, which a backend has or the definition serves, then the coarse
    ones (from `project` on), which composed.py makes of the fine ones where a backend has none.

    Activations may be f32 or bf16, all of a call alike; weights of norms, sinks, and what a
    docstring calls f32 are f32 either way. Results have the dtype of the first tensor argument
    unless the docstring says f32. Accumulation is f32. Nothing is written but what an op named
    *_write says.

    Packed bytes may hold any code; a NaN code or scale gives NaN, weights below 2^-126 (code times
    scale) may count as zero. An e8m0 scale with code c is 2^(c - 127), 255 is NaN. Errors are
    relative to the terms' sizes, what a sum would be if nothing cancelled; they and ties:
    conformance/compare.py. Bytes and operations: cost.py.
    """

    def matmul(self, x: Tensor, weight: Weight, round_input: bool, wide: bool = False) -> Tensor:
        """x [T, K] times weight transposed -> [T, N].

        round_input rounds x to e4m3 in groups of 128 first, as the released FP8 and FP4 linears do:
        scale 2^ceil(log2(amax / 448)) with amax at least 1e-4, ties to the even code. A last group
        of fewer has its own scale; a group with a NaN or an infinity becomes NaN.
        wide: the result is f32 whatever x is, not rounded to the dtype of x.
        """
        ...

    def grouped_matmul(self, x_TGI: Tensor, weight: Weight) -> Tensor:
        """Block-diagonal linear: group g of x times rows g of weight [G * N, I] -> [T, G, N].

        The first half of the output projection (report section 2.3.1); inputs are not rounded.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) over the last dim, times weight [width] where given."""
        ...

    def norm_rope(
        self, x: Tensor, weight: Tensor | None, eps: float, position: Tensor, frequency: Tensor
    ) -> Tensor:
        """rms_norm, then rotation of the last R dims by position.

        x          [T, K] or [T, H, K]
        position   i64 [T]
        frequency  f32 [R / 2]   radians per token; pairs are interleaved (2i, 2i + 1)
        """
        ...

    def rotate(self, x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
        """Rotation of the last R dims alone, forward or inverse (undoes the rotation of values)."""
        ...

    def hadamard(self, x: Tensor) -> Tensor:
        """Normalised Walsh-Hadamard transform of the last dim (a power of two), Sylvester order."""
        ...

    def quantize(self, x: Tensor, row: RowFormat) -> Tensor:
        """Values [..., width] as cache rows [..., row]: packed bytes, or f32 for `wide`.

        Scales are 2^ceil(log2(amax / max)), ties go to the even code: e4m3 in groups of 64 with max
        448 and amax at least 1e-4, e2m1 in groups of 32 with max 6 and amax at least 6 * 2^-126.
        """
        ...

    def window_write(self, ring: Tensor, rows_T: Tensor, spans: Spans) -> None:
        """ring[slot, position mod capacity] = row, for the last `capacity` tokens of a sequence.

        ring [slots, capacity, ...]; rows_T [T, ...]
        """
        ...

    def page_write(self, pool: Pool, rows_E: Tensor, ratio: int, spans: Spans) -> None:
        """Entries completed in this step (spans.emitted order) into their pages."""
        ...

    def compress(
        self, rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans
    ) -> Tensor:
        """Gated pooling of key/value rows into one entry per block (eqs 9-12, 20-23).

        rows_T2W  f32 [T, 2, W]   values and gates of the new tokens
        tail      f32 [slots, capacity, 2, W]  earlier rows, ring by position
        ape       f32 [ratio, W]  position biases of the gates
        returns   f32 [entries completed, C], order of spans.emitted(ratio)

        W = C: softmax over the ratio rows of a block, per channel. W = 2C (overlapped): over
        2 * ratio rows, the first half of W from the block before, the second half from the
        block itself; block 0 has no block before.
        """
        ...

    def index_topk(
        self, q_TI: Tensor, weight_TI: Tensor, keys: Pool, ratio: int, spans: Spans, k: int
    ) -> Tensor:
        """Choose the k best compressed entries for every token.

        q_TI       rows [T, I, row] in the format of the keys
        weight_TI  f32  [T, I]      head weights, already scaled
        returns    i64  [T, k]      entry numbers, best first, -1 where fewer than k are visible

        A token sees entries s < (position + 1) // ratio.
        score(t, s) = sum over i of weight[t, i] * relu(q[t, i] . key[s])   (report eq. 16)
        Equal scores: the smaller entry wins. Scratch memory must not grow with S.
        """
        ...

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
        """One softmax over window rows, compressed entries and a sink; a row is key and value.

        q_THK    [T, H, K]   after rotation
        fresh_T  rows [T, row]  window rows of this step's tokens (not yet in the ring)
        ring     [slots, capacity, row]  earlier window rows
        entries  paged entries of this layer, or None
        chosen   i64 [T, k] entry numbers (-1: none), or None for every visible entry
        sink_H   f32 [H]     logit that takes part in the denominator only (eq. 27)
        returns  o [T, H, K] and the log denominator f32 [T, H], sink included

        A token sees the `window` positions up to its own, and entries s < (position + 1) // ratio.
        """
        ...

    def route(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        fixed_TX: Tensor | None,
        k: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Experts and weights of every token: affinity sqrt(softplus(x W^T)) in f32.

        bias [E] counts for selection only; fixed_TX i64 [T, X] overrides selection (hash layers).
        returns ids i64 [T, X] (best first; ties: smaller expert) and f32 [T, X] weights:
        affinities of the chosen, divided by their sum, times scale.
        """
        ...

    def experts(
        self,
        x_TD: Tensor,
        ids_TX: Tensor,
        weight_TX: Tensor,
        experts: Experts,
        limit: float,
        round_input: bool,
    ) -> Tensor:
        """Sum over chosen experts of w2(silu(min(w1 x, limit)) * clamp(w3 x, +-limit) * weight)."""
        ...

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
        """Collapse the streams for a sub-layer, and how to spread its result (eqs 3-8).

        fn f32 [(2 + M) M, M D], base f32 [(2 + M) M], scale f32 [3]: pre, post, comb
        returns y [T, D], post f32 [T, M], comb f32 [T, M, M] doubly stochastic, ended on columns
        """
        ...

    def hc_head(
        self, x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
    ) -> Tensor:
        """The last collapse, before the final norm: a gated sum of the streams -> [T, D].

        fn f32 [M, M D], base f32 [M], scale f32 [1]; gates sigmoid(product * scale + base) + eps
        """
        ...

    def hc_post(self, y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
        """Stream k becomes post[k] y + sum over j of comb[j, k] x[j] (eq. 1) -> [T, M, D].

        post f32 [T, M] and comb f32 [T, M, M] as hc_pre returns them
        """
        ...

    def sample(
        self,
        logits_YV: Tensor,
        choices: Sequence[Choice],
        allowed_YB: Tensor | None,
        best: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Choose a token from every row of logits; each row is worked on alone.

        logits_YV   f32 [Y, V]; -inf forbids a token
        choices     one for each row
        allowed_YB  u8 [Y, ceil(V / 8)] or None: token v may be chosen where bit v % 8 of byte
                    v // 8 is set
        best        None: no log-probabilities; n: of the chosen token and of the n likeliest
        returns     ids i64 [Y, 1 + n]: the chosen token, then the n likeliest of all V, best first
                    (-1 beyond V); and their log-probabilities f64, same shape ([Y, 0] for None):
                    the model's own, before `allowed` and the cuts (-inf beyond V)

        What is kept lies on [0, 1) in order of ids, each token as wide as it is likely; `number`
        falls on one. Equal logits: the smaller id is the largest, and stays when another is cut.
        A row with NaN or +inf in it, or with nothing that may be chosen, yields -1 and NaN.
        """
        ...

    def orthogonalise(self, matrix: Tensor) -> Tensor:
        """The nearest matrix with all singular values about 1: U V^T of U S V^T (report Alg. 1).

        matrix   [..., N, K]  f32 or bf16; a batch is done at once
        returns  same shape, f32; products run in bf16 (report section 5.4)

        M <- M / |M|_F, then M <- a M + b (M M^T) M + c (M M^T)^2 M: eight steps with (a, b, c) =
        (3.4445, -4.7750, 2.0315), two with (2, -1.5, 0.5). Singular values below about 1 / 100 of
        the largest drown in bf16 and may end anywhere between 0 and 1. Zeros stay zeros.
        """
        ...

    # Coarse ops: what a layer calls. Their results are those of the fine ops in turn.

    def project(
        self, x: Tensor, parts: tuple[Joint, ...], norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, ...]:
        """Several linears of one input, perhaps of its rms_norm: [T, K] -> [T, outputs] a part.

        norm  [K], weight of an rms_norm before the products; None for none
        """
        ...

    def attention_inputs(
        self,
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
    ) -> tuple[Tensor, ...]:
        """All that attention makes of its input before it looks at any other token.

        of_input   what meets x: the query latent [T, Q], the key/value row [T, K], and others
        of_latent  what meets the latent after an rms_norm with q_norm [Q]: queries, and others
        returns    queries [T, H, K] after norm_rope without a weight; rows [T, row] after
                   norm_rope_quantize with kv_norm [K]; the others of both as project makes them
        """
        ...

    def project_back(self, o_TGI: Tensor, inner: Weight, outer: Joint) -> Tensor:
        """The grouped output projection: grouped_matmul with `inner`, then `outer` -> [T, D]."""
        ...

    def norm_rope_quantize(
        self,
        x: Tensor,
        weight: Tensor | None,
        eps: float | None,
        position: Tensor,
        frequency: Tensor,
        mixed: bool,
        row: RowFormat,
    ) -> Tensor:
        """norm_rope, then hadamard where `mixed`, then quantize; without the norm for eps None."""
        ...

    def compress_write(
        self, rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans
    ) -> Tensor:
        """compress, then window_write of the rows into the tail. -> the entries completed, f32."""
        ...

    def attend_write(
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
        frequency: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """attend, the inverse rotation of its result, and window_write of fresh_T into the ring."""
        ...

    def mixture(
        self,
        x_TD: Tensor,
        ids_TX: Tensor,
        weight_TX: Tensor,
        routed: Experts,
        shared: Experts,
        limit: float,
    ) -> Tensor:
        """The chosen experts with their weights plus the shared ones with weight 1 -> [T, D].

        Inputs are rounded where the experts are packed. A bf16 result is rounded once, or the
        sums of chosen and of shared experts also before they are added (composed.py): the
        tolerance covers both.
        """
        ...

    def hc_pre_norm(
        self,
        x_TMD: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        iterations: int,
        eps: float,
        norm_eps: float,
        norm: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hc_pre, and rms_norm of its y with weight norm [D] and norm_eps."""
        ...


OP_NAMES = tuple(name for name in vars(Ops) if not name.startswith("_"))
COARSE = OP_NAMES[OP_NAMES.index("project") :]
# Nothing but products of whole matrices, which torch gives to the device's own library: backends
# need not have these, and nobody is worse off where they have not.
LEFT_TO_TORCH = ("orthogonalise",)
