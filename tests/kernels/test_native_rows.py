"""Native row ops keep the contract, and a row's bits depend on that row alone.

Read next: overleap/kernels/cpu/rows.py, streams.py, sequences.py.
"""

import random
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.conformance import conform
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat
from overleap.kernels.torch import attention as definition
from tests.kernels.native import cuts, isa
from tests.oracles.running import threads

from overleap.kernels.cpu import rows, sequences, streams  # isort: skip (skipped without native)

__all__ = ["isa"]

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16]
Results = tuple[Tensor, ...]
Run = Callable[[slice], Results]


@pytest.mark.parametrize("op", [*rows.OPS, *streams.OPS, *sequences.OPS])
def test_conforms(op: str, isa: str, seed: int) -> None:
    ops = select("cpu")
    assert getattr(ops, op).__module__.startswith("overleap.kernels.cpu.")
    verdicts = conform(ops, seed=seed, only=[op])
    assert verdicts and not [v for v in verdicts if not v.passed]


def lone_rows(total: int) -> list[slice]:
    return [slice(t, t + 1) for t in range(total)]


def same_however_cut(run: Run, total: int, number: random.Random) -> None:
    """run(rows) gives the bits of those rows of run(all), on one thread and on two."""
    with threads(1):
        whole = run(slice(0, total))
    for count in (1, 2):
        with threads(count):
            for pieces in ([slice(0, total)], cuts(total, number), lone_rows(total)):
                parts = zip(*(run(piece) for piece in pieces), strict=True)
                for part, want in zip(parts, whole, strict=True):
                    assert same_bits(torch.cat(part), want)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and a.view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES)
