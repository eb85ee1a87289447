"""What is asked of a program that is measured, and ours as one of them.

Not here: the others (llama.py, hugging_face.py), asking (versus.py). Read next: worker.py.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from overleap import __version__
from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.checkpoint import load
from overleap.engine.budget import SPARE_PAGES
from overleap.engine.runner import run
from overleap.model.transformer import Batch

WARM_UP_TOKENS = 256


@dataclass(frozen=True)
class Task:
    """How a program is to be set up.

    folder        the checkpoint, in the official layout
    exact         float32 throughout and nothing rounded, for comparing logits
    backend       of our kernels; others have none
    chunk_tokens  of our prefill steps; the others read in their own usual way
    memory_bytes  that the process may take at most; None: no limit
    """

    program: str
    folder: str
    threads: int
    exact: bool = False
    backend: str = "auto"
    chunk_tokens: int = 512
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds to read a text, and of each greedy step that continues it."""

    prefill_s: float
    steps_s: tuple[float, ...]


class Program(ABC):
    """A program with a model in memory, ready to read."""

    version: str
    # How it computes, in a few words, for the record.
    manner: str

    @abstractmethod
    def measure(self, ids: list[int], steps: int) -> Measured:
        """Read the text from nothing, then write `steps` tokens."""

    @abstractmethod
    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Tensor:
        """f32 [len(ends), V]: of the token that follows ids[:end], for every end."""

    def write_together(self, ids: list[int], sequences: int, steps: int) -> list[float] | None:
        """Seconds of steps that each continue so many copies of a text by a token.

        None where the program is not asked: only ours is measured so.
        """
        return None


class Ours(Program):
    """Overleap with one of its kernel backends."""

    def __init__(self, task: Task) -> None:
        self.model = load(task.folder, backend=task.backend, wide=task.exact)
        self.format = CacheFormat.WIDE if task.exact else CacheFormat.RELEASE
        self.chunk_tokens = task.chunk_tokens
        self.version = __version__
        self.manner = f"kernels {task.backend}, {self.format.value} cache"
        self.measure([0] * WARM_UP_TOKENS, 2)

    def measure(self, ids: list[int], steps: int) -> Measured:
        cache = self._room(len(ids) + steps, 1)
        text = cache.open()
        cache.reserve(text, len(ids) + steps)
        began = time.perf_counter()
        logits = torch.empty(0)
        for start in range(0, len(ids), self.chunk_tokens):
            logits = run(self.model, cache, [(text, ids[start : start + self.chunk_tokens], 1)])
        prefill_s = time.perf_counter() - began
        times = []
        for _ in range(steps):
            token = int(logits.argmax())
            began = time.perf_counter()
            logits = run(self.model, cache, [(text, [token], 1)])
            times.append(time.perf_counter() - began)
        return Measured(prefill_s, tuple(times))

    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Tensor:
        cache = self._room(len(ids), 1)
        text = cache.open()
        cache.reserve(text, len(ids))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(ids), self.chunk_tokens):
                chunk = ids[start : start + self.chunk_tokens]
                parts.append(self.model(Batch.of([(text, chunk)], cache, "all"), cache).logits)
        rows = torch.cat(parts)[[end - 1 for end in ends]]
        return rows.float().log_softmax(-1)

    def write_together(self, ids: list[int], sequences: int, steps: int) -> list[float]:
        cache = self._room(len(ids) + sequences * (steps + 128), sequences + 1)
        text = cache.open()
        cache.reserve(text, len(ids))
        for start in range(0, len(ids), self.chunk_tokens):
            run(self.model, cache, [(text, ids[start : start + self.chunk_tokens], 0)])
        copies = [cache.fork(text) for _ in range(sequences)]
        for copy in copies:
            cache.reserve(copy, len(ids) + steps)
        tokens, times = list(range(sequences)), []
        for _ in range(steps):
            parts = [(copy, [token], 1) for copy, token in zip(copies, tokens, strict=True)]
            began = time.perf_counter()
            logits = run(self.model, cache, parts)
            times.append(time.perf_counter() - began)
            tokens = [int(row.argmax()) for row in logits]
        return times

    def _room(self, tokens: int, slots: int) -> Cache:
        pages = pages_for(tokens) + SPARE_PAGES
        return Cache(self.model.config, pages=pages, slots=slots, format=self.format)


def open_program(task: Task) -> Program:
    """The program that the task names, with its weights loaded.

    Raises OverleapError where the package that it comes in is not installed.
    """
    torch.set_num_threads(task.threads)
    if task.program == "transformers":
        from overleap.eval.peers.hugging_face import HuggingFace

        return HuggingFace(task)
    if task.program == "llama.cpp":
        from overleap.eval.peers.llama import Llama

        return Llama(task, Path(task.folder))
    return Ours(task)
