"""The MTP block: from a token's streams and the next token, the token after that.

DeepSeek-V3's design at depth 1 with two separate projections (report section 2.1; released code).
Embedding and head are the main model's.
"""

from torch import Tensor

from overleap.cache.state import LayerCache
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops
from overleap.model.block import Block
from overleap.model.hyper import collapse_head, register_head
from overleap.model.layers import Linear, RMSNorm


class MTPBlock(Block):
    """A sliding-window block over e_proj(embedding of the next token) + h_proj(streams)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, LayerKind.SLIDING, False, ops)
        width = config.hidden_size
        self.e_proj = Linear(width, width, ops)
        self.h_proj = Linear(width, width, ops)
        self.enorm = RMSNorm(width, config.rms_norm_eps, ops)
        self.hnorm = RMSNorm(width, config.rms_norm_eps, ops)
        self.norm = RMSNorm(width, config.rms_norm_eps, ops)
        register_head(self, config)

    def draft(
        self, x_TMD: Tensor, next_TD: Tensor, next_T: Tensor, layer: LayerCache, spans: Spans
    ) -> tuple[Tensor, Tensor]:
        """One draft step.

        x_TMD    [T, M, D]  streams after the last main layer (or the previous draft step)
        next_TD  [T, D]     embeddings of the tokens that follow, next_T their ids
        returns  final vectors [T, D] for the shared head, and streams [T, M, D]
        """
        from_token = self.e_proj(self.enorm(next_TD))[:, None]
        tokens, streams, width = x_TMD.shape
        from_past = self.h_proj(self.hnorm(x_TMD).view(-1, width))
        x_TMD = from_token + from_past.view(tokens, streams, width)
        x_TMD = self(x_TMD, next_T, layer, spans)
        return self.norm(collapse_head(self, x_TMD, self.config, self.ops)), x_TMD
