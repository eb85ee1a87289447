"""Window rings, pages, attention and the choice of entries, against loops over single tokens.

Pages and slots are scattered and poisoned, so a row too many shows as NaN. Read next: paged.py.
"""

import math

import pytest
import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat
from overleap.kernels.torch import attention
from overleap.kernels.torch.attention import attend, index_topk, page_write, window_write
from overleap.kernels.torch.linear import quantize, values_of
from tests.kernels.paged import PAGE, SIZES, layout, paged, poisoned, ringed

HEADS, WIDTH, ROPE, CAPACITY, WINDOW = 3, 24, 8, 136, 128
FORMATS = {"wide": RowFormat("wide", WIDTH, 0), "kv": RowFormat("kv", WIDTH, ROPE)}
# One sequence of every size from the start, and together at odd positions.
LAYOUTS = [[(0, n)] for n in SIZES] + [
    [(5, 127), (130, 1), (0, 3)],
    [(127, 1), (128, 1), (129, 63), (1000, 129)],
]


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Writing.


@pytest.mark.parametrize("parts", LAYOUTS)
def test_window_write(parts: list[tuple[int, int]], generator: torch.Generator) -> None:
    at = layout(parts, generator)
    rows = torch.randn(at.offset[-1], 2, 5, generator=generator)
    ring = torch.full((len(parts) + 2, CAPACITY, 2, 5), torch.nan)
    window_write(ring, rows, at)
    expected = torch.full_like(ring, torch.nan)
    token = 0
    for (start, count), slot in zip(parts, at.slot, strict=True):
        for position in range(start, start + count):
            expected[slot, position % CAPACITY] = rows[token]
            token += 1
    assert ring.nan_to_num(-9).equal(expected.nan_to_num(-9))


