"""From a row of logits to a token and its log-probabilities.

Not here: when to stop (engine.py), what the numbers mean (request.py, `Sampling`).
Read next: engine.py.

Random numbers are a function of (seed, number of the token in its answer) and nothing else: no
generator state, so batching, chunking, rewinding or another machine cannot change a draw.
V vocabulary.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.engine.request import Sampling, Token
from overleap.errors import BackendError


@dataclass(frozen=True)
class Draw:
    """What a row of logits needs to become a token: `index` counts the tokens of the answer."""

    sampling: Sampling
    seed: int
    index: int


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that seed and index stand for: 53 bits of a BLAKE2b digest."""
    text = seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, person=b"overleap sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_V: Tensor, draw: Draw) -> Token:
    """Choose a token from one row.

    logits_V  f32 [V], any device; -inf forbids a token
    returns   the token, with log-probabilities where `draw.sampling.logprobs` asks for them

    Greedy takes the largest logit. Otherwise the candidates are cut (see `candidates`) and the
    one at which their cumulative probability, in order of ids, passes the drawn number is
    taken: an order that noise in the logits cannot change, so seeds mean the same on another
    backend. Each row is worked on alone, so a token does not depend on what is in the batch.
    Raises BackendError for logits that are NaN, +inf or all -inf.
    """
    sampling, index = draw.sampling, draw.index
    best = logits_V.argmax()  # the first of equal maxima
    if not math.isfinite(float(logits_V[best])):
        raise BackendError(
            f"the largest logit of token {index} of the answer is {float(logits_V[best])}",
            "`overleap conform` checks the kernels, `overleap models verify` the weights",
        )
    if sampling.greedy:
        chosen = int(best)
    else:
        probability, ids = candidates(logits_V, sampling)
        mass = probability.cumsum(0)
        place = int(torch.searchsorted(mass, uniform(draw.seed, index) * mass[-1], right=True))
        # The product may round up to the whole mass; the last candidate owns that end.
        chosen = int(ids[min(place, len(ids) - 1)])
    return (
        Token(chosen) if sampling.logprobs is None else score(logits_V, chosen, sampling.logprobs)
    )


def score(logits_V: Tensor, token: int, top: int) -> Token:
    """A token with its log-probability and those of the `top` likeliest."""
    logprobs_V = logits_V.double().log_softmax(0)
    values, ids = _largest(logprobs_V, top)
    return Token(
        token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
    )


def allow(logits_V: Tensor, allowed: bytes) -> Tensor:
    """The logits with -inf where a token is not allowed (see request.Walk)."""
    bits = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8)
    mask_V = (bits[:, None] >> places & 1).bool().flatten()[: len(logits_V)]
    return logits_V.masked_fill(~mask_V.to(logits_V.device), -math.inf)


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, in order of ids. The temperature is above 0.

    returns  f64 [n] probabilities (not normalised again), i64 [n] token ids; n >= 1

    Temperature first; then top-k; top-p of what top-k left, up to and with the token that
    reaches the share; min-p relative to the likeliest. Of equal tokens the smaller ids stay.
    """
    ranked = sampling.top_k is not None or sampling.top_p < 1
    values, ids = logits_V, torch.arange(len(logits_V), device=logits_V.device)
    if ranked:
        values, ids = _largest(values, sampling.top_k)
    # Subtracting the maximum first: a temperature near zero then overflows to -inf, not to NaN.
    probability = ((values.double() - values.max()) / sampling.temperature).softmax(0)
    keep = probability > 0
    if sampling.top_p < 1:
        before = probability.cumsum(0).roll(1)
        before[0] = 0
        keep &= before < sampling.top_p
    if sampling.min_p > 0:
        keep &= probability >= sampling.min_p * probability.max()
    probability, ids = probability[keep], ids[keep]
    if ranked:
        ids, order = ids.sort()
        probability = probability[order]
    return probability, ids


def _largest(values_V: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The `count` largest values (None: all) and their ids, equal values by ascending id."""
    if count is None or count >= len(values_V):
        values, ids = values_V.sort(descending=True, stable=True)
        return values, ids
    if count == 0:
        return values_V[:0], torch.empty(0, dtype=torch.int64)
    # topk leaves the order of equal values open, so it only tells the bar to pass.
    bar = values_V.topk(count).values[-1]
    ids = (values_V >= bar).nonzero().squeeze(1)
    values, order = values_V[ids].sort(descending=True, stable=True)
    return values[:count], ids[order[:count]]
