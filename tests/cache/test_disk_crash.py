"""Processes killed at random moments while they write: nothing wrong is found, nothing is stuck.

The writers: crash_worker.py. One process at a time: test_disk.py.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overleap.cache.disk import DiskTier
from overleap.cache.packing import form_of
from overleap.cache.unit import Unit
from tests.cache.crash_worker import text
from tests.cache.named import MODEL, chain_of, fetch, keep, make_cache

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def writers() -> Iterator[subprocess.Popen[str]]:
    """The process that forks writers."""
    command = [sys.executable, "-m", "tests.cache.crash_worker"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def start(process: subprocess.Popen[str], folder: Path, space: int, seed: int, at: int = 0) -> int:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{folder} {space} {seed} {at}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def kill(process: subprocess.Popen[str], child: int) -> None:
    os.kill(child, signal.SIGKILL)
    collect(process)


def collect(process: subprocess.Popen[str]) -> None:
    """Wait until a writer that is killed has gone."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("wait\n")
    process.stdin.flush()
    assert int(process.stdout.readline()) == signal.SIGKILL, "it met an error or a wrong byte"


def space_for(texts: int) -> int:
    """Bytes that hold about so many texts."""
    return texts * form_of(Unit("0" * 64, "", 0, 6, True), make_cache(1), MODEL).size


def kills(folder: Path, count: int, seed: int, together: int) -> None:
    """Kill `count` writers, `together` at once; after each the store is sound and answers."""
    number, cache = random.Random(seed), make_cache(pages=24)
    chains = [chain_of(text(n)) for n in range(12)]
    space = space_for(12)
    slowest, found, left = 0.0, 0, 0
    with writers() as process:
        running: list[int] = []
        # More rounds where hardly anything was found: on a busy machine writers get little done.
        round_ = 0
        while round_ < count or (found <= count and round_ < 20 * count):
            while len(running) < together:
                running.append(start(process, folder, space, seed + round_))
            time.sleep(number.uniform(0.005, 0.25))
            kill(process, running.pop(number.randrange(len(running))))
            left += bool(list(folder.glob(".*.partial")))
            began = time.perf_counter()
            with DiskTier(folder, space_bytes=space) as tier:
                slowest = max(slowest, time.perf_counter() - began)
                found += sum(fetch(tier, cache, chain) > 0 for chain in chains)
                if not running:
                    assert tier.stats().dropped == 0, "a unit was unreadable"
                    assert tier.verify() == []
                    assert tier.stats().errors == 0, tier.stats().problem
                    assert not list(folder.glob(".*.partial"))
            round_ += 1
        for child in running:
            kill(process, child)
    with DiskTier(folder, space_bytes=space) as tier:
        assert tier.verify() == [] and tier.stats().bytes <= space
        keep(tier, cache, chains[0], len(chains[0]))
        assert fetch(tier, cache, chains[0]) == len(chains[0])
    print(
        f"{round_} kills, {left} left a temporary file; {found} right answers, "
        f"slowest start {slowest:.3f} s"
    )
    assert slowest < 5
    assert found > count, "hardly anything was found: this proves little"


@pytest.mark.parametrize("together", [1, 2])
def test_killed_while_writing(tmp_path: Path, seed: int, together: int) -> None:
    kills(tmp_path / "kept", 20, seed, together)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3])
def test_killed_while_writing_often(tmp_path: Path, seed: int, together: int) -> None:
    kills(tmp_path / "kept", 100, seed, together)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_call(tmp_path: Path, seed: int, step: int) -> None:
    """Before the first call to the disk, the second, and so on, in one store and in fresh ones."""
    number, cache = random.Random(seed), make_cache(pages=24)
    chains = [chain_of(text(n)) for n in range(12)]
    found = 0
    with writers() as process:
        at = 1 + number.randrange(step)
        while at < 450 or found <= 100 / step:  # beyond the last of them until enough was found
            assert at < 4500, "hardly anything was found: this proves little"
            folder = tmp_path / (f"{at}" if at % 2 else "same")
            start(process, folder, space_for(6), seed + at, at)
            collect(process)
            with DiskTier(folder, space_bytes=space_for(6)) as tier:
                found += sum(fetch(tier, cache, chain) > 0 for chain in chains)
                assert tier.stats().dropped == 0, "a unit was unreadable"
                assert tier.verify() == []
                assert tier.stats().errors == 0, tier.stats().problem
                there = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
                assert tier.stats().units == len(there)
                assert tier.stats().bytes == sum(path.stat().st_size for path in there)
                assert not list(folder.glob(".*.partial"))
            at += step
