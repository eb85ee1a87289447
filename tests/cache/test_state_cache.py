"""Slots, pages and cursors of sequences: what they cost, when they refuse, what they give back.

That the state itself is right is shown by ../test_state.py. Here: overleap/cache/state.py alone.
"""

from dataclasses import replace

import pytest
import torch

from overleap.cache.layout import PAGE_TOKENS, REWIND_TOKENS, CacheFormat
from overleap.cache.state import Cache, Sequence
from overleap.errors import CapacityError
from tests.checkpoints import tiny_config
from tests.oracles.running import poison, room, start

CONFIG = tiny_config(3)


def at(cache: Cache, length: int) -> Sequence:
    """A sequence that claims to have read `length` tokens."""
    sequence = start(cache, length)
    sequence.length = length
    return sequence


def test_open_until_full_and_close() -> None:
    cache = Cache(CONFIG, pages=4, slots=2)
    one, two = cache.open(), cache.open()
    assert {one.slot, two.slot} == {0, 1}
    with pytest.raises(CapacityError, match=r"^all 2 sequence slots are in use"):
        cache.open()
    cache.reserve(one, 200)
    cache.close(one)
    assert (cache.slots_free, cache.pages_free, one.pages, one.slot) == (1, 4, [], -1)
    assert cache.open().slot != two.slot


def test_reserve_takes_what_is_missing() -> None:
    cache = Cache(CONFIG, pages=4, slots=2)
    sequence = cache.open()
    for length, pages in ((0, 0), (1, 1), (128, 1), (129, 2), (5, 2), (384, 3)):
        cache.reserve(sequence, length)
        assert len(sequence.pages) == pages
        assert cache.pages_free == 4 - pages
    with pytest.raises(CapacityError, match=r"^2 cache pages of 128 tokens are needed, 1 of 4"):
        cache.reserve(sequence, 5 * PAGE_TOKENS)
    assert len(sequence.pages) == 3, "nothing changes when it does not fit"


def test_rewind_is_a_cursor_move() -> None:
    cache = Cache(CONFIG, pages=2, slots=1)
    sequence = at(cache, 130)
    pages = list(sequence.pages)
    cache.rewind(sequence, 130)
    cache.rewind(sequence, 130 - REWIND_TOKENS)
    assert (sequence.length, sequence.pages) == (122, pages)


def test_rewind_refuses_what_is_lost() -> None:
    cache = Cache(CONFIG, pages=2, slots=1)
    sequence = at(cache, 130)
    for length in (131, 130 - REWIND_TOKENS - 1):
        with pytest.raises(AssertionError):
            cache.rewind(sequence, length)


def test_rewinds_do_not_add_up() -> None:
    """The ring holds 8 rows beyond the window, counted from the furthest token it has seen."""
    cache = Cache(CONFIG, pages=2, slots=1)
    sequence = at(cache, 200)
    cache.rewind(sequence, 194)
    cache.rewind(sequence, 192)
    with pytest.raises(AssertionError):
        cache.rewind(sequence, 191)
    sequence.length = 201  # nine more tokens
    cache.rewind(sequence, 193)
    with pytest.raises(AssertionError):
        cache.rewind(sequence, 192)


def test_no_rewind_before_what_was_restored() -> None:
    """A snapshot holds one window and no open block: nothing before its end can be redone."""
    cache = Cache(CONFIG, pages=4, slots=2)
    origin = at(cache, 128)
    restored = cache.restore(cache.snapshot(origin), origin.pages)
    with pytest.raises(AssertionError):
        cache.rewind(restored, 127)
    restored.length = 131
    cache.rewind(restored, 128)
    with pytest.raises(AssertionError):
        cache.rewind(restored, 127)


def test_no_rewind_into_a_shared_page() -> None:
    """Redoing would overwrite entries that others read."""
    cache = Cache(CONFIG, pages=4, slots=2)
    origin = at(cache, 130)
    twin = cache.fork(origin)
    for sequence in (origin, twin):
        cache.rewind(sequence, 128)
        with pytest.raises(AssertionError):
            cache.rewind(sequence, 127)
    cache.close(twin)
    cache.rewind(origin, 127)  # its own again


def test_fork_remembers_what_is_lost() -> None:
    cache = Cache(CONFIG, pages=4, slots=2)
    origin = at(cache, 100)
    cache.rewind(origin, 94)
    twin = cache.fork(origin)
    cache.rewind(twin, 92)
    with pytest.raises(AssertionError):
        cache.rewind(twin, 91)


