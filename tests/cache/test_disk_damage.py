"""What is damaged, lost or fails under the disk tier: nothing unsound is used, and it goes on.

Sound disks: test_disk.py. Processes that are killed: test_disk_crash.py.
"""

import errno
import json
import os
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overleap.cache import durable
from overleap.cache import store as store_module
from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.cache.packing import form_of
from overleap.cache.state import Cache
from overleap.cache.unit import Unit, Unsound, unit_of
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
from tests.engine.fake import CONFIG

CONNECT = sqlite3.connect  # some tests replace it


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


# -- files


@pytest.mark.parametrize("rounds", [240, pytest.param(1000, marks=pytest.mark.slow)])
def test_nothing_damaged_is_used(
    tier: DiskTier, folder: Path, cache: Cache, seed: int, rounds: int
) -> None:
    """Flips in header, data and mac, cuts, additions, holes, exchanged and foreign files."""
    number = random.Random(seed)
    chains = [chain_of(blocks(seed + n, 6)) for n in range(2)]
    for round_ in range(rounds):
        for chain in chains:
            keep(tier, cache, chain, 4)
            keep(tier, cache, chain, 6)
        tier_stats = tier.stats()
        assert tier_stats.units == 4
        chain = number.choice(chains)
        depth = number.choice((4, 6))
        path = folder / f"{chain[depth - 1].hex()}.safetensors"
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        kind = round_ % 8
        if kind == 0:
            flip(data, number, 0, header)
        elif kind == 1:
            flip(data, number, header, len(data) - 32)
        elif kind == 2:
            flip(data, number, len(data) - 32, len(data))
        elif kind == 3:
            del data[number.randrange(len(data)) :]
        elif kind == 4:
            data += bytes(number.randrange(1, 100))
        elif kind == 5:
            other = number.choice([p for p in files(folder) if p != path])
            data = bytearray(other.read_bytes())
        elif kind == 6:
            at = number.randrange(header, len(data) - 32)
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        else:
            half = number.randrange(1, len(data))
            data = data[half:] + data[:half]
        path.write_bytes(data)
        found = fetch(tier, cache, chain, *number.choice([(0, 0), (2, 2)]))
        assert found == (4 if depth == 6 else 0), (round_, kind)
        assert tier.stats().dropped == tier_stats.dropped + 1
        untouched = chains[chain is chains[0]]
        assert fetch(tier, cache, untouched) == 6


def test_verify_finds_every_damage(tier: DiskTier, folder: Path, cache: Cache, seed: int) -> None:
    number = random.Random(seed)
    chains = [chain_of(blocks(seed + n, 2)) for n in range(40)]
    for chain in chains:
        keep(tier, cache, chain, 2)
    bad = set(number.sample(range(40), 15))
    for n in bad:
        path = folder / f"{chains[n][-1].hex()}.safetensors"
        if n % 5 == 0:
            path.unlink()
        elif n % 5 == 1:
            path.write_bytes(
                (folder / f"{chains[(n + 1) % 40][-1].hex()}.safetensors").read_bytes()
            )
        else:
            data = bytearray(path.read_bytes())
            path.write_bytes(flip(data, number, 0, len(data)))
    seen: list[tuple[int, int]] = []
    said = tier.verify(lambda done, total: seen.append((done, total)))
    assert len(said) == 15 and seen[-1][0] == seen[-1][1]
    assert all(chains[n][-1].hex() in " ".join(said) for n in bad)
    assert [fetch(tier, cache, chain) for chain in chains] == [
        0 if n in bad else 2 for n in range(40)
    ]
    assert tier.verify() == []


def test_other_models_formats_and_shapes_are_not_used(
    folder: Path, cache: Cache, seed: int
) -> None:
    """Even where the names are equal, which a model digest in the name prevents."""
    chain = chain_of(blocks(seed, 3))
    others = [
        (cache, "11ee" * 16),
        (make_cache(cache_format=CacheFormat.WIDE), MODEL),
        (Cache(replace(CONFIG, head_dim=16), pages=9, slots=1), MODEL),
        (Cache(replace(CONFIG, compress_ratios=(128, 4, 0, 0)), pages=9, slots=1), MODEL),
        (Cache(replace(CONFIG, num_hidden_layers=4, compress_ratios=(4, 128, 0, 0, 0)),
               pages=9, slots=1), MODEL),
    ]  # fmt: skip
    for other, model in others:
        with DiskTier(folder, space_bytes=SPACE) as tier:
            keep(tier, cache, chain, 3)
            assert fetch(tier, cache, chain) == 3
            assert tier.fetch(other, model, chain, [], 0) is None
            assert tier.stats().dropped == 1 and files(folder) == []


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"__metadata__":1}', b'{"__metadata__":{"format":"x"}}', b"\xff" * 9,
     b"[" * 100_000, b'{"__metadata__":{"format":"overleap.prefix/1","name":1}}'],
)  # fmt: skip
def test_headers_of_others_are_refused(text: bytes) -> None:
    with pytest.raises(Unsound):
        unit_of(text)


