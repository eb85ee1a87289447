"""Native index_topk and attend keep the contract, and a row's bits depend on that row alone.

Read next: overleap/kernels/cpu/attention.py, overleap/kernels/conformance/sequences.py.
"""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor

from overleap.errors import BackendError
from overleap.kernels.composed import Assembled
from overleap.kernels.conformance import conform
from overleap.kernels.conformance.draw import KEY, KEY_SHORT, KV, KV_SHORT, WIDE, Draw
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat
from overleap.kernels.torch.attention import window_write
from tests.kernels.native import cuts as slices
from tests.kernels.native import isa
from tests.oracles.running import threads as threads_set

from overleap.kernels.cpu.attention import OPS, attend, index_topk  # isort: skip (needs native)

__all__ = ["isa"]


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads_set(request.param):
        yield request.param


def cuts(chooser: random.Random, tokens: int) -> list[int]:
    """Borders 0 < .. < tokens of random pieces, ends included."""
    return [0, *(piece.stop for piece in slices(tokens, chooser))]


def part_of(spans: Spans, low: int, high: int) -> Spans:
    """Tokens low .. high - 1 of the one sequence."""
    pages = cast(list[int], spans.table_BP[0].tolist())
    parts = [(spans.start[0] + low, high - low, spans.slot[0], pages)]
    return Spans.of(parts, torch.device("cpu"))


@pytest.mark.parametrize("name", sorted(OPS))
def test_it_keeps_the_contract(name: str, isa: str, seed: int) -> None:
    verdicts = conform(Assembled(OPS), "cpu", seed=seed, only=[name])
    assert len(verdicts) >= (9 if name == "attention_inputs" else 60)
    assert [v for v in verdicts if not v.passed] == []


@pytest.mark.parametrize("row", [KEY, KEY_SHORT, WIDE], ids=lambda row: f"{row.kind}{row.width}")
def test_chosen_entries_do_not_depend_on_the_call(row: RowFormat, isa: str, seed: int) -> None:
    chooser, draw = random.Random(seed), Draw(seed, torch.device("cpu"))
    start, tokens, heads = chooser.randrange(20_000), chooser.randint(2, 20), chooser.randint(1, 9)
    k = chooser.choice((1, 63, 512))
    spans = draw.spans((start, tokens))
    keys, q = draw.pool(row, 4, spans), draw.rows(row, tokens, heads)
    weight = draw.normal(tokens, heads)
    whole = index_topk(q, weight, keys, 4, spans, k)

    def pieces(borders: list[int]) -> Tensor:
        got = []
        for low, high in pairwise(borders):
            part = part_of(spans, low, high)
            got.append(index_topk(q[low:high], weight[low:high], keys, 4, part, k))
        return torch.cat(got)

    for count in (1, 2):
        with threads_set(count):
            assert torch.equal(index_topk(q, weight, keys, 4, spans, k), whole)
            assert torch.equal(pieces(list(range(tokens + 1))), whole)
            assert torch.equal(pieces(cuts(chooser, tokens)), whole)


def test_entries_that_all_tie_come_in_order(isa: str, threads: int) -> None:
    spans = Spans.of([(39_999, 1, 0, list(range(313)))], torch.device("cpu"))
    keys = Pool(torch.zeros(313, 32, 40), WIDE)
    chosen = index_topk(torch.ones(1, 3, 40), torch.ones(1, 3), keys, 4, spans, 300)
    assert chosen.tolist() == [list(range(300))]