@pytest.mark.parametrize(("length", "shared", "copied"), [(1, 0, 1), (128, 1, 0), (300, 2, 1)])
def test_fork_shares_full_pages(length: int, shared: int, copied: int) -> None:
    cache = Cache(CONFIG, pages=6, slots=2)
    origin = at(cache, length)
    cache.reserve(origin, 384)  # pages beyond the text are not the twin's
    twin = cache.fork(origin)
    assert twin.length == length
    assert twin.pages[:shared] == origin.pages[:shared]
    assert len(twin.pages) == shared + copied
    assert not set(twin.pages[shared:]) & set(origin.pages)
    assert [cache.pool.holders(p) for p in origin.pages[:shared]] == [2] * shared
    cache.close(origin)
    assert cache.pages_free == 6 - shared - copied
    cache.close(twin)
    assert cache.pages_free == 6


def test_fork_that_does_not_fit_changes_nothing() -> None:
    cache = Cache(CONFIG, pages=2, slots=2)
    origin = at(cache, 129)
    with pytest.raises(CapacityError, match="1 cache pages"):
        cache.fork(origin)
    assert (cache.slots_free, cache.pages_free) == (1, 0)

    cache = Cache(CONFIG, pages=4, slots=1)
    origin = at(cache, 129)
    with pytest.raises(CapacityError, match="all 1 sequence slots"):
        cache.fork(origin)
    assert (cache.slots_free, cache.pages_free) == (0, 2)
    assert [cache.pool.holders(page) for page in origin.pages] == [1, 1]


@pytest.mark.parametrize("cache_format", CacheFormat)
@pytest.mark.parametrize("length", [0, 128, 384])
def test_snapshot_is_a_copy(cache_format: CacheFormat, length: int) -> None:
    """What it holds does not change with the cache, and comes back in any slot."""
    cache = Cache(CONFIG, pages=4, slots=2, format=cache_format)
    origin = at(cache, length)
    for layer in cache.layers:
        layer.ring.rows.copy_(torch.randint(0, 100, layer.ring.rows.shape))
        for tail in (layer.tail, layer.index_tail):
            if tail is not None:
                tail.copy_(torch.randn(tail.shape))
    snapshot = cache.snapshot(origin)
    again = cache.snapshot(origin)
    poison(cache)
    restored = cache.restore(snapshot, origin.pages)
    assert restored.slot != origin.slot
    assert (restored.length, restored.pages) == (length, origin.pages)
    assert [cache.pool.holders(page) for page in origin.pages] == [2] * (length // 128)
    third = cache.snapshot(restored)
    for one, other in ((again, snapshot), (third, again)):
        for a, b in zip(one.windows, other.windows, strict=True):
            assert a.equal(b)
            assert len(a) == min(length, 128)
        for (a, b), (c, d) in zip(one.tails, other.tails, strict=True):
            assert a.equal(c) and b.equal(d)
            assert len(a) == len(b) == min(length, 4)


def test_snapshot_only_at_a_page_boundary() -> None:
    cache = Cache(CONFIG, pages=2, slots=1)
    with pytest.raises(AssertionError):
        cache.snapshot(at(cache, 127))


def test_restore_that_does_not_fit_changes_nothing() -> None:
    cache = Cache(CONFIG, pages=2, slots=1)
    origin = at(cache, 128)
    snapshot = cache.snapshot(origin)
    with pytest.raises(CapacityError):
        cache.restore(snapshot, origin.pages)
    assert cache.pool.holders(origin.pages[0]) == 1
    with pytest.raises(AssertionError):
        cache.restore(snapshot, [])


def test_restore_that_fails_half_way_leaves_nothing() -> None:
    cache = Cache(CONFIG, pages=2, slots=2)
    origin = at(cache, 128)
    snapshot = cache.snapshot(origin)
    broken = replace(snapshot, windows=(*snapshot.windows[:-1], snapshot.windows[-1][:7]))
    with pytest.raises(RuntimeError):
        cache.restore(broken, origin.pages)
    assert cache.slots_free == 1 and cache.pool.holders(origin.pages[0]) == 1


def test_every_tensor_is_poisoned() -> None:
    """The helper of the state tests forgets no tensor."""
    for cache_format in CacheFormat:
        cache = room(CONFIG, 200, cache_format, slots=1)
        for layer in cache.layers:
            pools = [p.rows for p in (layer.ring, layer.entries, layer.keys) if p is not None]
            for tensor in (*pools, layer.tail, layer.index_tail):
                if tensor is not None and tensor.dtype is torch.uint8:
                    assert (tensor == 255).all()
                elif tensor is not None:
                    assert tensor.isnan().all()
