"""Runs a checkpoint that is larger than memory, cold and warm, beside what its disk can do.

    python -m tests.large /tmp/large && python -m tests.large_run /tmp/large --memory 8GiB

Cold: nothing of the files is in the system's cache. Warm: a second text, in the same process.
"""

import argparse
import mmap
import os
import random
import threading
import time
from pathlib import Path

import torch

from overleap import machine
from overleap.checkpoint import build, open_checkpoint, placed
from overleap.cli.room import Room
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling, Token
from overleap.engine.resident import Resident
from overleap.kernels import native
from overleap.machine import size

MIB = 2**20


def disk_rate(files: list[Path], block: int, count: int, threads: int, scattered: bool) -> float:
    """Bytes a second past the system's cache, each thread one block at a time."""
    draw = random.Random(0)
    rooms = [(path, path.stat().st_size // block) for path in files]
    todo = [(rooms[0][0], n * block) for n in range(count)]
    if scattered:
        chosen = [draw.choice(rooms) for _ in range(count)]
        todo = [(path, draw.randrange(blocks) * block) for path, blocks in chosen]
    handles = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}
    waiting = iter(todo)
    lock = threading.Lock()

    def read() -> None:
        room = mmap.mmap(-1, block)
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            os.preadv(handles[job[0]], [room], job[1])

    readers = [threading.Thread(target=read) for _ in range(threads)]
    began = time.perf_counter()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - began
    for handle in handles.values():
        os.close(handle)
    return count * block / seconds


def forget(files: list[Path]) -> None:
    """Take the files out of the system's cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory() -> str:
    """Resident memory of this process, by kind."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "RssAnon", "RssFile")
    return ", ".join(f"{n} {size(1024 * int(found[n].split()[0]))}" for n in names)


def answer(engine: Engine, vocabulary: int, seed: int, prompt: int, tokens: int) -> str:
    """Read a random prompt, write an answer; times of both."""
    draw = random.Random(seed)
    ids = [0, *(draw.randrange(2, vocabulary) for _ in range(prompt - 1))]
    sampling = Sampling(seed=seed, max_tokens=tokens, stop_ids=())
    before = engine.stats().experts
    began, times = time.perf_counter(), []
    for event in engine.stream(engine.submit(Request(prompt=ids, sampling=sampling))):
        if isinstance(event, Token):
            times.append(time.perf_counter())
    now = engine.stats().experts
    assert before is not None and now is not None
    uses = {n: getattr(now, n) - getattr(before, n) for n in ("kept", "ahead", "missed")}
    waited, read = now.waited_s - before.waited_s, now.read_bytes - before.read_bytes
    half = len(times) // 2
    return (
        f"first token {times[0] - began:.1f} s, then {half / (times[half] - times[0]):.2f} and "
        f"{(len(times) - 1 - half) / (times[-1] - times[half]):.2f} tokens/s (halves); {uses}, "
        f"waited {waited:.1f} s, {size(read)} read"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    files = sorted(given.folder.glob("*.safetensors"))
    forget(files)
    for block, count, threads, scattered in (
        (MIB, 1500, 2, False), (12 * MIB, 100, 4, True), (4096, 5000, 8, True),
    ):  # fmt: skip
        rate = disk_rate(files, block, count, threads, scattered)
        order = "anywhere" if scattered else "in sequence"
        print(f"disk: {size(block)} {order}, {threads} at a time: {rate / 1e9:.2f} GB/s")
    began = time.perf_counter()
    checkpoint, verified = open_checkpoint(given.folder)
    model = build(checkpoint, dtype=torch.bfloat16)
    where = placed(checkpoint, model)
    room = Room.of("release", given.memory, False)
    longest = given.prompt + given.tokens
    fits = room.fit(checkpoint.config, longest, native=native(), weights=where.weights)
    resident = Resident(model, where, fits.expert_bytes)
    print(f"loaded {size(sum(f.stat().st_size for f in files))} in "
          f"{time.perf_counter() - began:.1f} s ({verified})")  # fmt: skip
    print(f"predicted {size(fits.peak_bytes)}: {fits}")
    engine = Engine(
        model, pages=fits.pages, slots=1, chunk_tokens=fits.chunk_tokens, snapshot_bytes=0,
        speculate="off", resident=resident,
    )  # fmt: skip
    for name, seed in (("cold", 1), ("warm", 2)):
        told = answer(engine, checkpoint.config.vocab_size, seed, given.prompt, given.tokens)
        print(f"{name}: {told}")
    print(f"{engine.stats().experts}")
    print(f"{memory()}; load average {os.getloadavg()[0]:.1f}; free {machine.free_bytes()}")
    resident.close()


if __name__ == "__main__":
    main()
