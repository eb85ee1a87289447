"""Coarse ops with a mistake in each, for test_conformance: what one part forgot of another."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from overleap.kernels import select
from overleap.kernels.spec import Experts, Joint, Weight

GOOD = select("torch")


def norm_forgotten(x: Tensor, parts: Any, norm: Any = None, eps: float = 0.0) -> Any:
    return GOOD.project(x, parts)


def latent_not_normed(x: Tensor, first: Any, second: Any, q_norm: Any, *rest: Any) -> Any:
    q, fresh, *others = GOOD.attention_inputs(x, first, second, q_norm, *rest)
    bare = GOOD.project(GOOD.project(x, first)[0], second)
    return q, fresh, *others[: len(first) - 2], *bare[1:]


def never_rounded(o_TGI: Tensor, inner: Weight, outer: Joint) -> Tensor:
    plain = Joint(outer.weights, False, not outer.wide)
    return GOOD.project_back(o_TGI, inner, plain)


def not_mixed(x: Tensor, *args: Any) -> Tensor:
    *before, _, row = args
    return GOOD.norm_rope_quantize(x, *before, False, row)


def tail_first(rows: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Any) -> Tensor:
    GOOD.window_write(tail, rows, spans)
    return GOOD.compress(rows, tail, ape, ratio, spans)


def tail_forgotten(rows: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Any) -> Tensor:
    return GOOD.compress(rows, tail, ape, ratio, spans)


def ring_first(q: Tensor, fresh: Tensor, ring: Any, *args: Any) -> Any:
    *_, spans, _ = args
    GOOD.window_write(ring.rows, fresh, spans)
    return GOOD.attend_write(q, fresh, ring, *args)


def never_turned_back(q: Tensor, fresh: Tensor, ring: Any, *args: Any) -> Any:
    *rest, spans, _ = args
    result = GOOD.attend(q, fresh, ring, *rest, spans)
    GOOD.window_write(ring.rows, fresh, spans)
    return result


def nobody_shared(
    x: Tensor, ids: Tensor, share: Tensor, routed: Experts, shared: Experts, limit: float
) -> Tensor:
    return GOOD.experts(x, ids, share, routed, limit, routed.w1[0].packed)


def weight_forgotten(x: Tensor, *args: Any) -> Any:
    *rest, _ = args
    return GOOD.hc_pre(x, *rest)


COARSE: dict[str, tuple[str, Callable[..., Any], str]] = {
    "no norm before the products": ("project", norm_forgotten, ""),
    "a latent without its norm": ("attention_inputs", latent_not_normed, ""),
    "results of the wrong type": ("project_back", never_rounded, "expected"),
    "queries not mixed": ("norm_rope_quantize", not_mixed, ""),
    "the tail written first": ("compress_write", tail_first, ""),
    "the tail not written": ("compress_write", tail_forgotten, "rows differ"),
    "the ring written first": ("attend_write", ring_first, ""),
    "values never turned back": ("attend_write", never_turned_back, ""),
    "the shared expert left out": ("mixture", nobody_shared, ""),
    "y not normed": ("hc_pre_norm", weight_forgotten, ""),
}
