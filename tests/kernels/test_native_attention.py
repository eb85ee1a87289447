"""Native index_topk and attend keep the contract, and a row's bits depend on that row alone.

Read next: overleap/kernels/cpu/attention.py, overleap/kernels/conformance/sequences.py.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from overleap.kernels.conformance import conform
from overleap.kernels.conformance.draw import KEY, KEY_SHORT, WIDE, Draw
from overleap.kernels.spec import Ops, Pool, RowFormat, Spans

native = pytest.importorskip(
    "overleap.kernels.cpu._native", reason="the native kernels were not built", exc_type=ImportError
)
from overleap.kernels.cpu.attention import OPS, index_topk  # noqa: E402


def present() -> list[str]:
    """Instruction sets of this machine."""
    best, found = native.isa(), []
    for name in ("portable", "avx2", "avx512"):
        try:
            native.set_isa(name)
            found.append(name)
        except ValueError:
            pass
    native.set_isa(best)
    return found


@pytest.fixture(params=present())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads_set(request.param):
        yield request.param


def cuts(chooser: random.Random, tokens: int) -> list[int]:
    """Borders 0 < .. < tokens of random pieces, ends included."""
    inner = chooser.sample(range(1, tokens), min(tokens - 1, chooser.randrange(6)))
    return [0, *sorted(inner), tokens]


def pages_of(spans: Spans) -> list[int]:
    return cast(list[int], spans.table_BP[0].tolist())


@pytest.mark.parametrize("name", sorted(OPS))
def test_it_keeps_the_contract(name: str, isa: str, threads: int, seed: int) -> None:
    verdicts = conform(cast(Ops, SimpleNamespace(**OPS)), "cpu", seed=seed, only=[name])
    assert len(verdicts) >= 60
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

    def piece(low: int, high: int) -> Tensor:
        part = Spans.of([(start + low, high - low, 0, pages_of(spans))], torch.device("cpu"))
        return index_topk(q[low:high], weight[low:high], keys, 4, part, k)

    def pieces(borders: list[int]) -> Tensor:
        return torch.cat([piece(low, high) for low, high in pairwise(borders)])

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
