"""Indexer: which compressed entries a token should look at (report eqs 13-17).

Its input carries no gradient: selection cannot pass one, so it learns by distillation (train/).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Joint, Ops, Pool
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
        self.topk, self.ops = config.index_topk, ops
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, ops)
        self.weights_proj = Linear(config.hidden_size, self.heads, ops, exact=True)
        self.compressor = Compressor(config, LayerKind.CSA, self.width, True, ops)
        self.scale = self.width**-0.5 * self.heads**-0.5

    def joints(self) -> tuple[tuple[Joint, ...], tuple[Joint, ...]]:
        """What meets the layer's input: rows of the compressor, then head weights; and what meets
        the query latent. No gradient goes back to either."""
        of_input = self.compressor.joint(detached=True), joint(self.weights_proj, detached=True)
        return of_input, (joint(self.wq_b, detached=True),)

    def queries(
        self, q_TW: Tensor, weight_TI: Tensor, keys: Pool, frequency: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        """Queries as rows [T, I, row] in the keys' format, and head weights f32 [T, I].

        q_TW, weight_TI  [T, I J], [T, I] as `joints` yield them
        """
        q_TIJ = q_TW.view(-1, self.heads, self.width)
        rows = self.ops.norm_rope_quantize(
            q_TIJ, None, None, spans.position_T, frequency, True, keys.format
        )
        return rows, weight_TI.float() * self.scale
