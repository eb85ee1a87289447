"""Engines over one store: what a text was read into, another engine or process goes on from.

The model of fake.py reads its text back from the cache, so a wrong page changes the answer. The
same over true models: test_disk_true_model.py. The store itself: tests/cache/test_disk.py.
"""

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overleap.cache import durable, layout
from overleap.cache import store as store_module
from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.errors import ConfigError, RequestError
from tests.cache.named import MODEL, SPACE, files, flip
from tests.engine.fake import CONFIG, FakeModel, answer, poison

SNAPSHOT = layout.snapshot_bytes(CONFIG, CacheFormat.WIDE)


def make(disk: DiskTier | None, pages: int = 24, **options: Any) -> Engine:
    options = {"slots": 4, "chunk_tokens": 200, "model_digest": MODEL} | options
    engine = Engine(FakeModel(), pages=pages, format=CacheFormat.WIDE, disk=disk, **options)  # type: ignore[arg-type]
    poison(engine._cache)
    return engine


def text(seed: int, tokens: int) -> list[int]:
    number = random.Random(seed)
    return [number.randrange(CONFIG.vocab_size) for _ in range(tokens)]


def cached(engine: Engine, prompt: list[int], count: int = 6, **options: Any) -> int:
    """Ask, check the answer, and say how many prompt tokens were not computed."""
    sampling = Sampling(temperature=0, max_tokens=count, stop_ids=())
    done = engine.generate(Request(prompt=prompt, sampling=sampling, **options))
    assert done.ids == answer(prompt, count)
    return done.finish.usage.cached_tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 257, 384, 700, 2000])
def test_after_a_restart_it_goes_on(folder: Path, seed: int, tokens: int) -> None:
    prompt = text(seed, tokens)
    with DiskTier(folder, space_bytes=SPACE) as disk:
        assert cached(make(disk), prompt) == 0
    with DiskTier(folder, space_bytes=SPACE) as disk:
        engine = make(disk)
        assert cached(engine, prompt) == (tokens - 1) // 128 * 128
        stats = engine.stats().disk
        assert stats is not None and stats.errors == 0
        assert stats.hit_tokens == (tokens - 1) // 128 * 128
        engine._prefix.clear()
        assert engine.stats().pages_free == 24


def test_memory_comes_first_and_the_disk_extends_it(folder: Path, seed: int) -> None:
    with DiskTier(folder, space_bytes=SPACE) as disk:
        prompt = text(seed, 1500)
        first = make(disk)
        assert cached(first, prompt[:700]) == 0
        assert cached(make(disk), prompt) == 640
        assert disk.stats().hits == 1
        assert cached(first, prompt) == 1408, "640 from memory, the rest from the other engine"
        assert disk.stats().hits == 2 and disk.stats().hit_tokens == 640 + (1408 - 640)
        assert cached(first, prompt) == 1408
        assert disk.stats().hits == 2


def test_what_memory_lets_go_of_is_found_on_disk(folder: Path, seed: int) -> None:
    with DiskTier(folder, space_bytes=SPACE) as disk:
        engine = make(disk, pages=12, snapshot_bytes=2 * SNAPSHOT)
        prompts = [text(seed + n, 1000) for n in range(3)]
        for prompt in prompts:
            assert cached(engine, prompt) == 0
        for prompt in prompts * 2:
            assert cached(engine, prompt) == 896
        assert disk.stats().hits >= 5


def test_a_conversation_over_restarts(folder: Path, seed: int) -> None:
    """Every turn by a new engine: all but the tail is found, the answer of the turn included."""
    said, number, read, total = text(seed, 300), random.Random(seed), 0, 0
    for _ in range(8):
        with DiskTier(folder, space_bytes=SPACE) as disk:
            got = cached(make(disk), said, 60)
        assert len(said) - got <= 128 + 60 + 50 if total else got == 0
        read, total = read + got, total + len(said)
        said = said + answer(said, 60) + text(seed + number.randrange(100), number.randint(1, 50))


def test_branches_are_where_later_texts_part(folder: Path, seed: int) -> None:
    document = text(seed, 1000)
    one, two = (document + text(seed + n, 300) for n in (1, 2))
    with DiskTier(folder, space_bytes=SPACE) as disk:
        assert cached(make(disk), one) == 0
        assert cached(make(disk), two) == 0, "nobody said that the texts would part there"
        disk.clear()
        assert cached(make(disk), one, branches=(1000, 5000)) == 0
        assert cached(make(disk), two, branches=(1000,)) == 896
        assert cached(make(disk), one) == 1280
    with pytest.raises(RequestError, match="branches holds -1 at 0, expected a length"):
        Request(prompt=[1], branches=(-1,))


