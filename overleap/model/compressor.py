"""Compressor: many tokens into one entry. Used twice, for main entries and for indexer keys.

Report sections 2.3.1 and 2.3.2. The pooling itself is the op `compress`; this file normalises,
rotates at the first position of the block, and stores. Its input is projected by who owns it.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from overleap.cache import layout
from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Joint, Ops, Pool
from overleap.model.layers import Linear, RMSNorm, joint, parameter


class Compressor(nn.Module):
    """Writes the entries that a step completes into their pages, and keeps the tail.

    width     C, values of an entry
    hadamard  mix the entry before storing (indexer keys)
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, width: int, hadamard: bool, ops: Ops
    ) -> None:
        super().__init__()
        self.ratio, self.hadamard, self.ops = RATIO_OF_KIND[kind], hadamard, ops
        series = layout.series_width(kind, width)
        self.ape = parameter(self.ratio, series)
        self.wkv = Linear(config.hidden_size, series, ops, exact=True)
        self.wgate = Linear(config.hidden_size, series, ops, exact=True)
        self.norm = RMSNorm(width, config.rms_norm_eps, ops)
        self.eps = config.rms_norm_eps

    def joint(self, detached: bool = False) -> Joint:
        """Values and gates as ops.project makes them: f32 [T, 2 W]."""
        return joint(self.wkv, self.wgate, wide=True, detached=detached)

    @cached_property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Positions' gates and the weight of the norm; the weights must be in place."""
        return self.ape, self.norm.weight

    def forward(
        self,
        rows_TW: Tensor,
        dtype: torch.dtype,
        tail: Tensor,
        pool: Pool,
        frequency: Tensor,
        spans: Spans,
    ) -> None:
        """rows_TW as `joint` yields them, dtype of the model's activations, frequency f32 [R / 2].

        Changes `tail` and `pool` only.
        """
        ops, (ape, norm) = self.ops, self.stored
        rows_T2W = rows_TW.view(-1, 2, ape.shape[1])
        entry = ops.compress_write(rows_T2W, tail, ape, self.ratio, spans)
        if not entry.shape[0]:
            return
        rows = ops.norm_rope_quantize(
            entry.to(dtype),
            norm,
            self.eps,
            spans.begins(self.ratio),
            frequency,
            self.hadamard,
            pool.format,
        )
        ops.page_write(pool, rows, self.ratio, spans)
