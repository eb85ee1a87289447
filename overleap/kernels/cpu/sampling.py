"""Native sampling: tokens from rows of logits.

Not here: the arithmetic (src/kernel_sample.cpp). The definition is kernels/torch/sample.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.cpu import _native
from overleap.kernels.cpu.linear import plain
from overleap.kernels.spec import Choice


def sample(
    logits_YV: Tensor, choices: Sequence[Choice], allowed_YB: Tensor | None, best: int | None
) -> tuple[Tensor, Tensor]:
    """See spec.Ops.sample."""
    logits = plain(logits_YV)
    rows, vocabulary = logits.shape
    assert logits.dtype is torch.float32 and len(choices) == rows
    if allowed_YB is not None:
        assert allowed_YB.dtype is torch.uint8 and allowed_YB.shape == (rows, -(-vocabulary // 8))
        allowed_YB = allowed_YB.contiguous()
    ids = torch.empty(rows, 1 + (best or 0), dtype=torch.int64)
    width = 0 if best is None else 1 + best
    logprob = torch.empty(rows, width, dtype=torch.float64)
    _native.sample(
        logits.data_ptr(),
        rows,
        vocabulary,
        [choice.temperature for choice in choices],
        [min(choice.top_k or vocabulary, vocabulary) for choice in choices],
        [choice.top_p for choice in choices],
        [choice.min_p for choice in choices],
        [choice.number for choice in choices],
        0 if allowed_YB is None else allowed_YB.data_ptr(),
        -1 if best is None else best,
        ids.data_ptr(),
        logprob.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, logprob


OPS: dict[str, Callable[..., Any]] = {"sample": sample}