def test_norms_and_rotations(dtype: torch.dtype, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    tokens, heads = number.randint(2, 200), number.randint(1, 9)
    width = number.randint(64, 600)
    x = torch.randn(tokens, heads, width).to(dtype)
    position = torch.randint(1 << 20, (tokens,))
    frequency = 10000.0 ** -(torch.arange(number.randint(1, 32)) / 32)
    for weight in (None, torch.randn(width), torch.randn(width).bfloat16()):
        same_however_cut(lambda c, w=weight: (ops.rms_norm(x[c], w, 1e-6),), tokens, number)
        same_however_cut(
            lambda c, w=weight: (ops.norm_rope(x[c], w, 1e-6, position[c], frequency),),
            tokens,
            number,
        )
    for inverse in (False, True):
        same_however_cut(
            lambda c, i=inverse: (ops.rotate(x[c], position[c], frequency, i),), tokens, number
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_transforms_and_cache_rows(dtype: torch.dtype, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    tokens = number.randint(2, 200)
    x = torch.randn(tokens, 3, 1 << number.randint(0, 9)).to(dtype)
    same_however_cut(lambda c: (ops.hadamard(x[c]),), tokens, number)
    for row in (RowFormat("kv", 512, 64), RowFormat("kv", 83, 18), RowFormat("key", 128, 0)):
        values = torch.randn(tokens, row.width).to(dtype)
        same_however_cut(lambda c, v=values, r=row: (ops.quantize(v[c], r),), tokens, number)


@pytest.mark.parametrize("dtype", TYPES)
def test_streams(dtype: torch.dtype, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    tokens, width = number.randint(2, 70), number.randint(1, 2000)
    m = number.choice((1, 2, 4, 4, 5))
    x, y = torch.randn(tokens, m, width).to(dtype), torch.randn(tokens, width).to(dtype)
    fn = torch.randn((2 + m) * m, m * width) * (m * width) ** -0.5
    base, scale = torch.randn((2 + m) * m), torch.rand(3)
    same_however_cut(lambda c: ops.hc_pre(x[c], fn, base, scale, 20, 1e-6, 1e-6), tokens, number)
    same_however_cut(
        lambda c: (ops.hc_head(x[c], fn[:m], base[:m], scale[:1], 1e-6, 1e-6),), tokens, number
    )
    post, comb = torch.rand(tokens, m), torch.rand(tokens, m, m)
    same_however_cut(lambda c: (ops.hc_post(y[c], x[c], post[c], comb[c]),), tokens, number)


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_routing(dtype: torch.dtype, weight_type: torch.dtype, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    tokens, width, experts = number.randint(2, 90), number.randint(1, 600), number.randint(2, 260)
    k = number.randint(1, min(experts, 8))
    x, bias = torch.randn(tokens, width).to(dtype), torch.randn(experts)
    weight = (torch.randn(experts, width) * width**-0.5).to(weight_type)
    fixed = torch.randint(experts, (tokens, k))
    same_however_cut(lambda c: ops.route(x[c], weight, bias, None, k, 1.5), tokens, number)
    same_however_cut(lambda c: ops.route(x[c], weight, None, fixed[c], k, 1.5), tokens, number)


def spans_of(start: int, count: int, pages: int) -> Spans:
    """One sequence in slot 1, whose pages are numbered backwards."""
    return Spans.of([(start, count, 1, list(reversed(range(pages))))], CPU)


@pytest.mark.parametrize("ratio", [4, 128])
def test_pooling_and_its_storage(ratio: int, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    start, count = number.randint(0, 300), number.randint(2, 400)
    width = 2 * number.randint(1, 150)
    fresh, ape = torch.randn(count, 2, width), torch.randn(ratio, width)
    before = torch.randn(3, 2 * ratio + 8, 2, width)
    row = RowFormat("wide", width // 2 if ratio == 4 else width, 0)
    per_page, pages = 128 // ratio, -(-(start + count) // 128)

    def read(pieces: list[slice]) -> Results:
        tail = before.clone()
        pool = Pool(torch.full((pages, per_page, row.width), torch.nan), row)
        entries = []
        for piece in pieces:
            spans = spans_of(start + piece.start, piece.stop - piece.start, pages)
            entries.append(ops.compress(fresh[piece], tail, ape, ratio, spans))
            ops.window_write(tail, fresh[piece], spans)
            ops.page_write(pool, entries[-1], ratio, spans)
        return torch.cat(entries), tail, pool.rows

    with threads(1):
        whole = read([slice(0, count)])
    for used in (1, 2):
        with threads(used):
            for pieces in ([slice(0, count)], cuts(count, number), lone_rows(count)):
                for part, want in zip(read(pieces), whole, strict=True):
                    assert same_bits(part, want)


def test_several_sequences_are_written_as_the_definition_writes_them(seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    starts = [number.randint(0, 500) for _ in range(4)]
    parts = [
        (s, number.randint(0, 300), 3 - b, [b * 8 + i for i in range(8)])
        for b, s in enumerate(starts)
    ]
    spans = Spans.of(parts, CPU)
    fresh, ring = torch.randint(256, (spans.offset[-1], 7)).byte(), torch.zeros(4, 136, 7).byte()
    entries = sum(last - first for first, last in spans.emitted(4))
    made = torch.randint(256, (entries, 5)).byte()
    pool, row = torch.zeros(32, 32, 5).byte(), RowFormat("key", 8, 0)
    wanted_ring, wanted_pool = ring.clone(), pool.clone()
    ops.window_write(ring, fresh, spans)
    ops.page_write(Pool(pool, row), made, 4, spans)
    definition.window_write(wanted_ring, fresh, spans)
    definition.page_write(Pool(wanted_pool, row), made, 4, spans)
    assert ring.equal(wanted_ring) and pool.equal(wanted_pool)


def test_no_tokens(isa: str) -> None:
    ops, none = select("cpu"), torch.empty(0, 4, 64)
    position = torch.empty(0, dtype=torch.int64)
    assert ops.norm_rope(none, None, 1e-6, position, torch.ones(4)).shape == none.shape
    assert ops.quantize(none, RowFormat("kv", 64, 8)).shape == (0, 4, 80)
    y, post, comb = ops.hc_pre(
        none, torch.ones(24, 256), torch.ones(24), torch.ones(3), 20, 1e-6, 1e-6
    )
    assert (y.shape, post.shape, comb.shape) == ((0, 64), (0, 4), (0, 4, 4))
    assert ops.hc_post(y, none, post, comb).shape == none.shape
    ids, share = ops.route(none[:, 0], torch.ones(9, 64), None, None, 3, 1.0)
    assert ids.shape == share.shape == (0, 3)


def test_equal_experts_come_in_order(isa: str) -> None:
    ids, _ = select("cpu").route(torch.ones(2, 8), torch.ones(100, 8), None, None, 6, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_an_expert_whose_score_is_no_number_is_chosen(isa: str, seed: int) -> None:
    """As in the definition: what is broken is seen, and not passed over."""
    torch.manual_seed(seed)
    x = torch.randn(5, 16)
    for broken in (0, 4, 7):
        gate = torch.randn(8, 16)
        gate[broken] = torch.nan
        ids, share = select("cpu").route(x, gate, None, None, 2, 1.0)
        want, _ = select("torch").route(x, gate, None, None, 2, 1.0)
        assert torch.equal(ids, want) and bool((ids[:, 0] == broken).all())
        assert bool(share.isnan().all())


def test_gradients_are_refused() -> None:
    x, ops = torch.randn(3, 64, requires_grad=True), select("cpu")
    tried = [
        lambda: ops.rms_norm(x, None, 1e-6),
        lambda: ops.hadamard(x),
        lambda: ops.hc_post(x, torch.ones(3, 1, 64), torch.ones(3, 1), torch.ones(3, 1, 1)),
    ]
    for call in cast(list[Callable[[], object]], tried):
        with pytest.raises(BackendError, match="no gradients"):
            call()
