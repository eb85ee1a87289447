"""Pages: who holds which. Any order of taking, sharing and releasing leaves the counts right.

Not about what a page holds (../test_state.py). Read next: test_state_cache.py.
"""

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import DataObject, data, integers

from overleap.cache.layout import CacheFormat
from overleap.cache.pool import PagePool, row_formats, row_width
from overleap.config import LayerKind
from overleap.errors import CapacityError
from tests.checkpoints import tiny_config

PAGES = 6


def pool(pages: int = PAGES, cache_format: CacheFormat = CacheFormat.RELEASE) -> PagePool:
    return PagePool(tiny_config(1), pages, cache_format, torch.device("cpu"))


class Holders(RuleBasedStateMachine):
    """The pool against a plain dict of counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.held = pool(), dict[int, int]()

    @rule(count=integers(0, PAGES + 1))
    def take(self, count: int) -> None:
        free = PAGES - len(self.held)
        if count > free:
            with pytest.raises(CapacityError, match=rf"^{count} cache pages .* {free} of {PAGES}"):
                self.pool.take(count)
            return
        taken = self.pool.take(count)
        assert len(set(taken)) == count
        assert not set(taken) & set(self.held)
        self.held |= dict.fromkeys(taken, 1)

    @precondition(lambda self: self.held)
    @rule(choice=data())
    def share(self, choice: DataObject) -> None:
        page = list(self.held)[choice.draw(integers(0, len(self.held) - 1))]
        self.pool.share(page)
        self.held[page] += 1

    @precondition(lambda self: self.held)
    @rule(choice=data())
    def release(self, choice: DataObject) -> None:
        page = list(self.held)[choice.draw(integers(0, len(self.held) - 1))]
        self.pool.release(page)
        self.held[page] -= 1
        if not self.held[page]:
            del self.held[page]

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.free == PAGES - len(self.held)
        assert [self.pool.holders(page) for page in range(PAGES)] == [
            self.held.get(page, 0) for page in range(PAGES)
        ]


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=30, stateful_step_count=30)


def test_a_free_page_cannot_be_shared_or_released() -> None:
    empty = pool()
    [page] = empty.take(1)
    empty.release(page)
    with pytest.raises(AssertionError):
        empty.share(page)
    with pytest.raises(AssertionError):
        empty.release(page)


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_copy_moves_one_page_of_all_layers(cache_format: CacheFormat) -> None:
    pages = pool(3, cache_format)
    pools = [p for p in (*pages.entries, *pages.keys) if p is not None]
    assert len(pools) >= 3  # CSA entries and keys, HCA entries
    for one in pools:
        one.rows.copy_(torch.randint(0, 255, one.rows.shape))
    before = [one.rows.clone() for one in pools]
    pages.copy(0, 2)
    for one, old in zip(pools, before, strict=True):
        assert one.rows[2].equal(old[0])
        assert one.rows[:2].equal(old[:2])


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_pools_by_kind(cache_format: CacheFormat) -> None:
    config = tiny_config(1)
    pages = pool(3, cache_format)
    entry, key = row_formats(config, cache_format)
    for kind, entries, keys in zip(config.all_kinds, pages.entries, pages.keys, strict=True):
        assert (entries is not None) == (kind is not LayerKind.SLIDING)
        assert (keys is not None) == (kind is LayerKind.CSA)
        if entries is not None:
            per_page = 32 if kind is LayerKind.CSA else 1
            assert entries.rows.shape == (3, per_page, row_width(entry))
            assert entries.per_page == per_page
            assert entries.rows.dtype is entry.dtype
        if keys is not None:
            assert keys.rows.shape == (3, 32, row_width(key))
