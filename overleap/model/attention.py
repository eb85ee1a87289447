"""Attention of one layer: sliding window, and compressed entries where the layer has them.

One class, one path: prefill, chunk, decode and verification differ only in how many tokens come.
Report section 2.3; the order of norm, rotation and rounding follows the released code.
"""

from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn

from overleap.cache.state import LayerCache
from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Joint, Ops, Weight
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
        ops, stored, indexer = self.ops, self.stored, self.indexer
        visible = max(last for _, last in spans.emitted(self.ratio)) if indexer else 0
        # Where all visible entries would be chosen, nothing is scored.
        scored = indexer is not None and (visible > indexer.topk or tap is not None)
        q_THK, fresh_T, *rows = ops.attention_inputs(
            x_TD,
            stored.of_input,
            stored.of_latent if scored else stored.of_latent[:1],
            stored.q_norm,
            stored.kv_norm,
            self.eps,
            self.heads,
            spans.position_T,
            frequency,
            layer.ring.format,
        )
        if self.compressor is not None:
            assert layer.tail is not None and layer.entries is not None
            self.compressor(rows[0], x_TD.dtype, layer.tail, layer.entries, frequency, spans)
        chosen, index = None, None
        if indexer is not None:
            assert layer.index_tail is not None and layer.keys is not None
            tail, keys = layer.index_tail, layer.keys
            indexer.compressor(rows[1], x_TD.dtype, tail, keys, frequency, spans)
            if scored:
                index = indexer.queries(rows[3], rows[2], keys, frequency, spans)
            if index is not None and visible > indexer.topk:
                chosen = ops.index_topk(*index, keys, self.ratio, spans, indexer.topk)
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
        rows = () if self.compressor is None else (self.compressor.joint(),)
        index, of_latent = ((), ()) if self.indexer is None else self.indexer.joints()
        return Stored(
            (joint(self.wq_a), joint(self.wkv), *rows, *index),
            (joint(self.wq_b), *of_latent),
            self.q_norm.weight,
            self.kv_norm.weight,
            self.attn_sink,
            self.wo_a.stored,
            joint(self.wo_b),
        )
