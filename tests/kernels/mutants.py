"""Wrong copies of sample and orthogonalise, and of ops at the edges of the formats.

Used by test_conformance.py, which holds that every one of them is caught.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overleap.kernels import select
from overleap.kernels.spec import Choice, Pool, RowFormat, Weight
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


def near(scale: Tensor) -> Tensor:
    """Scale bytes as a decoder with few bits would take them."""
    return scale.clamp(100, 150)


def near_weights(x: Tensor, weight: Weight, *rest: Any) -> Tensor:
    """Packed weights of extreme scales are off."""
    if weight.scale is None:
        return GOOD.matmul(x, weight, *rest)
    scale = near(weight.scale.view(torch.uint8)).view(torch.float8_e8m0fnu)
    return GOOD.matmul(x, Weight(weight.data, scale), *rest)


def without_subnormals(x: Tensor, weight: Weight, *rest: Any) -> Tensor:
    """The smallest codes of e4m3, below 2^-6, count as zero."""
    if weight.data.dtype is torch.float8_e4m3fn:
        data = weight.data.view(torch.uint8)
        data = data.masked_fill((data & 0x78) == 0, 0).view(torch.float8_e4m3fn)
        weight = Weight(data, weight.scale)
    return GOOD.matmul(x, weight, *rest)


def near_rows(rows: Tensor, format: RowFormat) -> Tensor:
    """The same of cache rows."""
    if format.kind == "wide":
        return rows
    rows = rows.clone()
    first = format.width // 2 if format.kind == "key" else format.width + format.rope
    scales = rows[..., first:]
    rows[..., first:] = torch.where((scales == 0) | (scales == 255), scales, near(scales))
    return rows


def near_entries(q: Tensor, fresh: Tensor, ring: Pool, *rest: Any) -> Result:
    return GOOD.attend(q, near_rows(fresh, ring.format), ring, *rest)


def near_keys(q: Tensor, weight: Tensor, keys: Pool, *rest: Any) -> Tensor:
    return GOOD.index_topk(q, weight, Pool(near_rows(keys.rows, keys.format), keys.format), *rest)


def near_quantize(x: Tensor, row: RowFormat) -> Tensor:
    return near_rows(GOOD.quantize(x, row), row)


EXTREME: dict[str, tuple[str, Callable[..., Any], str]] = {
    "weights of extreme scales": ("matmul", near_weights, ""),
    "subnormal codes are zero": ("matmul", without_subnormals, ""),
    "rows of extreme scales": ("attend", near_entries, ""),
    "keys of extreme scales": ("index_topk", near_keys, "exact order"),
    "extreme scales written": ("quantize", near_quantize, "rows differ"),
}
