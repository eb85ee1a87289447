"""The whole model: embed, spread to streams, blocks, collapse, head. One step over packed tokens.

It knows nothing of requests or text. Read next: block.py, attention.py, cache/state.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from overleap.cache.state import Cache, Sequence
from overleap.config import ModelConfig
from overleap.devices import current
from overleap.kernels import select
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops
from overleap.model.block import Block
from overleap.model.draft import MTPBlock
from overleap.model.hyper import collapse_head, register_head
from overleap.model.indexer import IndexerTap
from overleap.model.layers import Embedding, Linear, RMSNorm


@dataclass(frozen=True)
class Batch:
    """Packed tokens of one step.

    ids_T     i64 [T]
    spans     which tokens belong to which sequence, and where
    rows      i64 packed rows whose logits are wanted, or None for all
    sequences the sequences in order; a step advances their length
    """

    ids_T: Tensor
    spans: Spans
    rows: Tensor | None
    sequences: tuple[Sequence, ...]

    @classmethod
    def of(
        cls,
        parts: list[tuple[Sequence, list[int]]],
        cache: Cache,
        logits: Literal["last", "all", "none"] | list[int] = "last",
    ) -> Self:
        """New tokens of every sequence; their pages must be reserved.

        logits  rows wanted: every sequence's `last`, `all`, `none`, or how many of its last ones
        """
        for sequence, ids in parts:
            assert ids, "a sequence without new tokens"
            assert len(sequence.pages) * 128 >= sequence.length + len(ids), "pages not reserved"
        spans = Spans.of([(s.length, len(ids), s.slot, s.pages) for s, ids in parts], cache.device)
        if logits == "all":
            rows = None
        else:
            counts = logits if isinstance(logits, list) else [logits == "last"] * len(parts)
            ends = zip(spans.offset[1:], counts, strict=True)
            wanted = [row for end, count in ends for row in range(end - count, end)]
            rows = torch.tensor(wanted, dtype=torch.int64, device=cache.device)
        flat = [token for _, ids in parts for token in ids]
        ids_T = torch.tensor(flat, dtype=torch.int64, device=cache.device)
        return cls(ids_T, spans, rows, tuple(sequence for sequence, _ in parts))

    def advance(self) -> None:
        """The tokens are in the cache."""
        for sequence, count in zip(self.sequences, self.spans.count, strict=True):
            sequence.length += count


@dataclass(frozen=True)
class Output:
    """What a step yields.

    logits   f32 [rows wanted, V]
    hidden   [rows wanted, D]  the vectors the head saw
    streams  [T, M, D]         after the last main layer, for the draft block
    """

    logits: Tensor
    hidden: Tensor
    streams: Tensor


class Transformer(nn.Module):
    """A DeepSeek-V4 model. Built without values; `assign` puts tensors in by official name.

    watchers  who takes part in its steps beside the ops: steps with any are not played from records
    assigned  how often `assign` was called
    """

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        ops = ops or select()
        self.config, self.ops = config, ops
        self.watchers: set[object] = set()
        self.assigned = 0
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, config.is_hash_layer(number), ops)
            for number, kind in enumerate(config.layer_kinds)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.head = Linear(config.hidden_size, config.vocab_size, ops, exact=True)
        register_head(self, config)
        self.mtp = nn.ModuleList(
            MTPBlock(config, ops) for _ in range(config.num_nextn_predict_layers)
        )

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in place by official name; a packed weight brings its `.scale`."""
        self.assigned += 1
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner) if owner else self
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        for module in self.modules():
            vars(module).pop("stored", None)  # made of the weights that were

    def forward(self, batch: Batch, cache: Cache, tap: list[IndexerTap] | None = None) -> Output:
        """One step: writes the cache and advances the sequences.

        tap  collects what the indexer's distillation loss needs, one record a CSA layer
        """
        output = self.compute(batch, cache, tap)
        batch.advance()
        return output

    def compute(self, batch: Batch, cache: Cache, tap: list[IndexerTap] | None = None) -> Output:
        """The step without the advance: it may be computed again."""
        streams = self.config.hc_mult
        with current(self.device):
            x_TMD = self.embed(batch.ids_T)[:, None].expand(-1, streams, -1)
            for block, layer in zip(self.layers, cache.layers, strict=False):
                x_TMD = block(x_TMD, batch.ids_T, layer, batch.spans, tap)
            wanted = x_TMD if batch.rows is None else x_TMD[batch.rows]
            hidden = self.norm(collapse_head(self, wanted, self.config, self.ops))
            return Output(self.logits(hidden), hidden, x_TMD)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> f32 [N, V], never rounded to less: in bf16 the likeliest tokens often tie."""
        return self.ops.matmul(hidden, self.head.stored, False, wide=True)

    def draft(
        self,
        streams_TMD: Tensor,
        next_T: Tensor,
        cache: Cache,
        spans: Spans,
        stage: int = 0,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits f32 [rows, V] of the tokens after next_T, and the draft's streams (section 2.1).

        spans  of the tokens whose streams these are; the draft block keeps its own window
        rows   i64 packed rows whose logits are wanted, None for all
        """
        block = self.mtp[stage]
        assert isinstance(block, MTPBlock)
        layer = cache.layers[self.config.num_hidden_layers + stage]
        with current(self.device):
            hidden, streams_TMD = block.draft(streams_TMD, self.embed(next_T), next_T, layer, spans)
            return self.logits(hidden if rows is None else hidden[rows]), streams_TMD

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.embed.weight.dtype