@pytest.mark.parametrize(
    "change",
    [{"first": "1"}, {"last": "0"}, {"last": "33"}, {"last": "x"}, {"name": "../../etc/passwd"},
     {"name": "A" * 64}, {"parent": "0" * 64}, {"snapshot": "no"}, {"format": "overleap.prefix/9"}],
)  # fmt: skip
def test_headers_that_contradict_themselves_are_refused(cache: Cache, change: Any) -> None:
    form = form_of(Unit("0" * 64, "", 0, 3, True), cache, MODEL)
    said = json.loads(form.header[8:])
    assert unit_of(form.header[8:]) == Unit("0" * 64, "", 0, 3, True)
    said["__metadata__"] |= change
    with pytest.raises(Unsound):
        unit_of(json.dumps(said).encode())


# -- the index and the key


def damage_index(folder: Path, kind: str, number: random.Random) -> None:
    path = folder / "index.sqlite"
    data = bytearray(path.read_bytes())
    if kind == "lost":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: number.randrange(1, len(data))])
    elif kind == "noise":
        path.write_bytes(number.randbytes(len(data)))
    elif kind == "older":
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version = 7")
        database.close()
    elif kind == "rows":
        database = sqlite3.connect(path)
        database.execute("UPDATE units SET first = 'three'")
        database.commit()
        database.close()
    else:
        for _ in range(number.randrange(1, 40)):
            flip(data, number, 0, len(data))
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["lost", "empty", "cut", "noise", "older", "rows"])
def test_a_damaged_index_is_made_again(folder: Path, cache: Cache, seed: int, kind: str) -> None:
    chain, other = chain_of(blocks(seed, 40)), chain_of(blocks(seed + 1, 3))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, cache, chain, 40)
        keep(tier, cache, other, 3)
        size = tier.stats().bytes
    damage_index(folder, kind, random.Random(seed))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        assert tier.stats().bytes == size and tier.stats().units == 3
        assert fetch(tier, cache, chain) == 40 and fetch(tier, cache, other) == 3


def test_flipped_bits_in_the_index_do_no_harm(folder: Path, cache: Cache, seed: int) -> None:
    number = random.Random(seed)
    chains = [chain_of(blocks(seed + n, 6)) for n in range(4)]
    for _ in range(60):
        with DiskTier(folder, space_bytes=SPACE) as tier:
            for chain in chains:
                keep(tier, cache, chain, 4)
                keep(tier, cache, chain, 6)
        damage_index(folder, "flips", number)
        with DiskTier(folder, space_bytes=SPACE) as tier:
            for chain in chains:
                assert fetch(tier, cache, chain) in (0, 4, 6)
            keep(tier, cache, number.choice(chains), 6)
            tier.verify()
    with DiskTier(folder, space_bytes=SPACE) as tier:
        for chain in chains:
            keep(tier, cache, chain, 6)
            fetch(tier, cache, chain)  # drops what a wrong row led to
            keep(tier, cache, chain, 6)
            assert fetch(tier, cache, chain) == 6, "it heals"


def test_damage_to_the_index_while_it_is_in_use(folder: Path, cache: Cache, seed: int) -> None:
    number = random.Random(seed)
    chain = chain_of(blocks(seed, 6))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, cache, chain, 4)
        for path in (folder / "index.sqlite", folder / "index.sqlite-wal"):
            path.write_bytes(number.randbytes(path.stat().st_size))
        for _ in range(3):
            assert fetch(tier, cache, chain) in (0, 4, 6)
            keep(tier, cache, chain, 6)
            tier.touch(chain)
            tier.stats()
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, cache, chain, 6)
        assert fetch(tier, cache, chain) == 6 and tier.stats().errors == 0


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_without_its_key_nothing_is_used(
    folder: Path, cache: Cache, seed: int, damage: str
) -> None:
    chain = chain_of(blocks(seed, 40))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        keep(tier, cache, chain, 40)
    path = folder / "key"
    key = bytearray(path.read_bytes())
    path.unlink()
    if damage != "lost":
        path.write_bytes(key[:31] if damage == "cut" else flip(key, random.Random(seed), 0, 32))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        assert fetch(tier, cache, chain) == 0
        assert files(folder) == []
        keep(tier, cache, chain, 40)
        assert fetch(tier, cache, chain) == 40 and tier.stats().errors == 0