@pytest.mark.parametrize("parts", LAYOUTS)
@pytest.mark.parametrize("ratio", [4, 128])
def test_page_write(parts: list[tuple[int, int]], ratio: int, generator: torch.Generator) -> None:
    at = layout(parts, generator)
    row = FORMATS["wide"]
    pool = poisoned(int(at.table_BP.max()) + 3, PAGE // ratio, WIDTH, row=row)
    before = pool.rows.clone()
    done = [range(start // ratio, (start + count) // ratio) for start, count in parts]
    rows = torch.randn(sum(map(len, done)), WIDTH, generator=generator)
    page_write(pool, rows, ratio, at)
    written = 0
    for b, entries in enumerate(done):
        for s in entries:
            page = int(at.table_BP[b, s * ratio // PAGE])
            place = s % (PAGE // ratio)
            assert pool.rows[page, place].equal(rows[written])
            before[page, place] = rows[written]
            written += 1
    assert pool.rows.nan_to_num(-9).equal(before.nan_to_num(-9)), "nothing else is written"


# Attention.


def naive_attend(
    q: Tensor, window: list[Tensor], entries: list[Tensor], sink: Tensor, at: Spans, allowed: list
) -> tuple[Tensor, Tensor]:
    """One token at a time in float64. allowed[t]: entry numbers."""
    outs, logs, t = [], [], 0
    for b, (start, count) in enumerate(zip(at.start, at.count, strict=True)):
        for position in range(start, start + count):
            rows = window[b][max(0, position - WINDOW + 1) : position + 1].double()
            rows = torch.cat((rows, entries[b][allowed[t]].double()))
            score = q[t].double() @ rows.t() * WIDTH**-0.5
            score = torch.cat((score, sink.double()[:, None]), dim=1)
            outs.append(score.softmax(1)[:, :-1] @ rows)
            logs.append(score.logsumexp(1))
            t += 1
    return torch.stack(outs), torch.stack(logs)


def attention_case(
    parts: list[tuple[int, int]], ratio: int, row: RowFormat, generator: torch.Generator
) -> tuple[Spans, Tensor, list[Tensor], list[Tensor], Tensor, Pool, Pool, Tensor]:
    at = layout(parts, generator)
    window = [torch.randn(s + n, WIDTH, generator=generator) for s, n in parts]
    entries = [torch.randn((s + n) // ratio, WIDTH, generator=generator) for s, n in parts]
    q = torch.randn(at.offset[-1], HEADS, WIDTH, generator=generator)
    ring = ringed(at, [w[:s] for w, (s, _) in zip(window, parts, strict=True)], CAPACITY, row)
    pool = paged(at, ratio, entries, row)
    fresh = torch.cat([w[s:] for w, (s, _) in zip(window, parts, strict=True)])
    stored = quantize(fresh, row)
    # What the rows hold is what the naive side works on.
    window = [values_of(quantize(w, row), row) for w in window]
    entries = [values_of(quantize(e, row), row) if len(e) else e for e in entries]
    return at, q, window, entries, torch.randn(HEADS, generator=generator), ring, pool, stored


@pytest.mark.parametrize("parts", LAYOUTS)
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tile", [None, 700])
def test_attend_to_every_visible_entry(
    parts: list[tuple[int, int]],
    ratio: int,
    kind: str,
    tile: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile:
        monkeypatch.setattr(attention, "TILE_VALUES", tile)
    at, q, window, entries, sink, ring, pool, fresh = attention_case(
        parts, ratio, FORMATS[kind], generator
    )
    allowed = [list(range((p + 1) // ratio)) for p in at.position_T.tolist()]
    scale = WIDTH**-0.5
    out, log = attend(q, fresh, ring, pool, None, ratio, sink, scale, WINDOW, at)
    expected, expected_log = naive_attend(q, window, entries, sink, at, allowed)
    assert (out - expected).abs().max() <= 1e-5
    assert (log - expected_log).abs().max() <= 1e-5
    assert (out.dtype, log.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("parts", LAYOUTS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tile", [None, 700])
def test_attend_to_chosen_entries(
    parts: list[tuple[int, int]],
    kind: str,
    tile: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile:
        monkeypatch.setattr(attention, "TILE_VALUES", tile)
    at, q, window, entries, sink, ring, pool, fresh = attention_case(
        parts, 4, FORMATS[kind], generator
    )
    k, allowed = 7, []
    chosen = torch.full((at.offset[-1], k), -1)
    for t, position in enumerate(at.position_T.tolist()):
        visible = (position + 1) // 4
        some = torch.randperm(visible, generator=generator)[:k]
        allowed.append(some.tolist())
        places = torch.randperm(k, generator=generator)[: len(some)]  # the -1 may stand anywhere
        chosen[t, places] = some
    scale = WIDTH**-0.5
    out, log = attend(q, fresh, ring, pool, chosen, 4, sink, scale, WINDOW, at)
    expected, expected_log = naive_attend(q, window, entries, sink, at, allowed)
    assert (out - expected).abs().max() <= 1e-5
    assert (log - expected_log).abs().max() <= 1e-5


@pytest.mark.parametrize("parts", LAYOUTS)
def test_attend_to_the_window_alone(
    parts: list[tuple[int, int]], generator: torch.Generator
) -> None:
    at, q, window, entries, sink, ring, _, fresh = attention_case(
        parts, 128, FORMATS["wide"], generator
    )
    out, log = attend(q, fresh, ring, None, None, 0, sink, WIDTH**-0.5, WINDOW, at)
    nothing: list[list[int]] = [[]] * at.offset[-1]
    expected, expected_log = naive_attend(q, window, entries, sink, at, nothing)
    assert (out - expected).abs().max() <= 1e-5
    assert (log - expected_log).abs().max() <= 1e-5


@pytest.mark.parametrize("high", [-500.0, 500.0])
def test_a_sink_far_from_every_score(high: float, generator: torch.Generator) -> None:
    """exp of the difference would overflow; the results are exact limits."""
    at, q, window, entries, _, ring, pool, fresh = attention_case(
        [(0, 9)], 4, FORMATS["wide"], generator
    )
    sink = torch.full((HEADS,), high)
    out, log = attend(q, fresh, ring, pool, None, 4, sink, WIDTH**-0.5, WINDOW, at)
    allowed = [list(range((p + 1) // 4)) for p in range(9)]
    expected, expected_log = naive_attend(q, window, entries, sink, at, allowed)
    assert (out - expected).abs().max() <= 1e-5
    assert ((log - expected_log) / expected_log).abs().max() <= 1e-5


# The choice of entries. Small whole numbers: scores are exact and ties abound.

GRID = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
KEYS = {"wide": RowFormat("wide", 32, 0), "key": RowFormat("key", 32, 0)}


def on_grid(generator: torch.Generator, *shape: int) -> Tensor:
    """Values that e2m1 holds exactly, ±6 in every group of 32 so that the scale is 1."""
    x = GRID[torch.randint(len(GRID), (*shape, 32), generator=generator)]
    x[..., 0] = 6.0
    return x


@pytest.mark.parametrize("parts", LAYOUTS)
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("k", [1, 8, 300])
@pytest.mark.parametrize("tile", [None, 500])
def test_index_topk(
    parts: list[tuple[int, int]],
    kind: str,
    k: int,
    tile: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile:
        for name in (n for n in vars(attention) if n.endswith("TILE_VALUES")):
            monkeypatch.setattr(attention, name, tile)
    heads, row, at = 2, KEYS[kind], layout(parts, generator)
    keys = [on_grid(generator, (s + n) // 4) for s, n in parts]
    for entries in keys:  # every third entry repeats an earlier one: equal scores by design
        for s in range(2, len(entries), 3):
            entries[s] = entries[s // 2]
    q = on_grid(generator, at.offset[-1], heads)
    weight = torch.randint(-2, 3, (at.offset[-1], heads), generator=generator).float()
    pool = paged(at, 4, keys, row)
    chosen = index_topk(quantize(q, row), weight, pool, 4, at, k)

    assert (chosen.shape, chosen.dtype) == ((at.offset[-1], k), torch.int64)
    ties = 0
    for b, entries in enumerate(keys):
        for t in range(at.offset[b], at.offset[b + 1]):
            visible = (int(at.position_T[t]) + 1) // 4
            score = (weight[t][:, None] * (q[t] @ entries[:visible].t()).relu()).sum(0).tolist()
            best = sorted(range(visible), key=lambda s: (-score[s], s))
            expected = best[:k] + [-1] * (k - visible)
            assert chosen[t].tolist() == expected
            ties += visible > k and score[best[k - 1]] == score[best[k]]
    if max(s + n for s, n in parts) > 500 and k < 300:
        assert ties, "the case has no tie at the cut"


def test_index_topk_where_every_score_is_zero(generator: torch.Generator) -> None:
    """All products below zero: the first entries win, for both signs of zero."""
    at = layout([(0, 129)], generator)
    pool = paged(at, 4, [-on_grid(generator, 32).abs()], KEYS["wide"])
    q = on_grid(generator, 129, 2).abs()
    weight = torch.tensor([[1.0, -1.0]]).repeat(129, 1)
    chosen = index_topk(q, weight, pool, 4, at, 5)
    for position in range(129):
        visible = min(5, (position + 1) // 4)
        assert chosen[position].tolist() == list(range(visible)) + [-1] * (5 - visible)


def test_index_topk_orders_close_and_extreme_scores(generator: torch.Generator) -> None:
    """Neighbouring float32 numbers, negative ones and large ones keep their order."""
    one = torch.tensor(1.0)
    above, below = torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)
    scores = torch.tensor([float(below), -3e30, 1e-40, float(above), 3e30, 1.0, -1.0, 0.0])
    at = layout([(0, 32)], generator)
    keys = torch.zeros(8, 32)
    keys[:, 0], keys[:, 1] = scores.clamp(min=0), (-scores).clamp(min=0)
    q = torch.zeros(32, 2, 32)
    q[:, 0, 0] = q[:, 1, 1] = 1.0
    weight = torch.tensor([[1.0, -1.0]]).repeat(32, 1)
    chosen = index_topk(q, weight, paged(at, 4, [keys], KEYS["wide"]), 4, at, 8)
    assert chosen[-1].tolist() == [4, 3, 5, 0, 2, 7, 6, 1]
    assert math.isfinite(float(scores.sum()))
