"""How fast a model reads and writes, at several depths, and what memory that takes.

Not here: whether its answers are right (needle.py), the command (cli/bench.py).
Read next: record.py (what is kept of it), geometry.py (released shapes without weights).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.cache.state import Sequence as Text
from overleap.checkpoint import load, locate
from overleap.checkpoint.manifest import read_manifest
from overleap.engine.runner import run
from overleap.errors import CheckpointError, RequestError
from overleap.eval.random_model import random_model, small_config
from overleap.machine import peak_resident_bytes
from overleap.model.transformer import Transformer

DEPTHS = (1024, 4096, 16384)
WARM_UP_TOKENS = 256
Counted = Callable[[int, int], None]


@dataclass(frozen=True)
class Speed:
    """One depth. Times are of the model alone: no tokenizer, no sampling, no speculation.

    prefill_tokens_per_s  tokens 0 .. depth - 1 over the time to read them all
    decode_tokens_per_s   of one sequence at this depth: 1 / median time of a step
    decode_slowest_s      the slowest of those steps
    cache_bytes           what the sequence holds: its pages, window rings and tails
    peak_process_bytes    most memory the process ever had resident, up to here; None if unknown
    """

    depth_tokens: int
    prefill_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_slowest_s: float
    cache_bytes: int
    peak_process_bytes: int | None


def speed(
    model: Transformer,
    depths: Sequence[int] = DEPTHS,
    *,
    decode_tokens: int = 16,
    chunk_tokens: int = 512,
    format: CacheFormat = CacheFormat.RELEASE,
    seed: int = 0,
    progress: Counted | None = None,
) -> list[Speed]:
    """Read one random text up to each depth in turn; at each, write on a fork of it.

    depths         tokens, in any order
    decode_tokens  steps to take the median of
    chunk_tokens   tokens of a prefill step at most
    progress       called with tokens read and tokens in all
    Raises RequestError for depths the model cannot have.
    """
    depths = sorted(set(depths))
    longest = model.config.max_position_embeddings
    if not depths or depths[0] < 1 or depths[-1] + decode_tokens > longest:
        raise RequestError(
            f"depths {list(depths)} and {decode_tokens} more tokens do not fit into 1..{longest}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (depths[-1],), generator=generator).tolist()
    pages = pages_for(depths[-1]) + pages_for(decode_tokens) + 2
    cache = Cache(model.config, pages=pages, slots=2, format=format, device=model.device)
    _warm_up(model, cache, ids[:WARM_UP_TOKENS])
    text = cache.open()
    found: list[Speed] = []
    seconds = 0.0
    for depth in depths:
        cache.reserve(text, depth)
        for start in range(text.length, depth, chunk_tokens):
            chunk = ids[start : min(start + chunk_tokens, depth)]
            seconds += _step(model, cache, text, chunk)[0]
            if progress:
                progress(text.length, depths[-1])
        steps = _write(model, cache, text, decode_tokens)
        found.append(
            Speed(
                depth,
                seconds,
                depth / seconds,
                1 / statistics.median(steps),
                max(steps),
                cache.nbytes(text),
                peak_resident_bytes(),
            )
        )
    cache.close(text)
    return found


def _warm_up(model: Transformer, cache: Cache, ids: list[int]) -> None:
    """First calls allocate, compile and touch the weights; nobody asks for their speed."""
    text = cache.open()
    cache.reserve(text, len(ids))
    _step(model, cache, text, ids)
    cache.close(text)


def _write(model: Transformer, cache: Cache, text: Text, count: int) -> list[float]:
    """Seconds of each of `count` greedy steps that continue a fork of the text."""
    twin = cache.fork(text)
    cache.reserve(twin, text.length + count)
    token, times = 0, []
    for _ in range(count):
        seconds, logits = _step(model, cache, twin, [token])
        token = int(logits.argmax())
        times.append(seconds)
    cache.close(twin)
    return times


def _step(model: Transformer, cache: Cache, text: Text, ids: list[int]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    logits = run(model, cache, [(text, ids, 1)])
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter() - began, logits


def open_model(
    name: str | None, seed: int = 0, backend: str = "auto"
) -> tuple[Transformer, str, str | None]:
    """The model to measure, its name, and what its record says of the weights.

    None is the bundled model, or a small one with random weights where there is none.
    """
    if name == "random":
        return random_model(small_config(), seed, backend=backend), "random", f"normal, seed {seed}"
    try:
        folder = locate(name or "mini")
    except CheckpointError:
        if name is not None:
            raise
        return open_model("random", seed, backend)
    manifest = read_manifest(folder)
    return load(folder, backend=backend), folder.name, manifest.digest if manifest else None
