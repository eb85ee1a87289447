"""One layer: attention and experts, each between a collapse and a spread of the streams.

Report sections 2.1 and 2.2. Read next: attention.py, moe.py, hyper.py.
"""

from functools import cached_property

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops
from overleap.model.attention import Attention
from overleap.model.hyper import Connection, connection, register_connection
from overleap.model.indexer import IndexerTap
from overleap.model.layers import RMSNorm, rotary_frequencies
from overleap.model.moe import MoE

Collapse = tuple[*Connection, Tensor]


class Block(nn.Module):
    """x [T, M, D] -> [T, M, D]."""

    def __init__(self, config: ModelConfig, kind: LayerKind, hashed: bool, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.attn = Attention(config, kind, ops)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.ffn = MoE(config, hashed, ops)
        register_connection(self, "attn", config)
        register_connection(self, "ffn", config)
        self.frequency = rotary_frequencies(config.rope(kind), config.qk_rope_head_dim)

    def forward(
        self,
        x_TMD: Tensor,
        ids_T: Tensor,
        layer: LayerCache,
        spans: Spans,
        tap: list[IndexerTap] | None = None,
    ) -> Tensor:
        """One step of this layer over packed tokens; writes the layer's cache."""
        ops, (before_attn, before_ffn, frequency) = self.ops, self.stored
        y, post, comb = ops.hc_pre_norm(x_TMD, *before_attn)
        x_TMD = ops.hc_post(self.attn(y, layer, frequency, spans, tap), x_TMD, post, comb)
        y, post, comb = ops.hc_pre_norm(x_TMD, *before_ffn)
        return ops.hc_post(self.ffn(y, ids_T), x_TMD, post, comb)

    @cached_property
    def stored(self) -> tuple[Collapse, Collapse, Tensor]:
        """What ops.hc_pre_norm wants before attention and before experts, and the rotary
        frequencies, where the weights are; these must be in place."""
        config, norms = self.config, (self.attn_norm.weight, self.ffn_norm.weight)
        attn, ffn = (connection(self, name, config) for name in ("attn", "ffn"))
        frequency = self.frequency.to(norms[0].device)
        return (*attn, norms[0]), (*ffn, norms[1]), frequency
