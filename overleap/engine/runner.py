"""One step of the model: from the scheduler's parts to rows of logits, and on to proposals.

Not here: which tokens run (scheduler.py), what becomes of the logits (sampler.py).
Read next: model/transformer.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.cache.state import Cache, Sequence
from overleap.engine import replay
from overleap.kernels.spans import Spans
from overleap.model.transformer import Batch, Output, Transformer

Rows = list[tuple[Sequence, list[int], int]]


def run(model: Transformer, cache: Cache, parts: Rows) -> Tensor:
    """The logits of `step`, for those who want nothing else."""
    return step(model, cache, parts).logits


def step(model: Transformer, cache: Cache, parts: Rows) -> Output:
    """Run the new tokens of several sequences in one packed step.

    parts    sequence (its pages reserved), its next token ids, how many rows of logits are wanted
    returns  f32 [R, V] logits after the last tokens of each part, as many as it wants, in order;
             and the streams [T, M, D] of all tokens, for `draft`

    Writes the cache and advances the sequences. If it raises, their state is undefined: a
    layer may have overwritten window rows that the same tokens would need again.
    """
    batch = Batch.of(
        [(sequence, ids) for sequence, ids, _ in parts], cache, [wanted for *_, wanted in parts]
    )
    with torch.inference_mode():
        return replay.step(model, batch, cache)


@dataclass(frozen=True)
class Follow:
    """Tokens whose streams the draft block takes in.

    slot    of their sequence
    at      position of the first of them in the draft block's own window
    ids     the tokens that follow each of them
    wanted  propose what follows the last of `ids`
    """

    slot: int
    at: int
    ids: list[int]
    wanted: bool


def draft(model: Transformer, cache: Cache, streams_TMD: Tensor, parts: list[Follow]) -> Tensor:
    """Run the draft block over tokens that a step has just run.

    streams_TMD  of the tokens of all parts, in order; not used by others
    returns      f32 [R, V]: its logits, one row for each part that wants a proposal
    """
    spans = Spans.of([(part.at, len(part.ids), part.slot, ()) for part in parts], cache.device)
    ids = [token for part in parts for token in part.ids]
    ends = zip(spans.offset[1:], parts, strict=True)
    rows = [end - 1 for end, part in ends if part.wanted]
    with torch.inference_mode():
        return replay.draft(
            model,
            streams_TMD,
            torch.tensor(ids, dtype=torch.int64, device=cache.device),
            cache,
            spans,
            rows=torch.tensor(rows, dtype=torch.int64, device=cache.device),
        )
