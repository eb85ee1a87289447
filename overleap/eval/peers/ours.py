"""Overleap as one of the programs that are compared.

The same calls as an engine makes: chunks of a prompt, then a token a step. No sampling, no
speculation, no prefix cache. Read next: engine/runner.py.
"""

import time
from collections.abc import Sequence

import torch

from overleap import __version__
from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.cache.state import Sequence as Text
from overleap.checkpoint import load
from overleap.engine.budget import SPARE_PAGES
from overleap.engine.runner import run
from overleap.eval.peers.program import WARM_UP_TOKENS, Floats, Measured, Program, Task
from overleap.model.transformer import Batch


class Ours(Program):
    """Overleap with one of its kernel backends."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self.model = load(task.path, backend=task.backend, wide=task.exact)
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
        token = self._read(cache, text, ids)
        prefill_s = time.perf_counter() - began
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            token = int(run(self.model, cache, [(text, [token], 1)]).argmax())
            times.append(time.perf_counter() - began)
        return Measured(prefill_s, tuple(times))

    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Floats:
        cache = self._room(len(ids), 1)
        text = cache.open()
        cache.reserve(text, len(ids))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(ids), self.chunk_tokens):
                chunk = ids[start : start + self.chunk_tokens]
                parts.append(self.model(Batch.of([(text, chunk)], cache, "all"), cache).logits)
        rows = torch.cat(parts)[[end - 1 for end in ends]]
        found: Floats = rows.float().log_softmax(-1).numpy()
        return found

    def write_together(self, ids: list[int], sequences: int, steps: int) -> list[float]:
        cache = self._room((len(ids) + steps) * sequences, sequences)
        texts = [cache.open() for _ in range(sequences)]
        for number, text in enumerate(texts):  # each its own text: nothing is shared
            cache.reserve(text, len(ids) + steps)
            self._read(cache, text, ids[number:] + ids[:number])
        tokens, times = list(range(sequences)), []
        for _ in range(steps):
            parts = [(text, [token], 1) for text, token in zip(texts, tokens, strict=True)]
            began = time.perf_counter()
            tokens = run(self.model, cache, parts).argmax(-1).tolist()
            times.append(time.perf_counter() - began)
        return times

    def _read(self, cache: Cache, text: Text, ids: list[int]) -> int:
        """Read in chunks; the likeliest next token."""
        logits = torch.empty(0)
        for start in range(0, len(ids), self.chunk_tokens):
            chunk = ids[start : start + self.chunk_tokens]
            logits = run(self.model, cache, [(text, chunk, 1)])
        return int(logits.argmax())

    def _room(self, tokens: int, slots: int) -> Cache:
        pages = pages_for(tokens) + SPARE_PAGES + slots
        return Cache(self.model.config, pages=pages, slots=slots, format=self.format)
