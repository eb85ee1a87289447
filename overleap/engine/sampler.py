"""From a row of logits to a token and its log-probabilities.

Not here: the arithmetic (kernels/torch/sample.py), when to stop (engine.py), what the numbers mean
(request.py, `Sampling`). Read next: engine.py.

Random numbers are a function of (seed, number of the token in its answer) and nothing else: no
generator state, so batching, chunking, rewinding or another machine cannot change a draw.
V vocabulary.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.engine.request import Sampling, Token
from overleap.errors import BackendError
from overleap.kernels.spec import Choice, Ops


@dataclass(frozen=True)
class Draw:
    """What a row of logits needs to become a token.

    index  tokens of the answer before it; said: those tokens, where penalties ask for them
    """

    sampling: Sampling
    seed: int
    index: int
    said: Sequence[int] = ()


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that seed and index stand for: 53 bits of a BLAKE2b digest."""
    text = seed.to_bytes(16, "little", signed=True) + index.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, person=b"overleap sample").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_V: Tensor, draw: Draw, ops: Ops, allowed: bytes | None = None) -> Token:
    """Choose a token from one row (kernels/spec.py, `sample`).

    logits_V  f32 [V], any device; -inf forbids a token
    allowed   token `id` may be chosen where bit id % 8 of byte id // 8 is set; None: all may
    returns   the token, with log-probabilities where `draw.sampling.logprobs` asks for them

    The candidates share [0, 1) in order of ids, an order that noise in the logits cannot change, so
    seeds mean the same on another backend. A token does not depend on what is in the batch.
    Raises BackendError for logits that are NaN, +inf or all forbidden.
    """
    sampling = draw.sampling
    if sampling.shifts:
        plain = Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        where = Draw(plain, draw.seed, draw.index)
        token = sample(shifted(logits_V, draw), where, ops, allowed)
        # Log-probabilities stay those of the model's own distribution.
        if sampling.logprobs is None:
            return token
        return score(logits_V, token.id, sampling.logprobs, ops)
    mask = None
    if allowed is not None:
        mask = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)[None].to(logits_V.device)
    choice = choice_of(sampling, 0.0 if sampling.greedy else uniform(draw.seed, draw.index))
    ids, logprobs = ops.sample(logits_V[None], [choice], mask, sampling.logprobs)
    chosen, *best = ids[0].tolist()
    if chosen < 0:
        raise _refusal(float(logits_V.max()), draw.index)
    if sampling.logprobs is None:
        return Token(chosen)
    own, *values = logprobs[0].tolist()
    top = zip(best, values, strict=True)
    return Token(chosen, own, tuple((token, value) for token, value in top if token >= 0))


def shifted(logits_V: Tensor, draw: Draw) -> Tensor:
    """f32 [V]: logits without the penalties of what was said, and with the bias of tokens."""
    sampling = draw.sampling
    if not sampling.shifts:
        return logits_V
    moved_V = logits_V.clone()
    counts = Counter(draw.said)
    for token, times in counts.items():
        moved_V[token] -= sampling.presence_penalty + times * sampling.frequency_penalty
    for token, value in sampling.logit_bias:
        moved_V[token] += value
    return moved_V


def score(logits_V: Tensor, token: int, top: int, ops: Ops) -> Token:
    """A given token with its log-probability and those of the `top` likeliest."""
    only = bytearray(-(-len(logits_V) // 8))
    only[token // 8] = 1 << token % 8
    return sample(logits_V, Draw(Sampling(temperature=0, logprobs=top), 0, 0), ops, bytes(only))


def _refusal(largest: float, index: int) -> BackendError:
    if math.isfinite(largest):
        return BackendError(f"no token that is allowed as token {index} of the answer is possible")
    return BackendError(
        f"the largest logit of token {index} of the answer is {largest}",
        "`overleap conform` checks the kernels, `overleap models verify` the weights",
    )


def choice_of(sampling: Sampling, number: float) -> Choice:
    """What the op needs of a request."""
    return Choice(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, number)
