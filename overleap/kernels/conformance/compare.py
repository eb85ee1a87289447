"""Rules of every op (tolerance, ties) and the checks that hold a result against the exact one.

Not here: how results come to be (exact.py), what is tried (cases.py, sequences.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.conformance.exact import Exact, affinity

FLOAT32 = 2.0**-19  # 16 eps: accumulated in f32 in any order
BFLOAT16 = 2.0**-6  # 4 eps of bf16: rounded on the way in, once or twice inside, and at the end


@dataclass(frozen=True)
class Rule:
    """When a result is right.

    float32, bfloat16  largest |got - exact| / size by dtype of the inputs; 0: bit for bit
    law                which of several near answers is the right one
    """

    float32: float
    bfloat16: float
    law: str


RULES: dict[str, Rule] = {
    "matmul": Rule(FLOAT32, BFLOAT16, "inputs are rounded to e4m3 exactly, a tie to the even code"),
    "grouped_matmul": Rule(FLOAT32, BFLOAT16, "inputs are not rounded"),
    "rms_norm": Rule(FLOAT32, BFLOAT16, "mean of squares in f32"),
    "norm_rope": Rule(FLOAT32, BFLOAT16, "angle = position * frequency, rounded to f32"),
    "rotate": Rule(FLOAT32, BFLOAT16, "angle = position * frequency, rounded to f32"),
    "hadamard": Rule(FLOAT32, BFLOAT16, "Sylvester order"),
    "quantize": Rule(0.0, 0.0, "every byte; a tie to the even code; padding is zero"),
    "window_write": Rule(0.0, 0.0, "every byte; the latest token of a ring row wins"),
    "page_write": Rule(0.0, 0.0, "every byte; no other row changes"),
    "compress": Rule(FLOAT32, FLOAT32, "block 0 has no block before it"),
    "index_topk": Rule(FLOAT32, FLOAT32, "equal scores (-0.0 is 0.0): the smaller entry"),
    "attend": Rule(FLOAT32, BFLOAT16, "the sink counts in the denominator only"),
    "route": Rule(FLOAT32, FLOAT32, "equal ranks: the smaller expert"),
    "experts": Rule(FLOAT32, BFLOAT16, "hidden values are weighted, then rounded as inputs are"),
    "hc_pre": Rule(FLOAT32, BFLOAT16, "Sinkhorn ends on columns"),
    "hc_head": Rule(FLOAT32, BFLOAT16, "one gate a stream, from all streams"),
    "hc_post": Rule(FLOAT32, BFLOAT16, "stream k takes comb[j, k] of stream j"),
    "sample": Rule(FLOAT32, FLOAT32, "equal logits (-0.0 is 0.0): the smaller id, in every cut"),
    "orthogonalise": Rule(2.0**-4, 2.0**-4, "products in bf16; zeros stay zeros"),
    "project": Rule(FLOAT32, BFLOAT16, "the norm's result has the type of its input"),
    "attention_inputs": Rule(FLOAT32, BFLOAT16, "the latent is normed once, for all that meets it"),
    "project_back": Rule(FLOAT32, BFLOAT16, "the first half is not rounded, the second may be"),
    "norm_rope_quantize": Rule(FLOAT32, BFLOAT16, "packed rows to the byte"),
    "compress_write": Rule(FLOAT32, FLOAT32, "entries read the tail as it was before"),
    "attend_write": Rule(FLOAT32, BFLOAT16, "rows are read before they are written"),
    "mixture": Rule(FLOAT32, BFLOAT16, "shared experts count once, with weight 1"),
    "hc_pre_norm": Rule(FLOAT32, BFLOAT16, "the norm sees y in the type of the streams"),
}


@dataclass(frozen=True)
class Finding:
    """What a check says: the error in the units of the rule, and a reason where one is needed."""

    error: float
    reason: str | None = None


Check = Callable[[Any], Finding]


def wrong(reason: str) -> Finding:
    """A result that no tolerance excuses."""
    return Finding(math.inf, reason)


def close(exact: Exact, dtype: torch.dtype, times: float = 1.0) -> Check:
    """Within the tolerance of the exact result, in this dtype; its error counts so many times."""

    def check(got: Any) -> Finding:
        if bad := misshapen(got, tuple(exact.want.shape), dtype):
            return bad
        off = (got.cpu().double() - exact.want).abs()
        if exact.slack is not None:
            off = (off - exact.slack).clamp(min=0)
        relative = torch.where(off == 0, 0.0, off / exact.size)
        if relative.isnan().any():
            return wrong(f"{int(relative.isnan().sum())} values are NaN")
        if not relative.any():
            return Finding(0.0)
        at = torch.unravel_index(relative.argmax(), relative.shape)
        place = [int(i) for i in at]
        worst = f"worst at {place}: {float(got[at]):.6g}, exact is {float(exact.want[at]):.6g}"
        return Finding(times * float(relative.max()), worst)

    return check


def all_of(*checks: Check) -> Check:
    """One check for each of several results; the worst counts."""

    def check(got: Any) -> Finding:
        if not isinstance(got, tuple) or len(got) != len(checks):
            return wrong(f"returned {type(got).__name__}, not {len(checks)} tensors")
        found = [part(value) for part, value in zip(checks, got, strict=True)]
        return max(found, key=lambda finding: finding.error)

    return check


def same_bytes(want: Tensor, where: Tensor | None = None) -> Check:
    """Bit for bit. `where`: the buffer the op writes into; without it, what it returns."""

    def check(got: Any) -> Finding:
        got = got if where is None else where
        if bad := misshapen(got, tuple(want.shape), want.dtype):
            return bad
        rows = got.cpu().contiguous().view(torch.uint8).flatten(0, -2)
        differ = (rows != want.contiguous().view(torch.uint8).flatten(0, -2)).any(-1)
        if not differ.any():
            return Finding(0.0)
        first = int(differ.nonzero()[0])
        return wrong(f"{int(differ.sum())} of {len(differ)} rows differ, the first is {first}")

    return check


def best_entries(scores: list[Tensor], sizes: list[Tensor], k: int, representable: bool) -> Check:
    """Entry numbers [T, k], best first, -1 at the end.

    representable  every score is exact in f32, so that order and ties must be exact, too;
                   otherwise entry r must score what the r-th best scores, within the tolerance
    """

    def check(got: Any) -> Finding:
        if bad := misshapen(got, (len(scores), k), torch.int64):
            return bad
        worst = 0.0
        for t, (row, score) in enumerate(zip(got.tolist(), scores, strict=True)):
            order = torch.sort(score, descending=True, stable=True).indices[:k].tolist()
            if representable and row != order + [-1] * (k - len(order)):
                return wrong(f"token {t}: {row[:8]}, exact order is {order[:8]}")
            chosen = row[: len(order)]
            if row[len(order) :] != [-1] * (k - len(order)):
                return wrong(f"token {t}: {len(score)} entries are visible, got {row[:8]}")
            if len(set(chosen)) < len(chosen) or not all(0 <= n < len(score) for n in chosen):
                return wrong(f"token {t}: an entry twice or not visible in {sorted(chosen)[:8]}")
            if chosen:
                off = (score[chosen] - score[order]).abs() / sizes[t].amax().clamp(min=1e-300)
                worst = max(worst, float(off.max()))
        return Finding(worst)

    return check


def right_experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fixed_TX: Tensor | None,
    k: int,
    scale: float,
    representable: bool,
) -> Check:
    """ids i64 [T, k] and weights f32 [T, k]; `representable` as for best_entries."""
    exact = affinity(x, weight)
    rank = exact.want if bias is None else exact.want + bias.cpu().double()
    size = exact.size if bias is None else exact.size + bias.cpu().double().abs()
    best = torch.sort(rank, dim=-1, descending=True, stable=True).indices[:, :k]

    def check(got: Any) -> Finding:
        if not isinstance(got, tuple) or len(got) != 2:
            return wrong(f"returned {type(got).__name__}, not 2 tensors")
        ids, share = got
        if bad := misshapen(ids, tuple(best.shape), torch.int64):
            return bad
        ids = ids.cpu()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rank.shape[1]:
            return wrong("an expert that does not exist")
        if fixed_TX is not None and not torch.equal(ids, fixed_TX.cpu()):
            return wrong("not the experts of the table")
        if representable and not torch.equal(ids, best):
            return wrong("ties went to larger experts")
        chosen = exact.want.gather(1, ids)
        doubt = 1 + (exact.size / exact.want).gather(1, ids).amax(-1, keepdim=True)
        want = chosen / chosen.sum(-1, keepdim=True) * scale
        found = close(Exact(want, want * doubt), torch.float32)(share)
        if fixed_TX is not None:
            return found
        if any(len(set(row)) < k for row in ids.tolist()):
            return wrong("an expert twice")
        off = (rank.gather(1, ids) - rank.gather(1, best)).abs() / size.amax(-1, keepdim=True)
        return max(found, Finding(float(off.max()) if off.numel() else 0.0), key=_error)

    return check


def misshapen(got: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Finding | None:
    """What is wrong with the form of a result, or None."""
    if not isinstance(got, Tensor):
        return wrong(f"returned {type(got).__name__}, not a tensor")
    if tuple(got.shape) != shape or got.dtype != dtype:
        form = f"{got.dtype} {list(got.shape)}, expected {dtype} {list(shape)}"
        return wrong(f"returned {form}".replace("torch.", ""))
    return None


def _error(finding: Finding) -> float:
    return finding.error
