"""Gated pooling of key/value rows into one entry per block, as kernels/torch/compress.py says."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.triton.tuning import pow2

CHANNELS = 64  # of an entry, in one program


@triton.jit
def pool_rows(
    rows, tail, ape, plan, out, W, C, capacity,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """CHANNELS channels of one entry: a softmax of gates over the rows of its block, or of two."""
    head = plan + tl.program_id(0) * 4
    number, offset = tl.load(head), tl.load(head + 1)
    start, slot = tl.load(head + 2), tl.load(head + 3)
    r = tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    position = (number - OVERLAP) * RATIO + r
    there = (position >= 0) & (r < (1 + OVERLAP) * RATIO)
    # Of two series the first belongs to the block before, the second to the block itself.
    column = c[None, :] + tl.where(r < OVERLAP * RATIO, 0, OVERLAP * C)[:, None]
    new = position >= start
    at_new = rows + (offset + position - start) * 2 * W
    at_old = tail + (slot * capacity + position % capacity) * 2 * W
    at = tl.where(new, at_new, at_old)[:, None] + column
    inside = there[:, None] & (c < C)[None, :]
    value = tl.load(at, mask=inside, other=0.0)
    gate = tl.load(at + W, mask=inside, other=0.0)
    gate += tl.load(ape + (r % RATIO)[:, None] * W + column, mask=inside, other=0.0)
    gate = tl.where(there[:, None], gate, float("-inf"))
    share = tl.exp(gate - tl.max(gate, axis=0, keep_dims=True))
    pooled = tl.sum(value * share, axis=0) / tl.sum(share, axis=0)
    tl.store(out + tl.program_id(0) * C + c, pooled, mask=c < C)


def blocks(spans: Spans, ratio: int) -> Tensor:
    """i64 [completed, 4]: block, first packed row of its sequence, position of that, slot."""
    rows = [
        (number, spans.offset[b], spans.start[b], spans.slot[b])
        for b, (first, last) in enumerate(spans.emitted(ratio))
        for number in range(first, last)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def compress(rows_T2W: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Spans) -> Tensor:
    """See spec.Ops.compress."""
    width, overlapped = ape.shape[1], ratio == 4
    channels = width // 2 if overlapped else width
    plan = spans.known(blocks, ratio)
    out = torch.empty((len(plan), channels), dtype=torch.float32, device=rows_T2W.device)
    if len(plan):
        block = min(CHANNELS, pow2(channels))
        pool_rows[(len(plan), triton.cdiv(channels, block))](
            rows_T2W.contiguous(), tail, ape, plan, out, width, channels, tail.shape[1],
            RATIO=ratio, OVERLAP=int(overlapped), BR=pow2((1 + overlapped) * ratio), BC=block,
        )  # fmt: skip
    return out
