"""The definition keeps the contract, and a broken op is caught: wrong tie, rounding, row, mask.

Each mutant is the definition with one mistake that a port could make. Read next:
overleap/kernels/conformance/cases.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from overleap import devices
from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.composed import Assembled
from overleap.kernels.conformance import RULES, Ceilings, Rate, Verdict, conform, op_names
from overleap.kernels.conformance.exact import index_scores, nearest, scale_of
from overleap.kernels.spec import Ops, Pool
from overleap.kernels.torch import quant
from tests.kernels.coarse_mutants import COARSE
from tests.kernels.mutants import CHOOSING, EXTREME

GOOD = select("torch")


def altered(name: str, op: Any) -> Ops:
    """The definition with one op replaced."""
    return Assembled(vars(GOOD) | {name: op})


def test_every_op_of_the_contract_has_cases_and_a_rule() -> None:
    declared = [name for name, value in vars(Ops).items() if callable(value) and name[0] != "_"]
    assert op_names() == list(RULES)
    assert sorted(op_names()) == sorted(declared)


@pytest.mark.parametrize("name", op_names())
def test_the_definition_keeps_the_contract(name: str, seed: int) -> None:
    verdicts = conform(GOOD, "cpu", seed=seed, only=[name])
    assert len(verdicts) >= 6
    assert all(v.op == name and 0 <= v.error < math.inf for v in verdicts), verdicts
    assert [v for v in verdicts if not v.passed] == []


def later_wins(q: Tensor, weight: Tensor, keys: Pool, ratio: int, spans: Any, k: int) -> Tensor:
    """Scores as defined, but the larger of equal entries wins."""
    out = torch.full((q.shape[0], k), -1)
    for t, score in enumerate(index_scores(q, weight, keys, ratio, spans)[0]):
        order = torch.sort(score.flip(0), descending=True, stable=True).indices[:k]
        out[t, : len(order)] = len(score) - 1 - order
    return out


def later_expert(x: Tensor, weight: Tensor, bias: Any, fixed: Any, k: int, scale: float) -> Any:
    flipped = None if bias is None else bias.flip(0)
    if fixed is not None:
        return GOOD.route(x, weight, bias, fixed, k, scale)
    ids, share = GOOD.route(x, weight.flip(0), flipped, None, k, scale)
    return len(weight) - 1 - ids, share


def biased_share(x: Tensor, weight: Tensor, bias: Any, fixed: Any, k: int, scale: float) -> Any:
    """The bias, meant for the choice, gets into the weights."""
    ids, share = GOOD.route(x, weight, bias, fixed, k, scale)
    if bias is not None:
        share = share + 0.01 * bias[ids]
    return ids, share


def away_from_zero(x: Tensor, row: Any) -> Tensor:
    """Ties of e4m3 and e2m1 go to the larger value instead of the even code."""
    return GOOD.quantize(x * (1 + 2.0**-20) if row.kind != "wide" else x, row)


def plain_matmul(x: Tensor, weight: Any, round_input: bool, *rest: Any) -> Tensor:
    return GOOD.matmul(x, weight, False, *rest)


def wrong_groups_matmul(x: Tensor, weight: Any, round_input: bool, *rest: Any) -> Tensor:
    """Rounds inputs by the wrong group size."""
    return GOOD.matmul(quant.round_fp8(x, 64) if round_input else x, weight, False, *rest)


def last_row_unwritten(x: Tensor, *rest: Any) -> Tensor:
    full = GOOD.matmul(x, *rest)
    out = torch.empty_like(full)
    out[:-1] = full[:-1]
    return out


def scribbling_matmul(x: Tensor, *rest: Any) -> Tensor:
    out = GOOD.matmul(x, *rest)
    x.mul_(2)
    return out


def first_token_wins(ring: Tensor, rows: Tensor, spans: Any) -> None:
    """Where more tokens come than the ring holds, the oldest stay."""
    for b in reversed(range(len(spans.start))):
        for i in reversed(range(spans.count[b])):
            at = (spans.start[b] + i) % ring.shape[1]
            ring[spans.slot[b], at] = rows[spans.offset[b] + i]


def forgetful_window(ring: Tensor, rows: Tensor, spans: Any) -> None:
    kept = ring[spans.slot[-1], (spans.start[-1] + spans.count[-1] - 1) % ring.shape[1]].clone()
    GOOD.window_write(ring, rows, spans)
    ring[spans.slot[-1], (spans.start[-1] + spans.count[-1] - 1) % ring.shape[1]] = kept


def spilling_page(pool: Pool, rows: Tensor, ratio: int, spans: Any) -> None:
    GOOD.page_write(pool, rows, ratio, spans)
    pool.rows[-1, -1] = 0


def no_past_is_zero(rows: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Any) -> Tensor:
    """The first block of a text averages over a block of zeros before it."""
    out = GOOD.compress(rows, tail, ape, ratio, spans)
    first = 0
    for begin, end in spans.emitted(ratio):
        if begin == 0 and end and ratio == 4:
            out[first] *= 0.9
        first += end - begin
    return out


def shifted_ape(rows: Tensor, tail: Tensor, ape: Tensor, ratio: int, spans: Any) -> Tensor:
    return GOOD.compress(rows, tail, ape.roll(1, 0), ratio, spans)


def attend_with(**changes: Callable[..., Any]) -> Callable[..., Any]:
    """attend with some of its arguments changed on the way in."""
    names = "q_THK fresh_T ring entries chosen_Tk ratio sink_H scale window spans".split()

    def op(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        return GOOD.attend(*[changes[n](given[n]) if n in changes else given[n] for n in names])

    return op


def future_entries(*args: Any) -> Any:
    """A token sees the entry that its own block will only complete later."""
    q, fresh, ring, entries, chosen, ratio, sink, scale, window, spans = args
    ahead = replace(spans, position_T=spans.position_T + ratio)
    return GOOD.attend(q, fresh, ring, entries, chosen, ratio, sink, scale, window, ahead)


def late_weights(
    x: Tensor, ids: Tensor, share: Tensor, experts: Any, limit: float, rounds: bool
) -> Tensor:
    """Routing weights after the down projection: right, but rounded differently."""
    out = torch.zeros_like(x, dtype=torch.float32)
    ones = torch.ones_like(share[:, :1])
    for j in range(ids.shape[1]):
        part = GOOD.experts(x, ids[:, j : j + 1], ones, experts, limit, rounds)
        out += part.float() * share[:, j : j + 1]
    return out.to(x.dtype)


def experts_with(position: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    def op(*args: Any) -> Any:
        given = list(args)
        given[position] = change(given[position])
        return GOOD.experts(*given)

    return op


def rows_last(*args: Any) -> Any:
    """Sinkhorn that ends on rows."""
    y, post, comb = GOOD.hc_pre(*args)
    return y, post, comb / comb.sum(2, keepdim=True)


def fewer_rounds(*args: Any) -> Any:
    return GOOD.hc_pre(*args[:4], 3, *args[5:])


def half_pairs(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    """Pairs (i, i + R/2) instead of (2i, 2i + 1)."""
    width = 2 * frequency.numel()
    order = torch.arange(width).view(2, -1).t().flatten()
    mixed = torch.cat((x[..., :-width], x[..., -width:][..., order]), -1)
    out = GOOD.rotate(mixed, position, frequency, inverse)
    return torch.cat((out[..., :-width], out[..., -width:][..., order.argsort()]), -1)


def exact_angle(x: Tensor, position: Tensor, frequency: Tensor, inverse: bool) -> Tensor:
    """An angle in float64: nearer the mathematics, away from what the weights were trained with."""
    angle = position.double()[:, None] * frequency.double()
    turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle)
    turn = turn[:, None] if x.dim() == 3 else turn
    width = 2 * frequency.numel()
    pairs = torch.view_as_complex(x[..., -width:].double().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat((x[..., :-width], turned.to(x.dtype)), -1)


def no_epsilon(x: Tensor, weight: Any, eps: float) -> Tensor:
    return GOOD.rms_norm(x, weight, 0.0)


MUTANTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "inputs not rounded": ("matmul", plain_matmul, ""),
    "inputs rounded in wrong groups": ("matmul", wrong_groups_matmul, ""),
    "an unwritten row": ("matmul", last_row_unwritten, "NaN"),
    "an input changed": ("matmul", scribbling_matmul, "1 of its inputs changed"),
    "the wrong dtype": ("matmul", lambda *a: GOOD.matmul(*a).double(), "returned float64"),
    "the wrong shape": ("matmul", lambda *a: GOOD.matmul(*a)[None], "expected"),
    "groups in wrong order": (
        "grouped_matmul",
        lambda x, w: GOOD.grouped_matmul(x.flip(1), w).flip(1),
        "",
    ),
    "a norm without epsilon": ("rms_norm", no_epsilon, "NaN"),
    "rotation before the norm's weight": (
        "norm_rope",
        lambda x, w, eps, p, f: (
            GOOD.rotate(GOOD.rms_norm(x, None, eps), p, f, False) * (1 if w is None else w)
        ).to(x.dtype),
        "",
    ),
    "pairs by halves": ("rotate", half_pairs, ""),
    "an angle in float64": ("rotate", exact_angle, ""),
    "no inverse": ("rotate", lambda x, p, f, inverse: GOOD.rotate(x, p, f, False), ""),
    "hadamard in another order": ("hadamard", lambda x: GOOD.hadamard(x.flip(-1)), ""),
    "ties away from zero": ("quantize", away_from_zero, "rows differ"),
    "the first token wins": ("window_write", first_token_wins, "rows differ"),
    "the last token lost": ("window_write", forgetful_window, "rows differ"),
    "another page touched": ("page_write", spilling_page, "rows differ"),
    "zeros before the text": ("compress", no_past_is_zero, ""),
    "biases one row off": ("compress", shifted_ape, ""),
    "the larger entry wins": ("index_topk", later_wins, "exact order"),
    "zeros instead of -1": (
        "index_topk",
        lambda *a: GOOD.index_topk(*a).clamp(min=0),
        "",
    ),
    "worst first": ("index_topk", lambda *a: GOOD.index_topk(*a).flip(1), ""),
    "window one short": ("attend", attend_with(window=lambda w: w - 1), ""),
    "window one long": ("attend", attend_with(window=lambda w: w + 1), "NaN"),
    "no sink": ("attend", attend_with(sink_H=lambda s: torch.full_like(s, -100.0)), ""),
    "an entry of the future": ("attend", future_entries, ""),
    "the best entry dropped": (
        "attend",
        attend_with(chosen_Tk=lambda c: c if c is None or c.shape[1] < 2 else c[:, 1:]),
        "",
    ),
    "the larger expert wins": ("route", later_expert, "larger"),
    "bias in the weights": ("route", biased_share, ""),
    "weights after rounding": ("experts", late_weights, ""),
    "no limit": ("experts", experts_with(4, lambda limit: 1e9), ""),
    "experts not rounded": ("experts", experts_with(5, lambda rounds: False), ""),
    "sinkhorn ends on rows": ("hc_pre", rows_last, ""),
    "too few rounds": ("hc_pre", fewer_rounds, ""),
    "one gate for all streams": (
        "hc_head",
        lambda x, fn, base, scale, eps, norm_eps: GOOD.hc_head(
            x, fn[:1].expand_as(fn), base, scale, eps, norm_eps
        ),
        "",
    ),
    "the mix transposed": (
        "hc_post",
        lambda y, x, post, comb: GOOD.hc_post(y, x, post, comb.transpose(1, 2)),
        "",
    ),
    **CHOOSING,
    **COARSE,
    **EXTREME,
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_broken_op_is_caught(mistake: str, seed: int) -> None:
    """By what it returns: a mutant that cannot be called at all proves nothing."""
    name, op, reason = MUTANTS[mistake]
    found = conform(altered(name, op), seed=seed, only=[name])
    failed = [v for v in found if not v.passed and v.exception is None]
    assert failed, f"{mistake} went unnoticed"
    assert any(reason in (v.reason or "") for v in failed), failed[:3]


def test_mutants_cover_every_op() -> None:
    assert {name for name, _, _ in MUTANTS.values()} == set(op_names())


def test_an_op_that_raises_or_is_missing_fails(seed: int) -> None:
    def broken(*args: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    failed = conform(altered("hadamard", broken), seed=seed, only=["hadamard"])
    assert {v.reason for v in failed} == {"raised RuntimeError: no such instruction"}
    assert all(not v.passed and v.error == math.inf for v in failed)
    ops = cast(Ops, SimpleNamespace())
    assert {v.reason for v in conform(ops, seed=seed, only=["hc_post"])} == {
        "the backend has no such op"
    }


def test_a_failure_shows_the_value_that_is_furthest_off(seed: int) -> None:
    def off(x: Tensor) -> Tensor:
        out: Tensor = GOOD.hadamard(x)
        if len(out) > 2:
            out[2].view(-1)[3] += 100
        return out

    failed = [
        v for v in conform(altered("hadamard", off), seed=seed, only=["hadamard"]) if v.reason
    ]
    assert failed and not any(v.passed for v in failed)
    assert any("worst at [2, 3]: " in (v.reason or "") for v in failed), failed


@pytest.mark.parametrize("result", [None, 7, (), torch.zeros(3), (torch.zeros(3),), "text"])
@pytest.mark.parametrize("name", ["route", "quantize", "hc_pre", "sample", "compress_write"])
def test_a_result_of_any_form_is_a_verdict(name: str, result: Any, seed: int) -> None:
    found = conform(altered(name, lambda *args: result), seed=seed, only=[name])
    assert found and not any(v.passed for v in found)
    assert all(v.reason for v in found)


def test_what_weights_work_out_once_is_not_timed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy of the arguments has its table of addresses before the clock runs."""
    running = False
    seconds = devices.seconds

    def clocked(call: Callable[[], object], device: torch.device) -> float:
        nonlocal running
        running = True
        try:
            return seconds(call, device)
        finally:
            running = False

    def experts(x: Tensor, ids: Tensor, share: Tensor, of: Any, *rest: Any) -> Tensor:
        assert "addresses" in vars(of) or not running
        return GOOD.experts(x, ids, share, of, *rest)

    monkeypatch.setattr(devices, "seconds", clocked)
    monkeypatch.setattr("overleap.kernels.conformance.run.COPIES_BYTES", 1 << 28)
    found = conform(altered("experts", experts), seed=seed, only=["experts"], timed=True)
    assert all(v.passed for v in found) and any(v.seconds for v in found)


