"""Native residual streams: hc_pre, hc_head, hc_post.

Not here: the arithmetic (src/kernel_streams.cpp). The definition is kernels/torch/hyper.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.cpu import _native
from overleap.kernels.cpu.linear import FLOAT, norm_weight, plain

MOST_STREAMS = 8  # as in src/rows.h


def hc_pre_norm(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec.Ops.hc_pre_norm; without the norm for None."""
    tokens, streams, _ = x_TMD.shape
    post = torch.empty(tokens, streams, dtype=torch.float32)
    comb = torch.empty(tokens, streams, streams, dtype=torch.float32)
    gates = post.data_ptr(), comb.data_ptr()
    rows = (2 + streams) * streams
    y = _collapse(x_TMD, fn, base, scale, rows, iterations, eps, norm_eps, gates, norm)
    return y, post, comb


def hc_pre(
    x_TMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See spec.Ops.hc_pre."""
    return hc_pre_norm(x_TMD, fn, base, scale, iterations, eps, norm_eps, None)


def hc_head(
    x_TMD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """See spec.Ops.hc_head."""
    return _collapse(x_TMD, fn, base, scale, x_TMD.shape[1], 0, eps, norm_eps, (0, 0), None)


def _collapse(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    rows: int,
    iterations: int,
    eps: float,
    norm_eps: float,
    gates: tuple[int, int],
    norm: Tensor | None,
) -> Tensor:
    """The gated sum of the streams [T, D]; gates: where post and comb go, 0 for neither."""
    x = plain(x)
    tokens, streams, width = x.shape
    assert streams <= MOST_STREAMS and fn.shape == (rows, streams * width)
    for part in (fn, base, scale):
        assert part.dtype is torch.float32 and part.is_contiguous()
    y = torch.empty(tokens, width, dtype=x.dtype)
    _native.collapse(
        x.data_ptr(),
        FLOAT[x.dtype],
        tokens,
        streams,
        width,
        fn.data_ptr(),
        base.data_ptr(),
        scale.data_ptr(),
        iterations,
        eps,
        norm_eps,
        y.data_ptr(),
        *gates,
        *norm_weight(norm, width),
        torch.get_num_threads(),
    )
    return y


def hc_post(y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
    """See spec.Ops.hc_post."""
    x, y = plain(x_TMD), plain(y_TD)
    post, comb = post_TM.contiguous(), comb_TMM.contiguous()
    tokens, streams, width = x.shape
    assert streams <= MOST_STREAMS and post.dtype is comb.dtype is torch.float32
    if y.dtype is not x.dtype:
        x, y = x.float(), y.float()
    out = torch.empty_like(x)
    _native.spread(
        y.data_ptr(),
        x.data_ptr(),
        FLOAT[x.dtype],
        tokens,
        streams,
        width,
        post.data_ptr(),
        comb.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x_TMD.dtype)


OPS: dict[str, Callable[..., Any]] = {
    "hc_pre": hc_pre,
    "hc_head": hc_head,
    "hc_post": hc_post,
    "hc_pre_norm": hc_pre_norm,
}
