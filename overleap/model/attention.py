"""Attention of one layer: sliding window, and compressed entries where the layer has them.

One class, one path: prefill, chunk, decode and verification differ only in how many tokens come.
Report section 2.3; the order of norm, rotation and rounding follows the released code.
"""

from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.kernels.spec import Joint, Ops, Spans, Weight
from overleap.model.compressor import Compressor
from overleap.model.indexer import Indexer, IndexerTap
from overleap.model.layers import Linear, RMSNorm, joint, parameter


class Stored(NamedTuple):
    """Weights of an attention layer as the kernels take them.

    of_input, of_latent  what meets the layer's input, and the normed query latent
    inner, outer         the grouped output projection
    """

    of_input: tuple[Joint, ...]
    of_latent: tuple[Joint, ...]
    q_norm: Tensor
    kv_norm: Tensor
    sink: Tensor
    inner: Weight
    outer: Joint


class Attention(nn.Module):
    """Multi-query attention over shared key/value rows, with a grouped output projection."""

    compressor: Compressor | None
    indexer: Indexer | None

    def __init__(self, config: ModelConfig, kind: LayerKind, ops: Ops) -> None:
        super().__init__()
        self.ops, self.kind, self.ratio = ops, kind, RATIO_OF_KIND[kind]
        self.heads, self.groups = config.num_attention_heads, config.o_groups
        self.eps, self.window = config.rms_norm_eps, config.sliding_window
        self.width, self.scale = config.head_dim, config.head_dim**-0.5
        wide = self.heads * config.head_dim
        self.attn_sink = parameter(self.heads)
        self.wq_a = Linear(config.hidden_size, config.q_lora_rank, ops)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, ops)
        self.wq_b = Linear(config.q_lora_rank, wide, ops)
        self.wkv = Linear(config.hidden_size, config.head_dim, ops)
        self.kv_norm = RMSNorm(config.head_dim, self.eps, ops)
        self.wo_a = Linear(wide // self.groups, self.groups * config.o_lora_rank, ops, exact=True)
        self.wo_b = Linear(self.groups * config.o_lora_rank, config.hidden_size, ops)
        self.compressor = self.indexer = None
        if kind is not LayerKind.SLIDING:
            self.compressor = Compressor(config, kind, config.head_dim, False, ops)
        if kind is LayerKind.CSA:
            self.indexer = Indexer(config, ops)

    def forward(
        self,
        x_TD: Tensor,
        layer: LayerCache,
        frequency: Tensor,
        spans: Spans,
        tap: list[IndexerTap] | None,
    ) -> Tensor:
        """[T, D] -> [T, D]; writes this step's rows and entries into `layer`."""
        ops, position, stored = self.ops, spans.position_T, self.stored
        latent_TQ, kv_TK, *rows = ops.project(x_TD, stored.of_input)
        (q_TW,) = ops.project(latent_TQ, stored.of_latent, stored.q_norm, self.eps)
        q_THK = q_TW.view(-1, self.heads, self.width)
        q_THK = ops.norm_rope(q_THK, None, self.eps, position, frequency)
        fresh_T = ops.norm_rope_quantize(
            kv_TK, stored.kv_norm, self.eps, position, frequency, False, layer.ring.format
        )
        if rows:
            assert self.compressor and layer.tail is not None and layer.entries is not None
            self.compressor(*rows, x_TD.dtype, layer.tail, layer.entries, frequency, spans)
        chosen, index = None, None
        if self.kind is LayerKind.CSA:
            chosen, index = self._choose(x_TD, latent_TQ, layer, frequency, spans, tap is not None)
        o_THK, lse_TH = ops.attend_write(
            q_THK,
            fresh_T,
            layer.ring,
            layer.entries,
            chosen,
            self.ratio,
            stored.sink,
            self.scale,
            self.window,
            spans,
            frequency,
        )
        if tap is not None and index is not None and layer.entries and layer.keys:
            tap.append(
                IndexerTap(
                    q_THK.detach(), lse_TH.detach(), layer.entries, layer.keys, *index, self.scale
                )
            )
        o_TGI = o_THK.view(o_THK.shape[0], self.groups, -1)
        return ops.project_back(o_TGI, stored.inner, stored.outer)

    @cached_property
    def stored(self) -> Stored:
        """The weights as the kernels take them; they must be in place."""
        rows = () if self.compressor is None else (self.compressor.joint,)
        return Stored(
            (joint(self.wq_a), joint(self.wkv), *rows),
            (joint(self.wq_b),),
            self.q_norm.weight,
            self.kv_norm.weight,
            self.attn_sink,
            self.wo_a.stored,
            joint(self.wo_b),
        )

    def _choose(
        self,
        x_TD: Tensor,
        latent_TQ: Tensor,
        layer: LayerCache,
        frequency: Tensor,
        spans: Spans,
        tapped: bool,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Entry numbers [T, k], or None where every visible entry would be chosen anyway."""
        indexer = self.indexer
        assert indexer is not None and layer.keys is not None
        weight = indexer.write_keys(x_TD.detach(), layer, frequency, spans)
        visible, topk = max(last for _, last in spans.emitted(self.ratio)), indexer.topk
        if visible <= topk and not tapped:
            return None, None
        norm = self.stored.q_norm.detach()
        index = indexer.queries(latent_TQ.detach(), norm, weight, layer.keys, frequency, spans)
        if visible <= topk:
            return None, index
        return self.ops.index_topk(*index, layer.keys, self.ratio, spans, topk), index
