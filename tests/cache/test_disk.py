"""The disk tier: what is found again, what goes first, and several processes over one folder.

What is damaged: test_disk_damage.py. Processes that are killed: test_disk_crash.py. Engines over
it: tests/engine/test_disk_engine.py.
"""

import fcntl
import os
import random
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from overleap.cache import store as store_module
from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.cache.packing import form_of
from overleap.cache.state import Cache
from overleap.cache.unit import UNIT_PAGES, Unit
from overleap.errors import CapacityError
from tests.cache.named import (
    MODEL,
    SPACE,
    blocks,
    chain_of,
    fetch,
    files,
    flip,
    keep,
    make_cache,
    unit_bytes,
)


@pytest.fixture
def cache() -> Cache:
    return make_cache()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def tier(folder: Path) -> Iterator[DiskTier]:
    with DiskTier(folder, space_bytes=SPACE) as tier:
        yield tier
        assert tier.stats().errors == 0, tier.stats().problem


# -- finding again


@pytest.mark.parametrize("cache_format", CacheFormat)
@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 64, 70])
def test_what_was_kept_is_found_by_another(
    folder: Path, cache_format: CacheFormat, depth: int, seed: int
) -> None:
    chain = chain_of(blocks(seed, depth))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, make_cache(cache_format=cache_format), chain, depth)
        assert tier.stats().written == tier.stats().units == -(-depth // UNIT_PAGES)
    with DiskTier(folder, space_bytes=SPACE) as tier:
        other = make_cache(pages=depth + 1, cache_format=cache_format)
        other.pool.take(1)  # page numbers are not those of the first cache
        assert fetch(tier, other, chain) == depth
        assert fetch(tier, other, chain[:-1]) == 0, "a unit is used whole or not at all"
        stats = tier.stats()
        assert (stats.hits, stats.hit_tokens, stats.errors) == (1, 128 * depth, 0)
        assert (stats.texts, stats.tokens) == (1, 128 * depth)
        assert tier.verify() == []


def test_the_deepest_snapshot_that_is_of_use(tier: DiskTier, cache: Cache, seed: int) -> None:
    chain = chain_of(blocks(seed, 50))
    for depth in (3, 20, 41):
        keep(tier, cache, chain, depth)
    for names, known, beyond, found in [
        (50, 0, 0, 41), (41, 0, 0, 41), (40, 0, 0, 20), (20, 0, 0, 20), (2, 0, 0, 0),
        (50, 3, 3, 41), (50, 10, 3, 41), (50, 20, 20, 41), (50, 41, 20, 41), (50, 45, 20, 41),
        (50, 45, 41, 0), (40, 20, 20, 0), (25, 20, 3, 20),
    ]:  # fmt: skip
        assert fetch(tier, cache, chain[:names], known, beyond) == found, (names, known, beyond)


def test_texts_share_their_beginning(tier: DiskTier, folder: Path, cache: Cache, seed: int) -> None:
    start, one, two = blocks(seed, 10), blocks(seed + 1, 5), blocks(seed + 2, 5)
    keep(tier, cache, chain_of(start), 10)
    keep(tier, cache, chain_of(start + one), 15)
    keep(tier, cache, chain_of(start + two), 15)
    assert tier.stats().units == 3 and tier.stats().texts == 2 and tier.stats().tokens == 20 * 128
    assert fetch(tier, cache, chain_of(start + one)) == 15
    assert fetch(tier, cache, chain_of(start + two)) == 15
    assert fetch(tier, cache, chain_of(start + two[::-1])) == 10
    assert fetch(tier, cache, chain_of(start, salt="other")) == 0
    before = [(path.name, path.stat().st_mtime_ns) for path in files(folder)]
    keep(tier, cache, chain_of(start + one), 15)
    assert [(path.name, path.stat().st_mtime_ns) for path in files(folder)] == before


def test_a_snapshot_added_where_a_unit_had_none(tier: DiskTier, cache: Cache, seed: int) -> None:
    chain = chain_of(blocks(seed, 40))
    keep(tier, cache, chain, 40)  # units end at 32, without a snapshot, and at 40
    assert fetch(tier, cache, chain[:39]) == 0
    keep(tier, cache, chain, 32)
    assert fetch(tier, cache, chain[:39]) == 32
    assert fetch(tier, cache, chain) == 40
    assert tier.verify() == []


def test_not_enough_free_pages_is_no_hit(tier: DiskTier, cache: Cache, seed: int) -> None:
    chain = chain_of(blocks(seed, 10))
    keep(tier, cache, chain, 10)
    small = make_cache(pages=9)
    assert fetch(tier, small, chain) == 0 and fetch(tier, small, chain, 1) == 0
    assert fetch(tier, make_cache(pages=10), chain, 4) == 10


def test_a_long_text_is_written_bit_by_bit(
    tier: DiskTier, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overleap.cache.disk.BURST_UNITS", 2)
    cache, chain = make_cache(pages=160), chain_of(blocks(seed, 150))
    keep(tier, cache, chain, 149)
    assert fetch(tier, cache, chain) == 0 and tier.stats().tokens == 64 * 128
    keep(tier, cache, chain, 150)
    assert tier.stats().tokens == 128 * 128
    keep(tier, cache, chain, 150)
    assert fetch(tier, cache, chain) == 150


# -- the folder and its files


def test_files_are_private_and_of_a_known_format(
    tier: DiskTier, folder: Path, cache: Cache, seed: int
) -> None:
    keep(tier, cache, chain := chain_of(blocks(seed, 2)), 2)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (path,) = files(folder)
    assert path.stem == chain[-1].hex()
    tensors = load_file(path)
    assert tensors["0.entries"].shape == (2, 32, 16)
    assert tensors["3.window"].shape == (128, 16)
    assert tensors["mac"].numel() == 32
    assert path.stat().st_size == tier.stats().bytes == unit_bytes(cache, 2)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    before = stat.S_IMODE(tmp_path.stat().st_mode)
    with pytest.raises(CapacityError, match="holds other things"):
        DiskTier(tmp_path, space_bytes=SPACE)
    assert sorted(os.listdir(tmp_path)) == ["letter.txt"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before
    with pytest.raises(CapacityError, match="cannot keep what was read"):
        DiskTier(tmp_path / "letter.txt", space_bytes=SPACE)


def test_an_open_folder_is_closed_to_others(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    with DiskTier(folder, space_bytes=SPACE):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_after_close_nothing_is_kept_or_found(folder: Path, cache: Cache, seed: int) -> None:
    tier = DiskTier(folder, space_bytes=SPACE)
    keep(tier, cache, chain := chain_of(blocks(seed, 2)), 2)
    tier.close()
    tier.close()
    keep(tier, cache, chain, 1)
    tier.touch(chain)
    tier.clear()
    assert fetch(tier, cache, chain) == 0 and tier.verify() == []
    assert tier.stats().units == 0 and len(files(folder)) == 1


def test_clear(tier: DiskTier, folder: Path, cache: Cache, seed: int) -> None:
    keep(tier, cache, chain := chain_of(blocks(seed, 40)), 40)
    tier.clear()
    assert tier.stats().units == 0 and files(folder) == [] and fetch(tier, cache, chain) == 0
    keep(tier, cache, chain, 40)
    assert fetch(tier, cache, chain) == 40


# -- the budget


def test_the_least_recently_used_goes_first(folder: Path, cache: Cache, seed: int) -> None:
    texts = [chain_of(blocks(seed + n, 3)) for n in range(4)]
    one = unit_bytes(cache, 3)
    with DiskTier(folder, space_bytes=3 * one) as tier:
        for chain in texts[:3]:
            keep(tier, cache, chain, 3)
        tier.touch(texts[0])
        assert fetch(tier, cache, texts[1]) == 3
        keep(tier, cache, texts[3], 3)
        assert [fetch(tier, cache, chain) for chain in texts] == [3, 3, 0, 3]
        assert tier.stats().evicted == 1 and tier.stats().bytes == 3 * one
    with DiskTier(folder, space_bytes=one) as tier:
        assert [fetch(tier, cache, chain) for chain in texts] == [0, 0, 0, 3]
        assert len(files(folder)) == tier.stats().units == 1


def test_a_text_goes_from_its_end(folder: Path, cache: Cache, seed: int) -> None:
    long, short = chain_of(blocks(seed, 9)), chain_of(blocks(seed + 1, 3))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        for depth in (3, 6, 9):
            keep(tier, cache, long, depth)
        space = tier.stats().bytes
    with DiskTier(folder, space_bytes=space) as tier:
        keep(tier, cache, short, 3)
        assert fetch(tier, cache, long) == 6 and fetch(tier, cache, short) == 3


def test_a_text_larger_than_the_space_keeps_its_beginning(
    folder: Path, cache: Cache, seed: int
) -> None:
    chain, other = chain_of(blocks(seed, 12)), chain_of(blocks(seed + 1, 3))
    space = sum(
        form_of(Unit("0" * 64, "0" * 64, n, n + 3, True), cache, MODEL).size for n in (3, 6)
    )
    with DiskTier(folder, space_bytes=space) as tier:
        keep(tier, cache, other, 3)
        for depth in (3, 6, 9, 12):
            keep(tier, cache, chain, depth)
        assert fetch(tier, cache, chain) == 6 and fetch(tier, cache, other) == 0
        assert tier.stats().refused == 2 and tier.stats().bytes <= space
    with DiskTier(folder, space_bytes=10) as tier:
        assert tier.stats().units == 0
        keep(tier, cache, chain, 3)
        assert tier.stats().units == 0 and tier.stats().refused == 1


def test_a_nearly_full_disk_is_left_alone(
    tier: DiskTier, cache: Cache, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chain_of(blocks(seed, 2)), chain_of(blocks(seed + 1, 2))
    keep(tier, cache, first, 2)
    real = os.statvfs(tier.stats().folder)
    full = os.statvfs_result((*real[:2], 1000, 80, 49, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    keep(tier, cache, second, 2)
    assert tier.stats().refused == 1
    assert fetch(tier, cache, first) == 2 and fetch(tier, cache, second) == 0


# -- several processes (here: several that each hold the lock)


def test_two_at_once_see_each_other(folder: Path, cache: Cache, seed: int) -> None:
    chain = chain_of(blocks(seed, 9))
    with (
        DiskTier(folder, space_bytes=SPACE) as one,
        DiskTier(folder, space_bytes=SPACE) as two,
    ):
        keep(one, cache, chain, 3)
        keep(two, cache, chain, 6)
        assert fetch(one, cache, chain) == 6
        one.clear()
        assert fetch(two, cache, chain) == 0
        keep(one, cache, chain, 9)
        assert fetch(two, cache, chain) == 9
        assert one.stats().errors == two.stats().errors == 0


def test_one_that_repairs_makes_others_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DiskTier(folder, space_bytes=SPACE).close()
    monkeypatch.setattr(store_module, "LOCK_S", 0.2)
    handle = os.open(folder / "overleap.lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CapacityError, match="another process is repairing it"):
        DiskTier(folder, space_bytes=SPACE)
    os.close(handle)
    DiskTier(folder, space_bytes=SPACE).close()


def test_a_writer_that_waits_too_long_gives_up(
    folder: Path, cache: Cache, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overleap.cache.index.BUSY_S", 0.05)
    chain = chain_of(blocks(seed, 3))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, cache, chain, 2)
        other = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        keep(tier, cache, chain, 3)
        assert fetch(tier, cache, chain) == 2, "reading needs no lock"
        assert tier.stats().errors >= 2 and "locked" in str(tier.stats().problem)
        assert not list(folder.glob(".*"))
        other.close()
        keep(tier, cache, chain, 3)
        assert fetch(tier, cache, chain) == 3


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "keep", "fetch", "touch", "clear", "reopen", "damage", "lose"]),
        st.integers(0, 1),  # which of two processes
        st.lists(st.integers(0, 2), min_size=1, max_size=5),  # a text, page by page
        st.integers(0, 1000),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(actions=ACTIONS, units=st.integers(1, 6))
def test_whatever_happens_it_is_right(
    tmp_path_factory: pytest.TempPathFactory,
    actions: list[tuple[str, int, list[int], int]],
    units: int,
) -> None:
    folder, cache = tmp_path_factory.mktemp("store") / "kept", make_cache(pages=12)
    space = units * unit_bytes(cache, 3)
    tiers = [DiskTier(folder, space_bytes=space) for _ in range(2)]
    for action, who, text, at in actions:
        tier, chain = tiers[who], chain_of(text)
        if action == "keep":
            keep(tier, cache, chain, 1 + at % len(chain))
        elif action == "fetch":
            known = at % (len(chain) + 1)
            fetch(tier, cache, chain, known, min(known, at % 3))
        elif action == "touch":
            tier.touch(chain)
        elif action == "clear" and at % 4 == 0:
            tier.clear()
        elif action == "reopen":
            tier.close()
            tiers[who] = DiskTier(folder, space_bytes=space)
        elif action in ("damage", "lose") and (there := files(folder)):
            path = there[at % len(there)]
            data = path.read_bytes()
            path.unlink()
            if action == "damage":
                path.write_bytes(flip(bytearray(data), random.Random(at), 0, len(data)))
        assert tiers[0].stats().bytes <= space
    for tier in tiers:
        assert tier.stats().errors == 0, tier.stats().problem
        tier.verify()
        tier.close()
    rows = sum(path.stat().st_size for path in files(folder))
    with DiskTier(folder, space_bytes=space) as tier:
        assert tier.verify() == [] and tier.stats().bytes == rows


def test_a_lock_that_another_takes_while_it_changes_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the repair: who changes a lock lets go of it first."""
    asked: list[bool] = []
    own = store_module.durable.take

    def take(lock: int, *, alone: bool) -> bool:
        asked.append(alone)
        return own(lock, alone=alone) if asked != [True, False] else False

    monkeypatch.setattr(store_module.durable, "take", take)
    with DiskTier(folder, space_bytes=SPACE) as tier:
        assert asked == [True, False, False] and tier.stats().errors == 0
        other = os.open(next(folder.glob("*lock*")), os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
