"""Compressor: many tokens into one entry. Used twice, for main entries and for indexer keys.

Report sections 2.3.1 and 2.3.2. The pooling itself is the op `compress`; this file projects,
normalises, rotates at the first position of the block, and stores.
"""

import torch
from torch import Tensor, nn

from overleap.cache import layout
from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.kernels.spec import Ops, Pool, Spans
from overleap.model.layers import Linear, RMSNorm, parameter


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

    def forward(
        self, x_TD: Tensor, tail: Tensor, pool: Pool, frequency: Tensor, spans: Spans
    ) -> None:
        """x_TD [T, D]; frequency f32 [R / 2]. Changes `tail` and `pool` only."""
        rows = torch.stack((self.wkv.wide(x_TD), self.wgate.wide(x_TD)), dim=1)
        entry = self.ops.compress(rows, tail, self.ape, self.ratio, spans)
        self.ops.window_write(tail, rows, spans)
        if entry.shape[0]:
            entry = entry.to(x_TD.dtype)
            first = [torch.arange(a, b) for a, b in spans.emitted(self.ratio)]
            position = (torch.cat(first) * self.ratio).to(x_TD.device)
            entry = self.ops.norm_rope(entry, self.norm.weight, self.norm.eps, position, frequency)
            if self.hadamard:
                entry = self.ops.hadamard(entry)
            self.ops.page_write(pool, self.ops.quantize(entry, pool.format), self.ratio, spans)
