"""Steps like one before, without Python between their ops: recorded, and played again.

A step of few tokens on small weights takes longer to be said than to be computed. Steps with as
many tokens of as many sequences, that complete as many entries, make the same calls on the same
memory; what differs lies in a few tensors, which are filled anew. All that decides which calls are
made is in `_key`. Not here: recording itself, of native calls (kernels/cpu/tape.py) or of what a
device is given (kernels/graph.py).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor

from overleap.cache.state import Cache
from overleap.config import CSA_RATIO, HCA_RATIO
from overleap.kernels import Recorder, recorder
from overleap.kernels.spans import Spans
from overleap.model.transformer import Batch, Output, Transformer

MOST_TOKENS = 16  # of a step that is recorded: more are worth their saying
MOST_BYTES = 8 * 2**20  # that recordings of a cache hold on a CPU
MOST_GRAPHS = 16  # and so many of them on a device, which does not tell what they hold
LEAST_KEPT = 4  # recordings that must fit: how far sequences are into a block goes round
OFTEN = 3  # times that a step comes before it is recorded, which takes as long as a few of it
MOST_SEEN = 1024
RATIOS = (CSA_RATIO, HCA_RATIO)
Key = tuple[object, ...]


def step(model: Transformer, batch: Batch, cache: Cache) -> Output:
    """As `model(batch, cache)`: the same bits, and the caller's own tensors. In inference mode."""
    records = _records(model, cache, batch.spans)
    if records is None:
        output: Output = model(batch, cache)
        return output
    key = _key(model, batch.spans, batch.rows)
    given = (batch.ids_T,) if batch.rows is None else (batch.ids_T, batch.rows)
    own: Cache = proxy(cache)  # a recording may hold what it was said by, and ends with its cache

    def said() -> tuple[Tensor, ...]:
        output = model.compute(batch, own)
        return output.logits, output.hidden, output.streams

    if (played := records.find(key)) is not None:
        found = played.again(batch.spans, *given)
    else:
        found = records.say(key, batch.spans, RATIOS, given, said)
    batch.advance()
    return Output(*found)


def draft(
    model: Transformer,
    streams_TMD: Tensor,
    next_T: Tensor,
    cache: Cache,
    spans: Spans,
    rows: Tensor,
) -> Tensor:
    """The logits of `model.draft`, as `step` is of the model. The tensors become the record's."""

    given, own = (streams_TMD, next_T, rows), proxy(cache)

    def said() -> tuple[Tensor, ...]:
        return model.draft(streams_TMD, next_T, own, spans, rows=rows)[:1]

    records = _records(model, cache, spans)
    if records is None:
        return said()[0]
    key = ("draft", spans.count, len(rows), torch.get_num_threads())
    if (played := records.find(key)) is not None:
        return played.again(spans, *given)[0]
    return records.say(key, spans, (), given, said)[0]


@dataclass
class Replays:
    """Recorded steps of a model on a cache, the last used at the end.

    seen   how often steps came that were said
    large  keys of steps that take more memory than they are worth
    record what records them, None where they cannot be
    """

    model: Transformer
    assigned: int
    record: Recorder | None
    kept: "OrderedDict[Key, Played]" = field(default_factory=OrderedDict)
    seen: Counter[Key] = field(default_factory=Counter)
    large: set[Key] = field(default_factory=set)

    def find(self, key: Key) -> "Played | None":
        """What was recorded of a step like this."""
        played = self.kept.get(key)
        if played is not None:
            self.kept.move_to_end(key)
        return played

    def say(
        self,
        key: Key,
        spans: Spans,
        ratios: tuple[int, ...],
        given: tuple[Tensor, ...],
        said: Callable[[], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """The step as it is said, recorded where steps like it come often.

        ratios  of the layers that it runs
        given   tensors that the next such step will have other values of
        """
        self.seen[key] += 1
        often = self.seen[key] >= OFTEN and key not in self.large
        if self.record is None or not often:
            if len(self.seen) > MOST_SEEN:
                self.seen.clear()
                self.large.clear()
            return said()
        recording = self.record(spans, ratios, MOST_BYTES // LEAST_KEPT)
        results = recording.of(said)
        self._keep(key, Played(given, results, recording))
        return _copied(results)

    def _keep(self, key: Key, played: "Played") -> None:
        if played.recording.large:
            self.large.add(key)
            return
        if played.recording.refused is not None:
            self.record = None
            self.kept.clear()
            return
        self.kept[key] = played
        while self._beyond():
            oldest, _ = self.kept.popitem(last=False)
            del self.seen[oldest]

    def _beyond(self) -> bool:
        """Whether more is kept than may be."""
        if self.model.device.type != "cpu":
            return len(self.kept) > MOST_GRAPHS
        held: int = sum(one.recording.nbytes for one in self.kept.values())
        return held > MOST_BYTES


@dataclass(eq=False)
class Played:
    """A recorded step: what it was given, what it yields, and its calls."""

    given: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    recording: Any

    def again(self, spans: Spans, *given: Tensor) -> tuple[Tensor, ...]:
        """The step for other tokens at other places."""
        for own, other in zip(self.given, given, strict=True):
            own.copy_(other)
        self.recording.play(spans)
        return _copied(self.results)


def _records(model: Transformer, cache: Cache, spans: Spans) -> Replays | None:
    """Those of the model on the cache, None where a step is not to be recorded."""
    if spans.offset[-1] > MOST_TOKENS or model.watchers:
        return None
    known = _REPLAYS.get(cache)
    if known is None or known.model is not model or known.assigned != model.assigned:
        record = recorder(model.ops, model.device)
        known = _REPLAYS[cache] = Replays(model, model.assigned, record)
    return None if known.record is None else known


def _copied(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(result.clone() for result in results)


def _key(model: Transformer, spans: Spans, rows: Tensor | None) -> Key:
    """What steps must have in common to make the same calls on memory of the same shapes."""
    blocks = spans.emitted(CSA_RATIO)
    return (
        spans.count,
        tuple(last - first for first, last in blocks),
        tuple(last - first for first, last in spans.emitted(HCA_RATIO)),
        max(last for _, last in blocks) > model.config.index_topk,
        spans.table_BP.shape[1],
        0 if model.device.type == "cpu" else spans.reach,
        None if rows is None else len(rows),
        torch.get_num_threads(),
    )


_REPLAYS: "WeakKeyDictionary[Cache, Replays]" = WeakKeyDictionary()
