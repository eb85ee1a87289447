"""A process that forks writers of a store, for test_disk_crash.py to kill. Not a test itself.

Reads lines `folder space seed at` on stdin; for each it forks a process that keeps and fetches
texts until it is killed, and prints the process id. With `at` above 0 it kills itself before its
at-th call to the disk or statement to the index. `wait` lines collect a dead one and
print how it ended.
"""

import os
import random
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import torch

from overleap.cache import durable, store
from overleap.cache.disk import DiskTier
from tests.cache.named import chain_of, fetch, keep, make_cache


def text(seed: int) -> list[int]:
    """One of a few texts that share beginnings, so that writers meet."""
    number = random.Random(seed % 12)
    return [seed % 3] * 2 + [number.randrange(10**6) for _ in range(number.randint(2, 9))]


def work(folder: Path, space: int, seed: int) -> None:
    number, cache = random.Random(seed), make_cache(pages=24)
    while True:
        with DiskTier(folder, space_bytes=space) as tier:
            for _ in range(number.randint(1, 12)):
                chain = chain_of(text(number.randrange(12)))
                if number.random() < 0.7:
                    keep(tier, cache, chain, number.randint(1, len(chain)))
                else:
                    fetch(tier, cache, chain)
            if number.random() < 0.05:
                tier.clear()


class Deadly:
    """Counts calls and statements, and ends the process before the at-th."""

    CALLS = "open read readv write fsync replace unlink fstat statvfs listdir lseek close".split()

    def __init__(self, at: int) -> None:
        self.left = at

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.count()
            return real(*arguments, **options)

        return call


def arm(at: int) -> None:
    """From here on, calls and statements are counted."""
    deadly, connect = Deadly(at), sqlite3.connect

    class Counted(sqlite3.Connection):
        def execute(self, *arguments: Any) -> Any:
            deadly.count()
            return super().execute(*arguments)

    store.os = durable.os = deadly  # type: ignore[attr-defined]
    sqlite3.connect = lambda *a, **o: connect(*a, factory=Counted, **o)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        if line.strip() == "wait":
            print(os.wait()[1], flush=True)
            continue
        folder, space, seed, at = line.split()
        child = os.fork()
        if child == 0:
            try:
                if int(at):
                    arm(int(at))
                work(Path(folder), int(space), int(seed))
            finally:
                os._exit(3)  # reached only by an error
        print(child, flush=True)


if __name__ == "__main__":
    main()
