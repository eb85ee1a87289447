"""From rows of logits to tokens and their log-probabilities, defined in plain torch.

Not here: where the drawn numbers come from (engine/sampler.py). V vocabulary, Y rows of logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from overleap.devices import has_float64
from overleap.kernels.spec import Choice


def sample(
    logits_YV: Tensor, choices: Sequence[Choice], allowed_YB: Tensor | None, best: int | None
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.sample. Of a device without float64 the host draws, and keeps the f64 result."""
    if not has_float64(logits_YV.device):
        allowed_YB = None if allowed_YB is None else allowed_YB.cpu()
        ids, logprob = sample(logits_YV.cpu(), choices, allowed_YB, best)
        return ids.to(logits_YV.device), logprob
    rows, vocabulary = logits_YV.shape
    assert len(choices) == rows
    device, width = logits_YV.device, 0 if best is None else 1 + best
    ids = torch.full((rows, 1 + (best or 0)), -1, device=device)
    logprob = torch.full((rows, width), -torch.inf, dtype=torch.float64, device=device)
    for row, (logits_V, choice) in enumerate(zip(logits_YV, choices, strict=True)):
        open_V = logits_V
        if allowed_YB is not None:
            open_V = logits_V.masked_fill(~bits(allowed_YB[row], vocabulary), -torch.inf)
        if not bool((logits_V < torch.inf).all()) or bool(open_V.max() == -torch.inf):
            logprob[row] = torch.nan
            continue
        ids[row, 0] = _chosen(open_V, choice)
        if best is None:
            continue
        logprob_V = logits_V.double().log_softmax(0)
        found = largest(logits_V, best)[1]
        ids[row, 1 : 1 + len(found)] = found
        logprob[row, : 1 + len(found)] = logprob_V[ids[row, : 1 + len(found)]]
    return ids, logprob


def bits(packed_B: Tensor, count: int) -> Tensor:
    """The first `count` bits of bytes, the lowest bit of a byte first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_B.device)
    return (packed_B[:, None] >> places & 1).bool().flatten()[:count]


def _chosen(logits_V: Tensor, choice: Choice) -> int:
    if choice.temperature == 0:
        return int(logits_V.argmax())  # the first of equal maxima
    probability, ids = candidates(logits_V, choice)
    mass = probability.cumsum(0)
    place = int(torch.searchsorted(mass, choice.number * mass[-1], right=True))
    # The product may round up to the whole mass; the last candidate owns that end.
    return int(ids[min(place, len(ids) - 1)])


def candidates(logits_V: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, in order of ids. The temperature is above 0.

    returns  f64 [n] probabilities (not normalised again), i64 [n] token ids; n >= 1

    Temperature first; then top-k; top-p of what top-k left, up to and with the token that
    reaches the share; min-p relative to the likeliest. Of equal tokens the smaller ids stay.
    """
    ranked = choice.top_k is not None or choice.top_p < 1
    values, ids = logits_V, torch.arange(len(logits_V), device=logits_V.device)
    if ranked:
        values, ids = largest(values, choice.top_k)
    # Subtracting the maximum first: a temperature near zero then overflows to -inf, not to NaN.
    probability = ((values.double() - values.max()) / choice.temperature).softmax(0)
    keep = probability > 0
    if choice.top_p < 1:
        before = probability.cumsum(0).roll(1)
        before[0] = 0
        keep &= before < choice.top_p
    if choice.min_p > 0:
        keep &= probability >= choice.min_p * probability.max()
    probability, ids = probability[keep], ids[keep]
    if ranked:
        ids, order = ids.sort()
        probability = probability[order]
    return probability, ids


def largest(values_V: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """The `count` largest values (None: all) and their ids, equal values by ascending id."""
    if count is None or count >= len(values_V):
        values, ids = values_V.sort(descending=True, stable=True)
        return values, ids
    if count == 0:
        return values_V[:0], torch.empty(0, dtype=torch.int64, device=values_V.device)
    # topk leaves the order of equal values open, so it only tells the bar to pass.
    bar = values_V.topk(count).values[-1]
    ids = (values_V >= bar).nonzero().squeeze(1)
    values, order = values_V[ids].sort(descending=True, stable=True)
    return values[:count], ids[order[:count]]
