"""Gated pooling against the equations, one block and one channel at a time.

Not about projections, norm and rotation around it (../oracles). Read next: paged.py.
"""

import math

import pytest
import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.torch.attention import window_write
from overleap.kernels.torch.compress import compress
from tests.kernels.paged import SIZES, layout

LAYOUTS = [[(0, n)] for n in SIZES] + [
    [(5, 127), (130, 1), (0, 3)],
    [(3, 1), (127, 1), (128, 1), (131, 1), (255, 1)],
    [(127, 1), (128, 128), (129, 63), (1000, 129)],
]


def naive(rows: Tensor, ape: Tensor, ratio: int, block: int) -> list[float]:
    """Entry `block` of one text [S, 2, W] (eqs 9-12 and 20-23)."""
    overlapped = ape.shape[1] // 2 if ratio == 4 else 0
    width = ape.shape[1] - overlapped
    entry = []
    for c in range(width):
        terms = []
        for i in range(ratio):
            value, gate = rows[block * ratio + i, :, overlapped + c].tolist()
            terms.append((value, gate + float(ape[i, overlapped + c])))
            if overlapped and block:
                value, gate = rows[(block - 1) * ratio + i, :, c].tolist()
                terms.append((value, gate + float(ape[i, c])))
        top = max(gate for _, gate in terms)
        weights = [math.exp(gate - top) for _, gate in terms]
        total = sum(w * value for w, (value, _) in zip(weights, terms, strict=True))
        entry.append(total / sum(weights))
    return entry


@pytest.mark.parametrize("parts", LAYOUTS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_compress(parts: list[tuple[int, int]], ratio: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    at = layout(parts, generator)
    width = 6 if ratio == 4 else 3
    ape = torch.randn(ratio, width, generator=generator)
    texts = [torch.randn(s + n, 2, width, generator=generator) * 3 for s, n in parts]
    capacity = (8 if ratio == 4 else 128) + 8
    tail = torch.full((len(parts) + 2, capacity, 2, width), torch.nan)
    for text, (start, _), slot in zip(texts, parts, at.slot, strict=True):
        for position in range(max(0, start - capacity), start):
            tail[slot, position % capacity] = text[position]
    fresh = torch.cat([text[s:] for text, (s, _) in zip(texts, parts, strict=True)])
    got = compress(fresh, tail, ape, ratio, at)

    expected = [
        naive(text, ape, ratio, block)
        for text, (first, last) in zip(texts, at.emitted(ratio), strict=True)
        for block in range(first, last)
    ]
    assert got.shape == (len(expected), 3)
    if expected:
        assert (got.double() - torch.tensor(expected).double()).abs().max() <= 1e-5


@pytest.mark.parametrize("ratio", [4, 128])
def test_tail_kept_by_window_write_is_enough(ratio: int, seed: int) -> None:
    """A text one token at a time, with eight tokens forgotten and read again on the way."""
    generator = torch.Generator().manual_seed(seed)
    width, length = (6 if ratio == 4 else 3), 300
    text = torch.randn(length, 2, width, generator=generator)
    ape = torch.randn(ratio, width, generator=generator)
    tail = torch.full((3, (8 if ratio == 4 else 128) + 8, 2, width), torch.nan)
    whole = compress(text, tail, ape, ratio, layout([(0, length)], generator))
    entries, position, again = dict[int, Tensor](), 0, {100, 131, 136, 257}
    while position < length:
        at = Spans.of([(position, 1, 1, [0])], torch.device("cpu"))
        new = compress(text[position : position + 1], tail, ape, ratio, at)
        window_write(tail, text[position : position + 1], at)
        if len(new):
            entries[position // ratio] = new[0]
        position += 1
        if position in again:
            again.remove(position)
            position -= 8
    assert len(entries) == length // ratio == len(whole)
    for number, entry in entries.items():
        assert (entry - whole[number]).abs().max() <= 1e-6


def test_gates_far_apart(seed: int) -> None:
    """A gate of 1e4 takes everything, and nothing overflows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, 2, 2, generator=generator)
    rows[5, 1] = 1e4
    tail = torch.full((3, 16, 2, 2), torch.nan)
    got = compress(rows, tail, torch.zeros(4, 2), 4, layout([(0, 8)], generator))
    assert got[1].equal(rows[5, 0, 1:])