@pytest.mark.parametrize("ratio", [0, 128, 4], ids=["window", "all", "chosen"])
@pytest.mark.parametrize("row", [KV, KV_SHORT, WIDE], ids=lambda row: f"{row.kind}{row.width}")
def test_attention_does_not_depend_on_the_call(
    row: RowFormat, ratio: int, isa: str, seed: int
) -> None:
    chooser, draw = random.Random(seed), Draw(seed, torch.device("cpu"))
    start, tokens, heads = chooser.randrange(10_000), chooser.randint(2, 90), chooser.randint(1, 17)
    dtype = chooser.choice((torch.float32, torch.bfloat16))
    spans = draw.spans((start, tokens))
    entries = draw.pool(row, ratio, spans) if ratio else None
    fresh, ring = draw.rows(row, tokens), draw.ring(row, 128, spans)
    q, sink = draw.normal(tokens, heads, row.width, dtype=dtype), draw.normal(heads)
    chosen = None
    if ratio == 4:
        chosen = torch.full((tokens, 100), -1)
        for t in range(tokens):
            some = torch.randperm((start + t + 1) // 4, generator=draw.generator)[:100]
            chosen[t, : len(some)] = some

    def pieces(borders: list[int]) -> tuple[Tensor, Tensor]:
        kept, outs, logs = Pool(ring.rows.clone(), row), [], []
        for low, high in pairwise(borders):
            part, few = part_of(spans, low, high), None if chosen is None else chosen[low:high]
            rest = (ratio, sink, 0.1, 128, part)
            out, log = attend(q[low:high], fresh[low:high], kept, entries, few, *rest)
            window_write(kept.rows, fresh[low:high], part)
            outs.append(out)
            logs.append(log)
        return torch.cat(outs), torch.cat(logs)

    whole = pieces([0, tokens])
    for count in (1, 2):
        with threads_set(count):
            for borders in ([0, tokens], list(range(tokens + 1)), cuts(chooser, tokens)):
                for got, want in zip(pieces(borders), whole, strict=True):
                    assert torch.equal(got, want)


@pytest.mark.parametrize("ratio", [0, 128, 4], ids=["window", "all", "chosen"])
@pytest.mark.parametrize("heads", [64, 97, 128])
def test_heads_are_shared_by_any_number_of_threads(heads: int, ratio: int, seed: int) -> None:
    """A step of one token: its heads go to all threads, also where they do not divide evenly."""
    chooser, draw = random.Random(seed), Draw(seed, torch.device("cpu"))
    spans = draw.spans((chooser.randrange(100, 3000), 1))
    entries = draw.pool(KV_SHORT, ratio, spans) if ratio else None
    fresh, ring = draw.rows(KV_SHORT, 1), draw.ring(KV_SHORT, 128, spans)
    q, sink = draw.normal(1, heads, KV_SHORT.width, dtype=torch.bfloat16), draw.normal(heads)
    chosen = torch.arange(24)[None] if ratio == 4 else None
    found = []
    for count in (1, 7, 14, 20, 21, chooser.randint(2, 64)):
        with threads_set(count):
            found.append(attend(q, fresh, ring, entries, chosen, ratio, sink, 0.1, 128, spans))
    for out, log in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(log, found[0][1])


def test_naming_every_visible_entry_is_naming_none(isa: str, seed: int) -> None:
    draw = Draw(seed, torch.device("cpu"))
    spans = draw.spans((777, 9))
    entries, chosen = draw.pool(KV_SHORT, 4, spans), torch.full((9, 300), -1)
    for t in range(9):
        visible = (777 + t + 1) // 4
        some = torch.randperm(300, generator=draw.generator)[:visible]
        chosen[t, some] = torch.randperm(visible, generator=draw.generator)
    q, fresh, ring = draw.normal(9, 5, 100), draw.rows(KV_SHORT, 9), draw.ring(KV_SHORT, 128, spans)
    sink = draw.normal(5)
    named = attend(q, fresh, ring, entries, chosen, 4, sink, 0.1, 128, spans)
    unnamed = attend(q, fresh, ring, entries, None, 4, sink, 0.1, 128, spans)
    assert torch.equal(named[0], unnamed[0])
    assert torch.equal(named[1], unnamed[1])


def test_a_spoiled_row_spoils_only_the_tokens_that_see_it(isa: str) -> None:
    spans = Spans.of([(0, 300, 0, [0, 1, 2])], torch.device("cpu"))
    fresh, ring = torch.ones(300, 40), Pool(torch.ones(1, 136, 40), WIDE)
    fresh[100] = torch.nan
    q, sink = torch.ones(300, 2, 40), torch.zeros(2)
    out, log = attend(q, fresh, ring, None, None, 0, sink, 0.1, 128, spans)
    spoiled = torch.arange(300)[log.isnan().any(-1)].tolist()
    assert spoiled == list(range(100, 228))
    assert torch.equal(out.isnan().any(-1), log.isnan())


def test_a_gradient_is_refused_not_lost() -> None:
    spans = Spans.of([(0, 1, 0, [0])], torch.device("cpu"))
    q = torch.ones(1, 2, 40, requires_grad=True)
    ring = Pool(torch.ones(1, 136, 40), WIDE)
    with pytest.raises(BackendError, match="no gradients"):
        attend(q, torch.ones(1, 40), ring, None, None, 0, torch.zeros(2), 0.1, 128, spans)
