"""Indexer: which compressed entries a token should look at (report eqs 13-17).

Its input carries no gradient: selection cannot pass one, so it learns by distillation (train/).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spec import Ops, Pool, Spans
from overleap.model.compressor import Compressor
from overleap.model.layers import Linear


@dataclass(frozen=True)
class IndexerTap:
    """What the distillation loss needs of one CSA layer in one step.

    q_THK, lse_TH  main queries after rotation and the log denominators of the joint softmax
    entries, keys  pools of this step; index_q rows [T, I, row], index_weight f32 [T, I]
    scale          of the main scores
    """

    q_THK: Tensor
    lse_TH: Tensor
    entries: Pool
    keys: Pool
    index_q: Tensor
    index_weight: Tensor
    scale: float


class Indexer(nn.Module):
    """I small heads that score every visible entry; the best index_topk are attended."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.topk, self.eps, self.ops = config.index_topk, config.rms_norm_eps, ops
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, ops)
        self.weights_proj = Linear(config.hidden_size, self.heads, ops, exact=True)
        self.compressor = Compressor(config, LayerKind.CSA, self.width, True, ops)
        self.scale = self.width**-0.5 * self.heads**-0.5

    def write_keys(self, x_TD: Tensor, layer: LayerCache, frequency: Tensor, spans: Spans) -> None:
        """Compress and store the keys of the blocks this step completes."""
        assert layer.index_tail is not None and layer.keys is not None
        self.compressor(x_TD, layer.index_tail, layer.keys, frequency, spans)

    def queries(
        self, x_TD: Tensor, latent_TQ: Tensor, keys: Pool, frequency: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        """Queries as rows [T, I, row] in the keys' format, and head weights f32 [T, I]."""
        q = self.wq_b(latent_TQ).unflatten(-1, (self.heads, self.width))
        q = self.ops.hadamard(self.ops.rotate(q, spans.position_T, frequency, False))
        weight = self.weights_proj(x_TD).float() * self.scale
        return self.ops.quantize(q, keys.format), weight
