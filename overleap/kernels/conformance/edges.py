"""What is tried at the edges: every FP8 and FP4 code with scales of every size, and no tokens.

Weights below 2^-126 may count as zero: vector instructions over bf16 take them so. Not here: usual
inputs (cases.py, sequences.py). Read next: exact.py (what must come out).
"""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from overleap.kernels.conformance import exact
from overleap.kernels.conformance.cases import EPS, FLOATS, Case, Cases
from overleap.kernels.conformance.compare import (
    RULES,
    Check,
    Finding,
    all_of,
    best_entries,
    close,
    misshapen,
    right_experts,
    same_bytes,
    wrong,
)
from overleap.kernels.conformance.draw import KEY, KEY_SHORT, KV, KV_SHORT, Draw
from overleap.kernels.conformance.exact import Exact
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Experts, Pool, Weight

NORMAL = 2.0**-126  # the smallest number that is not subnormal
# Smallest and largest scales with which every value is finite, some subnormal; and those between.
FP8_SCALES = (0, 5, 10, 64, 112, 126, 127, 128, 190, 246)
FP4_SCALES = (0, 1, 2, 64, 126, 127, 128, 190, 252)
KV_SCALES = (105, 106, 120, 127, 128, 200, 246)  # what a cache row can hold


def matmul(draw: Draw, timed: bool) -> Iterator[Case]:
    """One input at a time, so that every product of code and scale stands alone; NaN weights.

    Also a few of those inputs alone: kernels have ways of their own for few rows.
    """
    for form, weight in (("fp8", _fp8_codes(draw)), ("fp4", _fp4_codes(draw))):
        every = _one_hot(draw, weight)
        for x, dtype in product((every, every[:1], every[-4:]), FLOATS):
            for rounds in (False, True):
                args = (x.to(dtype), weight, rounds)
                want = exact.matmul(*args)
                tiny = exact.weight_values(weight).abs() < NORMAL
                lost = x.cpu().double() @ (tiny * exact.weight_values(weight).abs()).T
                check = _close_or_nan(Exact(want.want, want.size, lost), dtype)
                scales = "every scale" if x is every else f"{len(x)} inputs alone"
                name = f"{form} every code, {scales}{' rounded' * rounds}"
                yield Case("matmul", name, args, check, dtype)
    for form in ("fp8", "fp4"):
        weight = draw.weight(form, 129, 128)
        assert weight.scale is not None
        weight.scale.view(torch.uint8)[-1, :] = 255
        x = draw.normal(3, 128)
        check = _close_or_nan(exact.matmul(x, weight, False), torch.float32)
        yield Case("matmul", f"{form} with a scale that is NaN", (x, weight, False), check)
        weight, x = draw.weight(form, 33, 256), draw.normal(9, 256)
        x[1, 5], x[3, 200], x[8, 255] = math.inf, -math.inf, math.nan
        check = _close_or_nan(exact.matmul(x, weight, True), torch.float32)
        yield Case(
            "matmul", f"{form}, inputs that are no numbers, rounded", (x, weight, True), check
        )


def _fp8_codes(draw: Draw) -> Weight:
    """[256, 128 S]: row n holds code n alone; column block s has scale s."""
    data = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 128 * len(FP8_SCALES))
    scale = torch.tensor([FP8_SCALES] * 2, dtype=torch.uint8)
    return _weight(draw, data.contiguous().view(torch.float8_e4m3fn), scale)


def _fp4_codes(draw: Draw) -> Weight:
    """[16, 32 S]: row n holds code n at even inputs, code 15 - n at odd ones."""
    code = torch.arange(16)
    data = (code + 16 * (15 - code)).byte()[:, None].expand(-1, 16 * len(FP4_SCALES))
    scale = torch.tensor([FP4_SCALES] * 16, dtype=torch.uint8)
    return _weight(draw, data.contiguous().view(torch.int8), scale)


def _weight(draw: Draw, data: Tensor, scale: Tensor) -> Weight:
    return Weight(data.to(draw.device), scale.view(torch.float8_e8m0fnu).to(draw.device))


