"""Answers checked against the model from scratch: no prefix, no batch, no speculation, no rewind.

The promise of state equivalence, on real weights and real requests. Not here: the test matrix
(tests/test_state.py). Read next: sampler.py (why a token can be drawn again).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.engine.request import Completion, FinishReason, Request
from overleap.engine.sampler import Draw, choice_of, sample, shifted, uniform
from overleap.errors import StateError
from overleap.kernels import native, select
from overleap.kernels.torch.sample import bits, candidates
from overleap.model.transformer import Batch, Transformer

Progress = Callable[[int, int], None]

TIE = {CacheFormat.WIDE: 1e-3, CacheFormat.RELEASE: 0.05}
LOGIT_ROWS = 32  # rows of logits at a time: 16 MiB of a vocabulary of 129,280


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


@dataclass(frozen=True)
class Sound:
    """An answer that is the model's own.

    tokens  compared, a stop token counted
    ties    of those, given otherwise where the choice was as good as even
    """

    tokens: int
    ties: int


def differences(
    model: Transformer,
    request: Request,
    completion: Completion,
    *,
    format: CacheFormat = CacheFormat.RELEASE,
    chunk_tokens: int = 512,
    progress: Progress | None = None,
) -> list[Difference]:
    """Read prompt and answer once more, into a fresh cache, and choose every token again.

    Costs about what reading the prompt cost, and `layout.cache_bytes` of memory. Tokens come from
    (seed, index), so sampled answers can be compared as well as greedy ones.

    progress  called with the tokens read so far and in all
    """
    given = _given(completion)
    ids = [*request.prompt, *given[:-1]]
    cache = Cache(
        model.config, pages=pages_for(len(ids)), slots=1, format=format, device=model.device
    )
    sequence, first = cache.open(), len(request.prompt) - 1
    cache.reserve(sequence, len(ids))
    found: list[Difference] = []
    walk = request.constraint.start() if request.constraint is not None else None
    with torch.inference_mode():
        for start, end in _pieces(len(ids) if given else 0, first, chunk_tokens):
            wanted = end - start if start >= first else 0
            rows = model(Batch.of([(sequence, ids[start:end])], cache, [wanted]), cache).logits
            for index, logits_V in enumerate(rows, start - first):
                draw = Draw(request.sampling, completion.finish.seed, index, given[:index])
                allowed = None if walk is None else walk.allowed()
                if walk is not None and index < len(completion.ids):
                    walk.accept(given[index])
                expected = sample(logits_V, draw, model.ops, allowed).id
                if expected != given[index]:
                    # On the host: some devices have no float64.
                    open_V = _open(shifted(logits_V, draw).cpu(), allowed)
                    gap = _gap(open_V, draw, given[index])
                    found.append(Difference(index, given[index], expected, gap))
            if progress is not None:
                progress(end, len(ids))
    return found


def _given(completion: Completion) -> list[int]:
    """The tokens of an answer, with the one that ended it."""
    given = completion.ids
    if completion.finish.reason is FinishReason.STOP:
        assert completion.finish.stop_id is not None
        given.append(completion.finish.stop_id)
    return given


def _pieces(total: int, first: int, chunk_tokens: int) -> Iterator[tuple[int, int]]:
    """Steps [start, end): the prompt in chunks, then, from `first` on, what yields logits."""
    start = 0
    while start < total:
        rest = start >= first
        end = min(start + (LOGIT_ROWS if rest else chunk_tokens), total if rest else first)
        yield start, end
        start = end


def _open(logits_V: Tensor, allowed: bytes | None) -> Tensor:
    """Without the tokens that a grammar forbids."""
    if allowed is None:
        return logits_V
    packed = torch.frombuffer(bytearray(allowed), dtype=torch.uint8).to(logits_V.device)
    return logits_V.masked_fill(~bits(packed, len(logits_V)), -torch.inf)


def _gap(logits_V: Tensor, draw: Draw, given: int) -> float:
    """How far the given token is from being the one that these logits choose."""
    if draw.sampling.greedy:
        return float(logits_V.max() - logits_V[given])
    probability, ids = candidates(logits_V, choice_of(draw.sampling, 0.0))
    place = (ids == given).nonzero()
    if not len(place):
        return 1.0
    mass = probability.cumsum(0) / probability.sum()
    high = float(mass[place[0]])
    low = high - float(probability[place[0]] / probability.sum())
    number = uniform(draw.seed, draw.index)
    return max(low - number, number - high, 0.0)


def _exact(model: Transformer) -> bool:
    """Whether native kernels compute every op of the model: then equal texts give equal bits."""
    on_cpu = model.device.type == "cpu"
    return on_cpu and native() and vars(model.ops) == vars(select())


def check(
    model: Transformer,
    request: Request,
    completion: Completion,
    *,
    format: CacheFormat = CacheFormat.RELEASE,
    chunk_tokens: int = 512,
    progress: Progress | None = None,
) -> Sound:
    """Raise StateError when an answer differs from what the model gives from scratch.

    Where native kernels serve, every token must be the same: their rows do not depend on each
    other. With others (`torch`), an answer may differ where the choice was as good as even (a gap
    of 1e-3 wide; 0.05 release, where a last bit can move a value to the next FP8 or FP4 code). A
    moved code can reach further: on the bundled model it changed about one token in 400 by more
    than 0.05.
    """
    others = differences(
        model, request, completion, format=format, chunk_tokens=chunk_tokens, progress=progress
    )
    exact = _exact(model)
    for found in others:
        if not exact and found.gap <= TIE[format]:
            continue
        raise StateError(
            f"token {found.index} of the answer to request {request.id} is {found.token}, from "
            f"scratch it is {found.expected}, {found.gap:.3f} apart",
            "rounding does this to a token now and then where the kernels are not the native ones; "
            "otherwise keep the prompt and report it",
        )
    return Sound(len(_given(completion)), len(others))
