"""Steps like one before, without Python between their ops: recorded, and played again.

A step of few tokens on small weights takes longer to be said than to be computed. Steps with as
many tokens of as many sequences, that complete as many entries, make the same calls on the same
memory; what differs lies in a few tensors, which are filled anew. All that decides which calls are
made is in `_key`. Not here: recording itself (kernels/cpu/tape.py).
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from overleap.cache.state import Cache
from overleap.config import CSA_RATIO, HCA_RATIO
from overleap.kernels import recording as record
from overleap.model.transformer import Batch, Output, Transformer

MOST_TOKENS = 16  # of a step that is recorded: more are worth their saying
MOST_BYTES = 8 * 2**20  # that recordings of a cache hold
LEAST_KEPT = 4  # recordings that must fit: how far sequences are into a block goes round
OFTEN = 3  # times that a step comes before it is recorded, which takes as long as a few of it
MOST_SEEN = 1024
RATIOS = (CSA_RATIO, HCA_RATIO)
Key = tuple[object, ...]


def step(model: Transformer, batch: Batch, cache: Cache) -> Output:
    """As `model(batch, cache)`: the same bits, and the caller's own tensors. In inference mode."""
    small = len(batch.ids_T) <= MOST_TOKENS and model.device.type == "cpu"
    if not small or model.watchers:
        output: Output = model(batch, cache)
        return output
    known = _REPLAYS.get(cache)
    if known is None or known.model is not model or known.assigned != model.assigned:
        known = _REPLAYS[cache] = Replays(model, model.assigned, off=not _all_ours(model))
    return known.step(batch, cache)


@dataclass
class Replays:
    """Recorded steps of a model on a cache, the last used at the end.

    seen   how often steps came that were said
    large  keys of steps that take more memory than they are worth
    off    its steps cannot be recorded
    """

    model: Transformer
    assigned: int
    off: bool
    kept: "OrderedDict[Key, Played]" = field(default_factory=OrderedDict)
    seen: Counter[Key] = field(default_factory=Counter)
    large: set[Key] = field(default_factory=set)

    def step(self, batch: Batch, cache: Cache) -> Output:
        """The step, played where one like it was recorded."""
        key = _key(self.model, batch)
        if (played := self.kept.get(key)) is not None:
            self.kept.move_to_end(key)
            return played.again(batch)
        self.seen[key] += 1
        often = self.seen[key] >= OFTEN and key not in self.large and not self.off
        recording = record(batch.spans, RATIOS, MOST_BYTES // LEAST_KEPT) if often else None
        if recording is None:
            if len(self.seen) > MOST_SEEN:
                self.seen.clear()
                self.large.clear()
            output: Output = self.model(batch, cache)
            return output
        with recording:
            output = self.model(batch, cache)
        self._keep(key, Played(batch, output, recording))
        return _copied(output)

    def _keep(self, key: Key, played: "Played") -> None:
        if played.recording.large:
            self.large.add(key)
            return
        if played.recording.refused is not None:
            self.off = True
            return
        self.kept[key] = played
        while sum(one.recording.nbytes for one in self.kept.values()) > MOST_BYTES:
            oldest, _ = self.kept.popitem(last=False)
            del self.seen[oldest]


@dataclass(eq=False)
class Played:
    """A recorded step: what it was given, what it yields, and its calls."""

    batch: Batch
    output: Output
    recording: Any

    def again(self, batch: Batch) -> Output:
        """The step for other tokens at other places."""
        self.batch.ids_T.copy_(batch.ids_T)
        self.recording.play(batch.spans)
        batch.advance()
        return _copied(self.output)


def _all_ours(model: Transformer) -> bool:
    """Whether all ops are the project's: another's native code would go unseen and be left out."""
    return all(op.__module__.startswith("overleap.kernels.") for op in vars(model.ops).values())


def _copied(output: Output) -> Output:
    return Output(output.logits.clone(), output.hidden.clone(), output.streams.clone())


def _key(model: Transformer, batch: Batch) -> Key:
    """What steps must have in common to make the same calls on memory of the same shapes."""
    spans = batch.spans
    blocks = spans.emitted(CSA_RATIO)
    return (
        spans.count,
        tuple(last - first for first, last in blocks),
        tuple(last - first for first, last in spans.emitted(HCA_RATIO)),
        max(last for _, last in blocks) > model.config.index_topk,
        spans.table_BP.shape[1],
        None if batch.rows is None else tuple(batch.rows.tolist()),
        torch.get_num_threads(),
    )


_REPLAYS: "WeakKeyDictionary[Cache, Replays]" = WeakKeyDictionary()
