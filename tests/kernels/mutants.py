"""Wrong copies of sample and orthogonalise, each with one mistake that a port could make.

Used by test_conformance.py, which holds that every one of them is caught.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overleap.kernels import select
from overleap.kernels.spec import Choice
from overleap.kernels.torch import orthogonalise as newton_schulz

GOOD = select("torch")
Result = tuple[Tensor, Tensor]


def changed(change: Callable[[Choice], Choice]) -> Callable[..., Result]:
    """sample with every choice changed on the way in."""

    def op(logits: Tensor, choices: Sequence[Choice], allowed: Any, best: Any) -> Result:
        return GOOD.sample(logits, [change(choice) for choice in choices], allowed, best)

    return op


def larger_id(logits: Tensor, choices: Sequence[Choice], allowed: Any, best: Any) -> Result:
    """Of equal logits the larger id is chosen by greedy rows."""
    ids, logprob = GOOD.sample(logits, choices, allowed, best)
    for row, choice in enumerate(choices):
        if choice.temperature == 0 and ids[row, 0] >= 0 and allowed is None:
            ids[row, 0] = len(logits[row]) - 1 - int(logits[row].flip(0).argmax())
    return ids, logprob


def likeliest_first(logits: Tensor, choices: Sequence[Choice], allowed: Any, best: Any) -> Result:
    """Tokens lie on [0, 1) by probability, not by id."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    if allowed is not None or best is not None or not logits.numel():
        return GOOD.sample(logits, choices, allowed, best)
    ids, logprob = GOOD.sample(logits.gather(1, order), choices, None, best)
    return torch.where(ids < 0, ids, order.gather(1, ids.clamp(min=0))), logprob


def of_the_allowed(logits: Tensor, choices: Sequence[Choice], allowed: Any, best: Any) -> Result:
    """Log-probabilities among the allowed tokens instead of the model's own."""
    if allowed is not None:
        bits = allowed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
        open_ = bits.flatten(1).bool()[:, : logits.shape[1]]
        logits = torch.where(open_ | ~logits.isfinite(), logits, -torch.inf)
    return GOOD.sample(logits, choices, allowed, best)


def ends_fast(matrix: Tensor) -> Tensor:
    """The two steps that settle the singular values are left out."""
    kept = newton_schulz.STEPS
    try:
        newton_schulz.STEPS = kept[:8]
        return GOOD.orthogonalise(matrix)
    finally:
        newton_schulz.STEPS = kept


def divided_by_zero(matrix: Tensor) -> Tensor:
    """The norm has no floor: zeros become NaN."""
    return GOOD.orthogonalise(matrix / torch.linalg.matrix_norm(matrix.float(), keepdim=True))


CHOOSING: dict[str, tuple[str, Callable[..., Any], str]] = {
    "the larger id wins": ("sample", larger_id, "largest logit"),
    "likeliest first": ("sample", likeliest_first, ""),
    "another number": ("sample", changed(lambda c: replace(c, number=1 - c.number)), ""),
    "top-k one short": (
        "sample",
        changed(lambda c: replace(c, top_k=max(1, (c.top_k or 10**6) - 1))),
        "",
    ),
    "no top-p": ("sample", changed(lambda c: replace(c, top_p=1.0)), "was cut"),
    "no min-p": ("sample", changed(lambda c: replace(c, min_p=0.0)), "was cut"),
    "no temperature": (
        "sample",
        changed(lambda c: replace(c, temperature=min(c.temperature, 1.0))),
        "",
    ),
    "masks ignored": (
        "sample",
        lambda logits, choices, allowed, best: GOOD.sample(logits, choices, None, best),
        "",
    ),
    "log-probabilities of what is allowed": ("sample", of_the_allowed, ""),
    "singular values not settled": ("orthogonalise", ends_fast, ""),
    "zeros divided by zero": ("orthogonalise", divided_by_zero, "NaN"),
}