def test_salts_and_models_are_apart_on_disk(folder: Path, seed: int) -> None:
    prompt = text(seed, 400)
    with DiskTier(folder, space_bytes=SPACE) as disk:
        assert cached(make(disk), prompt, salt="one") == 0
        assert cached(make(disk), prompt, salt="two") == 0
        assert cached(make(disk, model_digest="other"), prompt, salt="one") == 0
        assert cached(make(disk), prompt, salt="one") == 384
        assert disk.stats().errors == disk.stats().dropped == 0


def test_without_a_digest_there_is_no_disk(folder: Path) -> None:
    with DiskTier(folder, space_bytes=SPACE) as disk, pytest.raises(ConfigError, match="digest"):
        make(disk, model_digest="")
    assert make(None).stats().disk is None
    with DiskTier(folder, space_bytes=SPACE) as disk:
        engine = make(disk, snapshot_bytes=0)
        assert cached(engine, text(1, 300)) == 0 and engine.stats().disk is None


def test_answers_go_on_whatever_the_disk_does(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage and failing calls between and during requests; every answer is checked."""
    number = random.Random(seed)
    prompts = [text(seed + n, number.randint(130, 900)) for n in range(4)]

    class Flaky:
        def __getattr__(self, name: str) -> Any:
            calls = ("open", "readv", "write", "fsync", "replace", "unlink", "statvfs")
            if name in calls and number.random() < 0.1:
                raise OSError(number.choice((5, 28, 122)), "the disk fails")
            return getattr(os, name)

    hits = errors = rounds = 0
    while rounds < 12 or hits <= 5 or errors <= 5:  # until both have been seen often
        rounds += 1
        assert rounds < 200
        with DiskTier(folder, space_bytes=SPACE) as disk:
            for module in (store_module, durable):
                monkeypatch.setattr(module, "os", Flaky())
            for _ in range(5):
                prompt = number.choice(prompts)
                cached(make(disk), prompt[: number.randint(1, len(prompt))])
            monkeypatch.undo()
            hits, errors = hits + disk.stats().hits, errors + disk.stats().errors
        for path in files(folder):
            if number.random() < 0.3:
                data = bytearray(path.read_bytes())
                path.write_bytes(flip(data, number, 0, len(data)))


@pytest.mark.parametrize("free_share", [0.05, 0.0])
def test_answers_go_on_when_a_true_disk_is_full(
    tmp_path: Path, seed: int, free_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system of 300 KiB, where mounting one is allowed; else see the test above."""
    small, number = tmp_path / "small", random.Random(seed)
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        monkeypatch.setattr(store_module, "FREE_SHARE", free_share)
        (small / "others").write_bytes(bytes(70_000))
        with DiskTier(small / "kept", space_bytes=SPACE) as disk:
            for turn in range(300):
                cached(make(disk), text(number.randrange(9), number.randint(700, 1500)))
                stats = disk.stats()
                if turn >= 14 and stats.refused + stats.errors > 0 < stats.written:
                    break
            assert stats.dropped == 0 and stats.refused + stats.errors > 0 < stats.written
            assert bytes_of(small / "kept") == stats.bytes
        (small / "others").unlink()  # SQLite needs some room even to read
        with DiskTier(small / "kept", space_bytes=SPACE) as disk:
            assert disk.verify() == [] and disk.stats().errors == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


@settings(max_examples=25)
@given(
    asks=st.lists(
        st.tuples(
            st.integers(0, 2),  # which engine
            st.lists(st.integers(0, 1), min_size=1, max_size=8),  # a text, 100 tokens a number
            st.integers(1, 40),
        ),
        max_size=12,
    ),
    pages=st.integers(9, 20),
    snapshots=st.integers(1, 6),
)
def test_engines_over_one_store(
    tmp_path_factory: pytest.TempPathFactory,
    asks: list[tuple[int, list[int], int]],
    pages: int,
    snapshots: int,
) -> None:
    folder = tmp_path_factory.mktemp("store") / "kept"
    disks = [DiskTier(folder, space_bytes=200_000) for _ in range(3)]
    engines = [
        make(disk, pages=pages, snapshot_bytes=snapshots * SNAPSHOT, speculate="off")
        for disk in disks
    ]
    for who, blocks, count in asks:
        prompt = [block for number in blocks for block in text(number, 100)]
        cached(engines[who], prompt, count)
    for engine, disk in zip(engines, disks, strict=True):
        assert disk.stats().errors == 0 and disk.stats().bytes <= 200_000
        engine._prefix.clear()
        assert engine.stats().pages_free == pages
        disk.close()
