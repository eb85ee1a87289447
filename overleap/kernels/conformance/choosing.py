"""What is tried with sample and orthogonalise, and what is right there, in float64.

Read next: compare.py (rules), kernels/spec.py (what the ops promise).
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from overleap.kernels.conformance.cases import FLOATS, Case
from overleap.kernels.conformance.compare import Check, Finding, misshapen, wrong
from overleap.kernels.conformance.draw import Draw
from overleap.kernels.spec import Choice

LAST = 1 - 2.0**-53  # the largest number that a generator of 53 bits draws
CUTS = [
    (None, 1.0, 0.0),
    (5, 1.0, 0.0),
    (1, 1.0, 0.0),
    (10**6, 0.7, 0.0),
    (None, 0.9, 0.0),
    (40, 0.5, 0.1),
    (None, 1.0, 0.3),
    (None, 0.999, 1.0),
]
CLEAR = 1e-6  # no share may lie so near a cut that rounding decides which side it is on


def sample(draw: Draw, timed: bool) -> Iterator[Case]:
    """Ties, every cut, masks, forbidden and broken rows, no rows, odd vocabularies."""
    tried = product((1, 7, 63, 129, 1000, 1025), (False, True), ("normal", "ties", "narrow"))
    for number, (vocabulary, masked, kind) in enumerate(tried):
        best = (None, 0, 5, vocabulary + 3)[number % 4]
        yield _rows(draw, vocabulary, kind, masked, best)
    empty, none = torch.empty(0, 65, device=draw.device), torch.empty(0, 9, dtype=torch.uint8)
    check = _right_tokens(empty, [], None, 3)
    yield Case("sample", "no rows", (empty, [], none.to(draw.device), 3), check)
    yield _broken(draw)
    if timed:
        for name, choice, best in (
            ("greedy", Choice(0.0), None),
            ("temperature 1", Choice(1.0, number=0.4), None),
            ("top 50, top-p 0.95", Choice(1.0, 50, 0.95, number=0.4), None),
            ("greedy, 20 log-probabilities", Choice(0.0), 20),
        ):
            logits = draw.normal(1, 129280) * 3
            check = _right_tokens(logits, [choice], None, best)
            yield Case(
                "sample",
                f"129280 {name}",
                (logits, [choice], None, best),
                check,
                moved=logits.nbytes,
            )


def _rows(draw: Draw, vocabulary: int, kind: str, masked: bool, best: int | None) -> Case:
    """One row for every cut, at temperatures from almost nothing to almost even."""
    rows = 1 + len(CUTS) * (vocabulary > 1)
    logits = draw.normal(rows, vocabulary) * {"normal": 3.0, "ties": 1.5, "narrow": 2.0**-20}[kind]
    if kind == "ties":
        logits = logits.round()
        logits[logits == 0] *= -1  # zeros of both signs are equal
    forbidden = torch.rand(rows, vocabulary, generator=draw.generator) < 0.2
    logits[forbidden.to(draw.device)] = -torch.inf
    logits[:, vocabulary // 2] = 1.0
    if kind == "ties":  # at least two are the largest where that alone counts
        logits[0, [vocabulary // 2, -1]] = logits[0].max()
    allowed = _mask(draw, rows, vocabulary) if masked else None
    choices = [Choice(0.0)]
    for row, cut in enumerate(CUTS[: rows - 1], 1):
        choices.append(
            _clear_choice(draw, logits[row], None if allowed is None else allowed[row], cut)
        )
    name = f"{vocabulary} {kind}{' masked' * masked}, best {best}"
    check = _right_tokens(logits, choices, allowed, best)
    return Case("sample", name, (logits, choices, allowed, best), check)


def _mask(draw: Draw, rows: int, vocabulary: int) -> Tensor:
    """Bits at random, the rest of the last byte included; token V // 2 may always be chosen."""
    packed = draw.integers(0, 256, rows, -(-vocabulary // 8)).to(torch.uint8)
    whole = torch.rand(packed.shape, generator=draw.generator)
    packed[(whole < 0.3).to(draw.device)] = 0
    packed[(whole > 0.7).to(draw.device)] = 255
    packed[:, vocabulary // 2 // 8] |= 1 << vocabulary // 2 % 8
    return packed


def _clear_choice(
    draw: Draw, logits_V: Tensor, allowed_B: Tensor | None, cut: tuple[int | None, float, float]
) -> Choice:
    """A choice with these cuts, moved a little where rounding would decide what stays."""
    top_k, top_p, min_p = cut
    numbers = [0.0, LAST, *torch.rand(3, generator=draw.generator, dtype=torch.float64).tolist()]
    while True:
        at, number = (int(i) for i in draw.integers(0, 5, 2))
        temperature = (1e-300, 0.05, 0.7, 1.0, 1e8)[at]
        choice = Choice(temperature, top_k, top_p, min_p, numbers[number])
        if _is_clear(_kept(logits_V, choice, allowed_B)[1], choice):
            return choice
        # Equal shares lie on round numbers: the cuts move, until nothing is near them.
        top_p = top_p if top_p == 1 else top_p * 0.99
        min_p = min_p if min_p in (0, 1) else min_p * 0.99


def _is_clear(share: Tensor, choice: Choice) -> bool:
    """Whether neither cut is near a share; `share`, likeliest first, is what top_k left."""
    before = share.cumsum(0) - share
    near_p = ((before - choice.top_p).abs() < CLEAR) & (choice.top_p < 1)
    ratio = share / share[0]
    near_m = ((ratio - choice.min_p).abs() < CLEAR) & (ratio < 1) & (choice.min_p > 0)
    return not bool((near_p | near_m).any())


def _kept(logits_V: Tensor, choice: Choice, allowed_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids, likeliest first, and their shares, of what top_k leaves."""
    exact = logits_V.cpu().double()
    if allowed_B is not None:
        packed = allowed_B.cpu().long()
        token = torch.arange(len(exact))
        exact = torch.where(packed[token // 8] >> token % 8 & 1 == 1, exact, -torch.inf)
    values, ids = torch.sort(exact, descending=True, stable=True)
    ids = ids[values > -torch.inf][: choice.top_k]
    weight = ((exact[ids] - values[0]) / choice.temperature).exp()
    return ids, weight / weight.sum()


def _broken(draw: Draw) -> Case:
    """NaN and infinities, masks that leave nothing, beside a row that is right."""
    logits = draw.normal(6, 129)
    logits[0, 128], logits[1, 0], logits[2, 64] = torch.nan, torch.inf, torch.nan
    logits[3] = -torch.inf
    logits[4, 3:] = -torch.inf
    allowed = torch.full((6, 17), 255, dtype=torch.uint8, device=draw.device)
    allowed[2, 8] = 0  # what is broken counts even where it may not be chosen
    allowed[4, 0] = 0b11111000
    choices = [Choice(0.0), Choice(1.0), Choice(0.0), Choice(1.0, 3), Choice(1.0), Choice(1.0, 7)]
    check = _right_tokens(logits, choices, allowed, 2)
    return Case("sample", "rows that are not numbers", (logits, choices, allowed, 2), check)


def _right_tokens(
    logits: Tensor, choices: Sequence[Choice], allowed: Tensor | None, best: int | None
) -> Check:
    """The tokens that the numbers fall on, the best ones in order, and their log-probabilities."""
    width = 1 + (best or 0)

    def check(got: object) -> Finding:
        if not isinstance(got, tuple) or len(got) != 2:
            return wrong(f"returned {type(got).__name__}, not two tensors")
        ids, logprob = got
        shape = (len(choices), 0 if best is None else width)
        bad = misshapen(ids, (len(choices), width), torch.int64)
        if bad := bad or misshapen(logprob, shape, torch.float64):
            return bad
        worst = Finding(0.0)
        for row, choice in enumerate(choices):
            mask = None if allowed is None else allowed[row]
            found = _row(ids[row].cpu(), logprob[row].cpu(), logits[row], choice, mask, row)
            worst = max(worst, found, key=lambda finding: finding.error)
        return worst

    return check


def _row(
    ids: Tensor, logprob: Tensor, logits_V: Tensor, choice: Choice, mask: Tensor | None, row: int
) -> Finding:
    exact = logits_V.cpu().double()
    sound = not bool((exact.isnan() | (exact == torch.inf)).any())
    kept, share = _kept(logits_V, Choice(1.0) if choice.temperature == 0 else choice, mask)
    if not sound or not len(kept):
        broken = bool((ids == -1).all()) and bool(logprob.isnan().all())
        return Finding(0.0) if broken else wrong(f"row {row} cannot be chosen from: {ids[:8]}")
    order = torch.sort(exact, descending=True, stable=True).indices[: len(ids) - 1]
    want = torch.cat((order, torch.full((len(ids) - 1 - len(order),), -1)))
    if not torch.equal(ids[1:], want):
        return wrong(f"row {row}: the best are {ids[1:9].tolist()}, not {want[:8].tolist()}")
    chosen = int(ids[0])
    if choice.temperature == 0:
        if chosen != int(kept[0]):
            return wrong(f"row {row}: token {chosen}, the largest logit is at {int(kept[0])}")
        off = 0.0
    else:
        off = _distance(chosen, kept, share, choice)
    if math.isinf(off):
        return wrong(f"row {row}: token {chosen} was cut, or may not be chosen")
    if not len(logprob):
        return Finding(off)
    model = exact.log_softmax(0)[ids.clamp(min=0)].masked_fill(ids < 0, -torch.inf)
    error = torch.where(logprob == model, 0.0, (logprob - model).abs() / (1 + model.abs()))
    if error.isnan().any():
        return wrong(f"row {row}: log-probabilities {logprob[:8].tolist()}")
    return Finding(max(off, float(error.max())))


def _distance(chosen: int, ids: Tensor, share: Tensor, choice: Choice) -> float:
    """How far the number lies outside of what is the token's on [0, 1); inf if nothing is."""
    keep = (share.cumsum(0) - share < choice.top_p) | (choice.top_p == 1)
    keep &= (share >= choice.min_p * share[0]) & (share > 0)
    ids, place = ids[keep].sort()
    mass = share[keep][place].cumsum(0) / share[keep].sum()
    at = (ids == chosen).nonzero()
    if not len(at):
        return math.inf
    high = float(mass[at[0]])
    low = float(mass[at[0] - 1]) if int(at[0]) else 0.0
    return max(low - choice.number, choice.number - high, 0.0)


def orthogonalise(draw: Draw, timed: bool) -> Iterator[Case]:
    """Matrices with known singular vectors, wide and tall, in a batch, of any size; zeros."""
    shapes = [(1, 1), (63, 129), (129, 1), (127, 64), (2, 33, 65)] + [(512, 1024)] * timed
    for shape in shapes:
        for dtype in FLOATS:
            gauss = torch.randn(shape, generator=draw.generator, dtype=torch.float64)
            u, _, v = torch.linalg.svd(gauss, full_matrices=False)
            spread = torch.rand((*u.shape[:-2], 1, u.shape[-1]), generator=draw.generator)
            size = 2.0 ** int(draw.integers(-20, 21, 1))
            matrix = (u * (0.05 + 0.95 * spread) @ v * size).to(dtype).to(draw.device)
            moved = 2 * matrix.nbytes if shape == (512, 1024) else 0
            check, name = _near(u @ v), str(list(shape))
            yield Case("orthogonalise", name, (matrix,), check, dtype, moved=moved)
    for shape in ((3, 5), (0, 8), (2, 0, 7)):
        zeros = torch.zeros(shape, device=draw.device)
        check = _near(zeros.cpu().double())
        yield Case("orthogonalise", f"{list(shape)} of zeros", (zeros,), check)


def _near(want: Tensor) -> Check:
    """As a whole: the error's Frobenius norm against that of the result."""

    def check(got: object) -> Finding:
        if bad := misshapen(got, tuple(want.shape), torch.float32):
            return bad
        assert isinstance(got, Tensor)
        off = torch.linalg.vector_norm(got.cpu().double() - want)
        if off.isnan():
            return wrong("values are NaN")
        return Finding(float(off / torch.linalg.vector_norm(want).clamp(min=1e-30)))

    return check