def _one_hot(draw: Draw, weight: Weight) -> Tensor:
    """Two inputs for every scale, an even and an odd one, large where the scale is small."""
    assert weight.scale is not None
    scales = weight.scale.view(torch.uint8)[0].tolist()
    packed = weight.data.dtype is torch.int8
    group = 32 if packed else 128
    x = torch.zeros(2 * len(scales), group * len(scales))
    for number, scale in enumerate(scales):
        at = group * number + 2 * int(draw.integers(0, group // 2, 1))
        x[2 * number, at] = x[2 * number + 1, at + 1] = 2.0 ** min(max(127 - scale, -10), 60)
    return x.to(draw.device)


def _close_or_nan(want: Exact, dtype: torch.dtype) -> Check:
    """NaN where the exact result is NaN, close elsewhere."""
    nan = want.want.isnan()
    slack = None if want.slack is None else want.slack.masked_fill(nan, 0)
    rest = Exact(want.want.masked_fill(nan, 0), want.size.masked_fill(nan, 1), slack)

    def check(got: object) -> Finding:
        if bad := misshapen(got, tuple(nan.shape), dtype):
            return bad
        assert isinstance(got, Tensor)
        if not bool(got.cpu()[nan].isnan().all()):
            return wrong("what is NaN became a number")
        return close(rest, dtype)(got.cpu().masked_fill(nan, 0))

    return check


def grouped_matmul(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    for form in ("bf16", "fp8"):
        args = (draw.normal(0, 3, 128), draw.weight(form, 3 * 17, 128))
        check = close(exact.grouped_matmul(*args), torch.float32)
        yield Case("grouped_matmul", f"{form} no tokens", args, check)


def rotate(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    args = (draw.normal(0, 3, 16), draw.integers(0, 9, 0), draw.normal(8).abs(), False)
    yield Case("rotate", "no tokens", args, close(exact.rotate(*args), torch.float32))


def norm_rope(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    x, position, frequency = draw.normal(0, 3, 16), draw.integers(0, 9, 0), draw.normal(8).abs()
    args = (x, draw.normal(16), EPS, position, frequency)
    yield Case("norm_rope", "no tokens", args, close(exact.norm_rope(*args), torch.float32))


def hadamard(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    x = draw.normal(0, 64)
    yield Case("hadamard", "no tokens", (x,), close(exact.hadamard(x), torch.float32))


def quantize(draw: Draw, timed: bool) -> Iterator[Case]:
    """Every scale that the rule can give, from its largest value down; no rows."""
    for row, largest, first, last in ((KV, 448.0, 105, 246), (KEY, 6.0, 1, 252)):
        scales = torch.arange(first, last + 1)
        grid = exact.E2M1 if row.kind == "key" else exact.E4M3
        codes = grid[draw.integers(0, len(grid), len(scales), row.width).cpu()]
        group = 32 if row.kind == "key" else 64
        codes[:, ::group] = largest
        x = torch.ldexp(codes, scales[:, None] - 127).float()
        x[:, row.width - row.rope :] = 1.0
        check = same_bytes(exact.row_bytes(x, row))
        name = f"{row.kind} scales {first} to {last}"
        yield Case("quantize", name, (x.to(draw.device), row), check)
    for row in (KV_SHORT, KEY_SHORT):
        x = draw.normal(0, row.width)
        check = same_bytes(exact.row_bytes(x, row))
        yield Case("quantize", f"{row.kind} no rows", (x, row), check)


def index_topk(draw: Draw, timed: bool) -> Iterator[Case]:
    """Every code, scales from 2^-124 to 2^125: ordered by value, equal ones by number."""
    scales = (3, 64, 100, 126, 127, 128, 150, 200, 252)
    entries = 16 * len(scales)
    spans = draw.spans((4 * entries - 1, 1))
    keys = draw.pool(KEY, 4, spans)
    order = torch.randperm(entries, generator=draw.generator)
    number = torch.arange(entries)
    page = spans.table_BP[0].cpu()[number // keys.per_page].to(draw.device)
    rows = torch.zeros(entries, keys.rows.shape[-1], dtype=torch.uint8)
    rows[:, 64:] = 127
    rows[:, 5] = (order % 16).byte() << 4  # code of value 11, of the first group
    rows[:, 64] = torch.tensor(scales, dtype=torch.uint8)[order // 16]
    keys.rows[page, (number % keys.per_page).to(draw.device)] = rows.to(draw.device)
    q = torch.zeros(1, 2, keys.rows.shape[-1], dtype=torch.uint8)
    q[..., 64:] = 127
    q[:, 0, 5], q[:, 1, 5] = 0x20, 0xA0  # 1 and -1: negative codes score, too
    for label, weight in (("up", (1.0, 0.5)), ("down", (-1.0, -1.0))):
        args = (q.to(draw.device), torch.tensor([weight]).to(draw.device), keys, 4, spans, entries)
        scores, sizes = exact.index_scores(*args[:5])
        check = best_entries(scores, sizes, entries, True)
        yield Case("index_topk", f"every code, every scale, {label}", args, check)


def attend(draw: Draw, timed: bool) -> Iterator[Case]:
    """Tokens that see one row alone, or one and a row of zeros, of one code and all scales."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]  # NaN would spoil the softmax of the token
    rows = draw.rows(KV, len(codes)).cpu()
    rows[:, :448] = codes[:, None]
    rows[:, 448 + 128 : 448 + 128 + 7] = torch.tensor(KV_SCALES, dtype=torch.uint8)
    rows = rows.to(draw.device)
    sink = torch.full((2,), -200.0, device=draw.device)
    for dtype in FLOATS:
        spans = draw.spans((0, len(codes)))
        q = torch.zeros(len(codes), 2, 512, dtype=dtype, device=draw.device)
        ring = draw.ring(KV, 1, spans)
        args = (q, rows, ring, None, None, 0, sink, 0.1, 1, spans)
        yield _attend("a row", args, dtype)
        spans = draw.spans((4 * len(codes), len(codes)))
        pool = draw.pool(KV, 4, spans)
        number = torch.arange(len(codes))
        page = spans.table_BP[0].cpu()[number // pool.per_page].to(draw.device)
        pool.rows[page, (number % pool.per_page).to(draw.device)] = rows
        zeros = torch.zeros_like(rows)
        zeros[:, 448 + 128 :] = 127
        zeros[:, -1] = 0
        chosen = number[:, None].to(draw.device)
        ring = draw.ring(KV, 1, spans)
        yield _attend("an entry", (q, zeros, ring, pool, chosen, 4, sink, 0.1, 1, spans), dtype)


def _attend(
    what: str,
    args: tuple[Tensor, Tensor, Pool, Pool | None, Tensor | None, int, Tensor, float, int, Spans],
    dtype: torch.dtype,
) -> Case:
    out, log = exact.attend(*args)
    check = all_of(close(out, dtype), close(log, torch.float32))
    return Case("attend", f"{what} of every code, every scale", args, check, dtype)


def route(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    args = (draw.normal(0, 64), draw.normal(9, 64), None, None, 3, 1.5)
    yield Case("route", "no tokens", args, right_experts(*args, representable=False))


def experts(draw: Draw, timed: bool) -> Iterator[Case]:
    """Down projections that hold every code; no tokens; scales that are NaN."""
    code = torch.arange(256)
    finite = torch.where((code & 127) == 127, 0, code)
    pairs = code[:32] % 16 + 16 * (15 - code[:32] % 16)
    for form, rows, scales in (
        ("fp8", finite.byte()[:, None].expand(-1, 128), [[116], [118]]),
        ("fp4", pairs.byte()[:, None].expand(-1, 64), [[120, 121, 122, 123]] * 32),
    ):
        dtype = torch.float8_e4m3fn if form == "fp8" else torch.int8
        scale = torch.tensor(scales, dtype=torch.uint8)
        w2 = _weight(draw, rows.contiguous().view(dtype), scale)
        for tokens in (0, 3):
            x, share = draw.normal(tokens, len(rows)), draw.normal(tokens, 1).abs()
            ids = torch.zeros(tokens, 1, dtype=torch.int64, device=draw.device)
            w1, w3 = (draw.weight(form, 128, len(rows)) for _ in range(2))
            args = (x, ids, share, Experts((w1,), (w2,), (w3,)), 10.0, True)
            check = close(exact.experts(*args, RULES["experts"].float32), torch.float32)
            yield Case("experts", f"{form} every code, {tokens} tokens", args, check)
        for part in range(3):
            parts = [draw.weight(form, 128, 128) for _ in range(3)]
            broken = parts[part].scale
            assert broken is not None
            broken.view(torch.uint8)[0, 0] = 255
            w1, w2, w3 = parts
            x, ids = draw.normal(3, 128), torch.zeros(3, 1, dtype=torch.int64, device=draw.device)
            args = (x, ids, draw.normal(3, 1).abs(), Experts((w1,), (w2,), (w3,)), 10.0, True)
            check = _close_or_nan(exact.experts(*args, RULES["experts"].float32), torch.float32)
            yield Case("experts", f"{form} w{part + 1} with a scale that is NaN", args, check)


def hc_pre(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    fn, base, scale = draw.normal(24, 4 * 63), draw.normal(24), draw.normal(3)
    args = (draw.normal(0, 4, 63), fn, base, scale, 20, EPS, EPS)
    check = all_of(*(close(part, torch.float32) for part in exact.hc_pre(*args)))
    yield Case("hc_pre", "no tokens", args, check)


def hc_post(draw: Draw, timed: bool) -> Iterator[Case]:
    """No tokens."""
    args = (draw.normal(0, 63), draw.normal(0, 4, 63), draw.normal(0, 4), draw.normal(0, 4, 4))
    yield Case("hc_post", "no tokens", args, close(exact.hc_post(*args), torch.float32))


EDGES: dict[str, Cases] = {
    "matmul": matmul,
    "grouped_matmul": grouped_matmul,
    "rotate": rotate,
    "norm_rope": norm_rope,
    "hadamard": hadamard,
    "quantize": quantize,
    "index_topk": index_topk,
    "attend": attend,
    "route": route,
    "experts": experts,
    "hc_pre": hc_pre,
    "hc_post": hc_post,
}
