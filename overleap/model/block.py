"""One layer: attention and experts, each between a collapse and a spread of the streams.

Report sections 2.1 and 2.2. Read next: attention.py, moe.py, hyper.py.
"""

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spec import Ops, Spans
from overleap.model.attention import Attention
from overleap.model.hyper import collapse, register_connection
from overleap.model.indexer import IndexerTap
from overleap.model.layers import RMSNorm, rotary_frequencies
from overleap.model.moe import MoE


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
        frequency = self.frequency.to(x_TMD.device)
        config, ops = self.config, self.ops
        y, post, comb = collapse(self, "attn", x_TMD, config, ops, self.attn_norm.weight)
        y = self.attn(y, layer, frequency, spans, tap)
        x_TMD = ops.hc_post(y, x_TMD, post, comb)
        y, post, comb = collapse(self, "ffn", x_TMD, config, ops, self.ffn_norm.weight)
        return ops.hc_post(self.ffn(y, ids_T), x_TMD, post, comb)
