"""Indexer: which compressed entries a token should look at (report eqs 13-17).

Its input carries no gradient: selection cannot pass one, so it learns by distillation (train/).
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spec import Joint, Ops, Pool, Spans
from overleap.model.compressor import Compressor
from overleap.model.layers import Linear, joint


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

    @cached_property
    def stored(self) -> tuple[tuple[Joint, ...], tuple[Joint, ...]]:
        """What meets the layer's input, and the query latent; the weights must be in place."""
        return (self.compressor.joint, joint(self.weights_proj)), (joint(self.wq_b),)

    def write_keys(
        self, x_TD: Tensor, layer: LayerCache, frequency: Tensor, spans: Spans
    ) -> Tensor:
        """Compress and store the keys of the blocks this step completes. -> head weights [T, I]."""
        assert layer.index_tail is not None and layer.keys is not None
        rows, weight = self.ops.project(x_TD, self.stored[0])
        self.compressor(rows, x_TD.dtype, layer.index_tail, layer.keys, frequency, spans)
        return weight

    def queries(
        self,
        latent_TQ: Tensor,
        norm: Tensor,
        weight_TI: Tensor,
        keys: Pool,
        frequency: Tensor,
        spans: Spans,
    ) -> tuple[Tensor, Tensor]:
        """Queries as rows [T, I, row] in the keys' format, and head weights f32 [T, I].

        latent_TQ, norm  the shared query latent before its norm, and its weight
        weight_TI        as write_keys returns them
        """
        (q,) = self.ops.project(latent_TQ, self.stored[1], norm, self.eps)
        q = q.view(-1, self.heads, self.width)
        rows = self.ops.norm_rope_quantize(
            q, None, None, spans.position_T, frequency, True, keys.format
        )
        return rows, weight_TI.float() * self.scale
