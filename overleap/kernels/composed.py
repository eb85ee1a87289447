"""The coarse ops of spec.Ops, made of the fine ones of whoever has them.

A layer calls coarse ops: fewer calls, and a backend may fuse what is in one. A backend that has
fine ops alone needs no more. Read next: kernels/__init__.py (who serves).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.spec import Experts, Joint, Ops, Pool, RowFormat, Weight


class Composed(Ops):
    """Abstract: fine ops come from a subclass. Coarse ones it may replace."""

    def project(
        self, x: Tensor, parts: tuple[Joint, ...], norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, ...]:
        """See spec.Ops.project."""
        if norm is not None:
            x = self.rms_norm(x, norm, eps)
        made = []
        for part in parts:
            given = x.detach() if part.detached else x
            found = [self.matmul(given, w, part.round_input, part.wide) for w in part.weights]
            made.append(found[0] if len(found) == 1 else torch.cat(found, dim=-1))
        return tuple(made)

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
        """See spec.Ops.attention_inputs."""
        latent_TQ, kv_TK, *others = self.project(x_TD, of_input)
        q_TW, *more = self.project(latent_TQ, of_latent, q_norm, eps)
        q_THK = q_TW.unflatten(-1, (heads, -1))
        q_THK = self.norm_rope(q_THK, None, eps, position_T, frequency)
        fresh_T = self.norm_rope_quantize(kv_TK, kv_norm, eps, position_T, frequency, False, row)
        return q_THK, fresh_T, *others, *more

    def project_back(self, o_TGI: Tensor, inner: Weight, outer: Joint) -> Tensor:
        """See spec.Ops.project_back."""
        (weight,) = outer.weights
        latent = self.grouped_matmul(o_TGI, inner).flatten(1)
        return self.matmul(latent, weight, outer.round_input, outer.wide)

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
        """See spec.Ops.norm_rope_quantize."""
        if eps is None:
            x = self.rotate(x, position, frequency, False)
        else:
            x = self.norm_rope(x, weight, eps, position, frequency)
        return self.quantize(self.hadamard(x) if mixed else x, row)

    def compress_write(
        self, rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans
    ) -> Tensor:
        """See spec.Ops.compress_write."""
        entry = self.compress(rows_T2W, tail, ape, ratio, spans)
        self.window_write(tail, rows_T2W, spans)
        return entry

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
        """See spec.Ops.attend_write."""
        out, log = self.attend(
            q_THK, fresh_T, ring, entries, chosen_Tk, ratio, sink_H, scale, window, spans
        )
        self.window_write(ring.rows, fresh_T, spans)
        return self.rotate(out, spans.position_T, frequency, True), log

    def mixture(
        self,
        x_TD: Tensor,
        ids_TX: Tensor,
        weight_TX: Tensor,
        routed: Experts,
        shared: Experts,
        limit: float,
    ) -> Tensor:
        """See spec.Ops.mixture. In bf16 both sums are rounded before they are added."""
        out = self.experts(x_TD, ids_TX, weight_TX, routed, limit, routed.w1[0].packed)
        # Every token chooses each of the shared experts, with weight 1.
        ids = torch.arange(len(shared.w1), device=x_TD.device).expand(x_TD.shape[0], -1)
        whole = torch.ones(ids.shape, device=x_TD.device)
        return out + self.experts(x_TD, ids, whole, shared, limit, shared.w1[0].packed)

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
        """See spec.Ops.hc_pre_norm."""
        y, post, comb = self.hc_pre(x_TMD, fn, base, scale, iterations, eps, norm_eps)
        return self.rms_norm(y, norm, norm_eps), post, comb


class Assembled(Composed):
    """Ops by name, from one backend or several; coarse ones that nobody has are composed."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        vars(self).update(found)