def test_unknown_op_is_refused() -> None:
    with pytest.raises(BackendError, match="'hadamar'"):
        conform(GOOD, seed=0, only=["hadamar"])


def test_timing_is_for_right_ops_only(seed: int) -> None:
    timed = [v for v in conform(GOOD, seed=seed, only=["hc_post"], timed=True) if v.seconds]
    assert timed and all((v.gigabytes_per_second or 0) > 0 for v in timed)
    assert all(v.cost and v.cost.bytes > 4096 * 64 * 2 for v in timed)
    slow, fast = Rate(1e9, ""), Rate(1e15, "")
    light = Ceilings("cpu", 1, slow, slow, None, None)
    for v in timed:
        assert v.cost is not None and v.seconds is not None
        least = v.cost.operations / 1e9 / v.seconds
        assert v.share(replace(light, read=fast)) == (pytest.approx(least), "f32")
        least = v.cost.bytes / 1e9 / v.seconds
        assert v.share(replace(light, f32=fast)) == (pytest.approx(least), "read")
    transposed = altered("hc_post", MUTANTS["the mix transposed"][1])
    assert not any(v.seconds for v in conform(transposed, seed=seed, only=["hc_post"], timed=True))


def test_same_seed_same_verdicts_whichever_ops_run(seed: int) -> None:
    def run(only: list[str]) -> list[Verdict]:
        found = conform(GOOD, seed=seed, only=only)
        return [v for v in found if v.op == "hc_pre"]

    assert run(["hc_pre"]) == run(["rms_norm", "hc_pre"])


def test_progress_counts_ops(seed: int) -> None:
    seen: list[tuple[int, int]] = []
    conform(
        GOOD,
        seed=seed,
        only=["hc_post", "hadamard"],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_reference_rounding_by_hand() -> None:
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    sizes = torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0, 6.0, 5.1, 0.26], dtype=torch.float64)
    assert nearest(sizes, grid).tolist() == [0, 2, 2, 4, 6, 6, 7, 7, 1]
    amax = torch.tensor([6.0, 6.1, 12.0, 0.0, 3.0], dtype=torch.float64)
    assert scale_of(amax, 6.0, 6 * 2.0**-126).tolist() == [1.0, 2.0, 2.0, 2.0**-126, 0.5]