def test_leftovers_of_killed_processes(folder: Path, cache: Cache, seed: int) -> None:
    """A temporary file, files without a row, under their own name and another, rows without a
    file, a file without its parent.
    """
    chain, other, third = (chain_of(blocks(seed + n, 9)) for n in range(3))
    with DiskTier(folder, space_bytes=SPACE) as tier:
        for depth in (3, 6, 9):
            keep(tier, cache, chain, depth)
            keep(tier, cache, other, depth)
            keep(tier, cache, third, depth)
    name = {n: f"{chain[n - 1].hex()}.safetensors" for n in (3, 6, 9)}
    (folder / f".{name[3]}.1.ab.partial").write_bytes(b"x" * 1000)
    database = sqlite3.connect(folder / "index.sqlite")
    database.execute("DELETE FROM units WHERE name = ?", (chain[8].hex(),))
    database.execute("DELETE FROM units WHERE name = ?", (other[2].hex(),))
    database.commit()
    database.close()
    (folder / f"{third[5].hex()}.safetensors").unlink()
    (folder / f"{third[8].hex()}.safetensors").rename(folder / f"{'0' * 64}.safetensors")
    with DiskTier(folder, space_bytes=SPACE) as tier:
        assert [fetch(tier, cache, names) for names in (chain, other, third)] == [9, 9, 3]
        assert not list(folder.glob(".*"))
        assert tier.stats().units == len(files(folder)) == 7


# -- a disk that fails


class Failing:
    """The `os` module, one of whose calls that touch a disk fails: the k-th, or all from there."""

    CALLS = "open read readv write fsync replace unlink fstat statvfs listdir lseek close".split()

    def __init__(self, at: int, error: int, lasting: bool) -> None:
        self.at, self.error, self.lasting, self.count = at, error, lasting, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            due = self.count >= self.at if self.lasting else self.count == self.at
            if due and name == "close":
                real(*arguments)
            if due:
                raise OSError(self.error, os.strerror(self.error))
            return real(*arguments, **options)

        return call


class FailingIndex(sqlite3.Connection):
    """A connection whose k-th statement fails."""

    at = count = 0

    def execute(self, *arguments: Any) -> Any:
        type(self).count += 1
        if self.count == self.at:
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(*arguments)


def assert_counted(folder: Path) -> None:
    """Every file has its row: none takes space that nobody counts."""
    database = CONNECT(folder / "index.sqlite")
    rows = {row[0] for row in database.execute("SELECT name FROM units")}
    database.close()
    assert {path.stem for path in files(folder)} <= rows


def scenario(folder: Path, cache: Cache, seed: int, lasting: bool = False) -> None:
    """Keep, find, evict, drop and verify; whatever is found is right."""
    texts = [chain_of(blocks(seed + n, 2)) for n in range(3)]
    try:
        tier = DiskTier(folder, space_bytes=5 * unit_bytes(cache, 1))
    except CapacityError:
        return  # said in a sentence; whoever opens it goes on without
    with tier:
        for chain in texts:
            keep(tier, cache, chain, 1)
            keep(tier, cache, chain, 2)
            assert fetch(tier, cache, chain) in (0, 1, 2)
        for path in files(folder)[:1]:
            path.write_bytes(b"damaged")
        for chain in texts:
            assert fetch(tier, cache, chain) in (0, 1, 2)
        if files(folder) and not lasting:
            assert_counted(folder)
        tier.verify()
        tier.touch(texts[0])
        tier.stats()


EVERY = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
@pytest.mark.parametrize("lasting", [False, True])
def test_any_call_may_fail(
    tmp_path: Path, seed: int, lasting: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, cache, at = random.Random(seed), make_cache(pages=12), 0
    while True:
        at += number.randint(1, 2 * step - 1)
        folder = tmp_path / str(at)
        failing = Failing(at, number.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT]), lasting)
        with monkeypatch.context() as patch:
            for module in (store_module, durable):
                patch.setattr(module, "os", failing)
            scenario(folder, cache, seed, lasting)
        assert cache.pages_free == 12
        if failing.count < at:
            break
        with DiskTier(folder, space_bytes=SPACE) as tier:
            chain = chain_of(blocks(seed, 2))
            tier.verify()
            keep(tier, cache, chain, 2)
            assert fetch(tier, cache, chain) == 2, "afterwards it works"
            assert tier.stats().errors == 0 and tier.verify() == []
            assert tier.stats().units == len(files(folder))
    assert at > 100


@EVERY
def test_any_statement_may_fail(
    tmp_path: Path, seed: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, cache, at = random.Random(seed), make_cache(pages=12), 0
    while True:
        at += number.randint(1, 2 * step - 1)
        folder = tmp_path / str(at)
        failing = type("Failing", (FailingIndex,), {"at": at})
        with monkeypatch.context() as patch:
            patch.setattr(
                sqlite3, "connect", lambda *a, f=failing, **o: CONNECT(*a, factory=f, **o)
            )
            scenario(folder, cache, seed)
        if failing.count < at:
            break
        with DiskTier(folder, space_bytes=SPACE) as tier:
            chain = chain_of(blocks(seed, 2))
            keep(tier, cache, chain, 2)
            assert fetch(tier, cache, chain) == 2
            assert tier.stats().errors == 0 and tier.verify() == []
            assert tier.stats().units == len(files(folder))
    assert at > 50
