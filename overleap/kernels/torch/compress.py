"""Gated pooling of key/value rows into one entry per block (CSA and HCA), in plain torch.

Not here: projections, norm, rotation and storage of the entry (model/compressor.py).
"""

import torch
from torch import Tensor

from overleap.kernels.spans import Spans


def compress(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Tensor:
    """See spec.Ops.compress."""
    width = ape.shape[1]
    overlapped = ratio == 4
    pooled = []
    for b, (first, last) in enumerate(spans.emitted(ratio)):
        if first == last:
            continue
        fresh = rows_T2W[spans.offset[b] : spans.offset[b + 1]]
        begin = (first - overlapped) * ratio
        rows = _rows(fresh, tail[spans.slot[b]], begin, spans.start[b], last * ratio)
        blocks = rows.unflatten(0, (-1, ratio))
        value, gate = blocks[:, :, 0], blocks[:, :, 1] + ape
        if overlapped:
            half = width // 2
            value = torch.cat((value[:-1, :, :half], value[1:, :, half:]), dim=1)
            gate = torch.cat((gate[:-1, :, :half], gate[1:, :, half:]), dim=1)
        pooled.append((value * gate.softmax(dim=1)).sum(dim=1))
    if not pooled:
        return rows_T2W.new_empty((0, width // 2 if overlapped else width))
    return torch.cat(pooled)


def _rows(fresh: Tensor, tail: Tensor, begin: int, start: int, end: int) -> Tensor:
    """Rows of positions begin .. end - 1. Before the text begins: value 0, gate -inf."""
    pieces = []
    if begin < 0:
        nothing = fresh.new_zeros((-begin, *fresh.shape[1:]))
        nothing[:, 1] = -torch.inf
        pieces.append(nothing)
    old = torch.arange(max(0, begin), start, device=fresh.device)
    if old.numel():
        pieces.append(tail[old % tail.shape[0]])
    return torch.cat((*pieces, fresh[: end - start]))
