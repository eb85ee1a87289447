"""Answers checked against the model from scratch: no prefix, no batch, no speculation, no rewind.

The promise of state equivalence, on real weights and real requests. Not here: the test matrix
(tests/test_state.py). Read next: sampler.py (why a token can be drawn again).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.engine.request import Completion, FinishReason, Request
from overleap.engine.sampler import Draw, candidates, sample, uniform
from overleap.errors import StateError
from overleap.model.transformer import Batch, Transformer

TIE = {CacheFormat.WIDE: 1e-3, CacheFormat.RELEASE: 0.05}


@dataclass(frozen=True)
class Difference:
    """A token that comes out otherwise.

    index     in the answer
    token     that was given
    expected  from scratch
    gap       how far the given one was from being chosen: a difference of logits (greedy), or of
              the drawn number in [0, 1) (sampled)
    """

    index: int
    token: int
    expected: int
    gap: float


def differences(
    model: Transformer,
    request: Request,
    completion: Completion,
    *,
    format: CacheFormat = CacheFormat.RELEASE,
    chunk_tokens: int = 512,
) -> list[Difference]:
    """Read prompt and answer once more, into a fresh cache, and choose every token again.

    Costs about what reading the prompt cost. Tokens come from (seed, index), so sampled answers
    can be compared as well as greedy ones.
    """
    given = completion.ids
    if completion.finish.reason is FinishReason.STOP:
        assert completion.finish.stop_id is not None
        given.append(completion.finish.stop_id)
    ids = [*request.prompt, *given[:-1]]
    cache = Cache(
        model.config, pages=pages_for(len(ids)), slots=1, format=format, device=model.device
    )
    sequence, first = cache.open(), len(request.prompt) - 1
    cache.reserve(sequence, len(ids))
    found: list[Difference] = []
    with torch.inference_mode():
        for start in range(0, len(ids) if given else 0, chunk_tokens):
            chunk = ids[start : start + chunk_tokens]
            wanted = max(0, start + len(chunk) - max(start, first))
            rows = model(Batch.of([(sequence, chunk)], cache, [wanted]), cache).logits
            for offset, logits_V in enumerate(rows):
                index = start + len(chunk) - wanted + offset - first
                draw = Draw(request.sampling, completion.finish.seed, index)
                expected = sample(logits_V, draw).id
                if expected != given[index]:
                    gap = _gap(logits_V, draw, given[index])
                    found.append(Difference(index, given[index], expected, gap))
    return found


def _gap(logits_V: Tensor, draw: Draw, given: int) -> float:
    """How far the given token is from being the one that these logits choose."""
    if draw.sampling.greedy:
        return float(logits_V.max() - logits_V[given])
    probability, ids = candidates(logits_V, draw.sampling)
    place = (ids == given).nonzero()
    if not len(place):
        return 1.0
    mass = probability.cumsum(0) / probability.sum()
    high = float(mass[place[0]])
    low = high - float(probability[place[0]] / probability.sum())
    number = uniform(draw.seed, draw.index)
    return max(low - number, number - high, 0.0)


def check(
    model: Transformer,
    request: Request,
    completion: Completion,
    *,
    format: CacheFormat = CacheFormat.RELEASE,
) -> None:
    """Raise StateError when an answer differs from what the model gives from scratch.

    An answer may differ where the choice was as good as even (a gap of 1e-3 wide; 0.05 release,
    where a last bit can move a value to the next FP8 or FP4 code).
    """
    for found in differences(model, request, completion, format=format):
        if found.gap <= TIE[format]:
            continue
        raise StateError(
            f"token {found.index} of the answer to request {request.id} is {found.token}, from "
            f"scratch it is {found.expected}, {found.gap:.3f} apart",
            "keep the prompt and report it; `--no-keep` reads every prompt anew meanwhile",
        )
