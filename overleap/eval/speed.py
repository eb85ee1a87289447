"""How fast a model reads and writes, at several depths, and what memory that takes.

Not here: whether its answers are right (needle.py), the command (cli/bench.py).
Read next: record.py (what is kept of it), plot.py, geometry.py (released shapes without weights).
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from overleap import devices, machine
from overleap.cache import layout
from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.cache.state import Sequence as Text
from overleap.checkpoint import load, locate
from overleap.checkpoint.manifest import read_manifest
from overleap.engine.budget import CHUNKS, SPARE_PAGES, budget
from overleap.engine.runner import run
from overleap.errors import CheckpointError, RequestError
from overleap.eval.bench_model import BENCH_MODELS, write_bench_model
from overleap.eval.random_model import random_model, small_config
from overleap.eval.record import Scalar
from overleap.model.transformer import Transformer

DEPTHS = (1024, 4096, 16384, 65536, 131072, 262144, 1048576)
USUAL_DEPTH = 131072  # minutes on two cores; a million takes the plain torch ops an hour
WARM_UP_TOKENS = 256
SLOTS = 2  # the text, and the fork of it that is written on
Counted = Callable[[int, int], None]


@dataclass(frozen=True)
class Memory:
    """Of the process, in a run to one depth.

    cache_bytes           what the sequence holds: its pages, window rings and tails
    allocated_bytes       the whole cache: that, a second slot, spare pages
    base_bytes            the process with its weights, before it had a cache; 0 if unknown, as
                          on an accelerator, where the peak is unknown too
    peak_bytes            the most resident since the depth before (Linux; elsewhere: ever);
                          None if unknown
    predicted_peak_bytes  base, allocated and the scratch formula of cache/layout.py
    """

    cache_bytes: int
    allocated_bytes: int
    base_bytes: int
    peak_bytes: int | None
    predicted_peak_bytes: int

    @property
    def scratch_bytes(self) -> int | None:
        """Of the peak, what is neither base nor allocated."""
        if self.peak_bytes is None or not self.base_bytes:
            return None
        return self.peak_bytes - self.base_bytes - self.allocated_bytes

    @property
    def peak_off_percent(self) -> float | None:
        """The peak over its prediction; below 0: less was taken."""
        if self.peak_bytes is None or not self.base_bytes:
            return None
        return 100 * (self.peak_bytes / self.predicted_peak_bytes - 1)


@dataclass(frozen=True)
class Speed:
    """One depth. Times are of the model alone: no tokenizer, no sampling, no speculation.

    prefill_s            of reading tokens 0 .. depth - 1
    interval_tokens      those since the depth before; interval_s: of reading them
    decode_steps_s       of each step that was written at this depth
    """

    depth_tokens: int
    prefill_s: float
    interval_tokens: int
    interval_s: float
    decode_steps_s: tuple[float, ...]
    memory: Memory

    def row(self) -> dict[str, Scalar]:
        """As a record keeps it: rates beside times, decode by the median step and the slowest."""
        memory = self.memory
        return {
            "depth_tokens": self.depth_tokens,
            "prefill_s": self.prefill_s,
            "prefill_tokens_per_s": self.depth_tokens / self.prefill_s,
            "interval_tokens": self.interval_tokens,
            "interval_tokens_per_s": self.interval_tokens / self.interval_s,
            "decode_tokens_per_s": 1 / statistics.median(self.decode_steps_s),
            "decode_slowest_s": max(self.decode_steps_s),
            "cache_bytes": memory.cache_bytes,
            "allocated_bytes": memory.allocated_bytes,
            "base_bytes": memory.base_bytes,
            "scratch_bytes": memory.scratch_bytes,
            "peak_process_bytes": memory.peak_bytes,
            "predicted_peak_bytes": memory.predicted_peak_bytes,
            "peak_off_percent": memory.peak_off_percent,
        }


def rows_of(found: Mapping[str, Sequence[Speed]]) -> list[dict[str, Scalar]]:
    """Rows of several backends measured at the same depths, with ratios to the first of them. The
    last one may have fewer, where it was stopped."""
    first = next(iter(found.values()))
    rows: list[dict[str, Scalar]] = []
    for backend, speeds in found.items():
        for one, base in zip(speeds, first, strict=False):
            row = {"backend": backend, **one.row()}
            if speeds is not first:
                row["prefill_ratio"] = base.prefill_s / one.prefill_s
                row["interval_ratio"] = base.interval_s / one.interval_s
                row["decode_ratio"] = statistics.median(base.decode_steps_s) / statistics.median(
                    one.decode_steps_s
                )
            rows.append(row)
    return rows


def ladder(to: int) -> list[int]:
    """The usual depths below `to`, and `to`."""
    return [depth for depth in DEPTHS if depth < to] + [to]


def speed(
    model: Transformer,
    depths: Sequence[int] | None = None,
    *,
    decode_tokens: int = 16,
    chunk_tokens: int = 512,
    format: CacheFormat = CacheFormat.RELEASE,
    seed: int = 0,
    native: bool = False,
    progress: Counted | None = None,
) -> Iterator[Speed]:
    """Read one random text up to each depth in turn; at each, write on a fork of it.

    Yields a depth when it is measured, so that one that is stopped or fails costs no other.

    Every depth has a cache of its own size, into which the text moves, so that its memory is that
    of a run to this depth. Where the model has no positions left, the fork is taken earlier.

    depths         tokens, in any order; None: the usual ones that the model has
    decode_tokens  steps to take the median of
    chunk_tokens   tokens of a prefill step at most
    native         what the model's ops are, as for layout.scratch_bytes
    progress       called with tokens read and tokens in all
    Raises RequestError for depths the model cannot have, CapacityError for one that does not fit.
    """
    config, longest = model.config, model.config.max_position_embeddings
    depths = sorted(set(ladder(min(USUAL_DEPTH, longest)) if depths is None else depths))
    # At the last one, the fork may be taken earlier; a text at another is past that point.
    most = max([decode_tokens, *depths[-1:], *(depth + decode_tokens for depth in depths[:-1])])
    if not depths or depths[0] < 1 or most > longest:
        raise RequestError(
            f"depths {list(depths)} and {decode_tokens} more tokens do not fit into 1..{longest}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (depths[-1],), generator=generator)
    base = _base_bytes(model) if model.device.type == "cpu" else 0
    scratch = layout.scratch_bytes(config, chunk_tokens, native)
    _refuse_what_does_not_fit(model, depths, decode_tokens, scratch, base, format)
    _warm_up(model, ids[:WARM_UP_TOKENS].tolist(), format)
    reading = _Reading(model, ids, chunk_tokens, format, progress)
    return _by_depth(reading, depths, decode_tokens, base, scratch)


def _by_depth(
    reading: "_Reading", depths: Sequence[int], decode_tokens: int, base: int, scratch: int
) -> Iterator[Speed]:
    longest = reading.model.config.max_position_embeddings
    seconds = 0.0
    for before, depth in pairwise([0, *depths]):
        reading.make_room(depth + decode_tokens)
        machine.forget_peak()
        took = reading.read(min(depth, longest - decode_tokens))
        steps = _write(reading.model, reading.cache, reading.text, decode_tokens)
        took += reading.read(depth)
        seconds += took
        memory = Memory(
            reading.cache.nbytes(reading.text),
            reading.cache.allocated_bytes,
            base,
            machine.recent_peak_bytes() if base else None,
            base + reading.cache.allocated_bytes + scratch,
        )
        yield Speed(depth, seconds, depth - before, took, tuple(steps), memory)


def _base_bytes(model: Transformer) -> int:
    """Resident memory of the process with every weight in it, those of mapped files too."""
    for weight in model.parameters():
        weight.data.view(torch.uint8).count_nonzero()
    machine.forget_peak()
    return machine.resident_bytes()


def _refuse_what_does_not_fit(
    model: Transformer,
    depths: Sequence[int],
    decode_tokens: int,
    scratch_bytes: int,
    base_bytes: int,
    format: CacheFormat,
) -> None:
    """CapacityError, before a token is read, where the deepest cache does not fit.

    For a moment it stands beside the one before it. The budget counts scratch of its own choice
    of chunk, so what this run takes beyond the least of them is asked for with the base.
    """
    config, free = model.config, devices.free_bytes(model.device)
    if free is None:
        return
    held = machine.resident_bytes() if base_bytes else 0
    beside = max(0, scratch_bytes - layout.scratch_bytes(config, CHUNKS[-1], True))
    if len(depths) > 1:
        pages = pages_for(depths[-2] + decode_tokens) + SPARE_PAGES
        slots = SLOTS * layout.slot_bytes(config, format).total
        beside += pages * layout.page_bytes(config, format) + slots
    budget(
        config,
        depths[-1] + decode_tokens,
        format,
        memory_bytes=held + free,
        slots=SLOTS,
        resident_bytes=base_bytes + beside,
        kept=False,
        native=True,
    )


class _Reading:
    """A text that is read further and further, in a cache that is no larger than asked for."""

    def __init__(
        self,
        model: Transformer,
        ids: Tensor,
        chunk_tokens: int,
        format: CacheFormat,
        progress: Counted | None,
    ) -> None:
        self.model, self.ids, self.chunk_tokens = model, ids, chunk_tokens
        self.progress = progress
        self.cache = Cache(model.config, pages=0, slots=SLOTS, format=format, device=model.device)
        self.text = self.cache.open()

    def make_room(self, tokens: int) -> None:
        """Move the text into a new cache for so many tokens of it and of a fork."""
        old, before = self.cache, self.text
        pages = pages_for(tokens) + SPARE_PAGES
        new = Cache(old.config, pages=pages, slots=old.slots, format=old.format, device=old.device)
        text = new.open()
        new.reserve(text, before.length)
        text.length, text.oldest = before.length, before.oldest
        count = len(text.pages)  # first to take pages, so these have the lowest numbers
        assert text.pages == before.pages == list(range(count)), before.pages
        for source, target in zip(
            (*old.pool.entries, *old.pool.keys), (*new.pool.entries, *new.pool.keys), strict=True
        ):
            if source is not None and target is not None:
                target.rows[:count] = source.rows[:count]
        for source_layer, layer in zip(old.layers, new.layers, strict=True):
            layer.ring.rows[text.slot] = source_layer.ring.rows[before.slot]
            for rows, target_rows in (
                (source_layer.tail, layer.tail),
                (source_layer.index_tail, layer.index_tail),
            ):
                if rows is not None and target_rows is not None:
                    target_rows[text.slot] = rows[before.slot]
        self.cache, self.text = new, text

    def read(self, length: int) -> float:
        """Seconds that it took to read on to this length."""
        seconds = 0.0
        self.cache.reserve(self.text, length)
        while self.text.length < length:
            end = min(self.text.length + self.chunk_tokens, length)
            chunk = self.ids[self.text.length : end].tolist()
            seconds += _step(self.model, self.cache, self.text, chunk)[0]
            if self.progress:
                self.progress(self.text.length, len(self.ids))
        return seconds


def _warm_up(model: Transformer, ids: list[int], format: CacheFormat) -> None:
    """First calls allocate, compile and touch the weights; nobody asks for their speed."""
    pages = pages_for(len(ids))
    cache = Cache(model.config, pages=pages, slots=1, format=format, device=model.device)
    text = cache.open()
    cache.reserve(text, len(ids))
    _step(model, cache, text, ids)


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
    devices.synchronise(model.device)
    return time.perf_counter() - began, logits


@contextmanager
def open_folder(name: str | None, seed: int = 0) -> Iterator[tuple[Path, str, str | None]]:
    """The folder of a model to measure, its name, and what its record says of the weights.

    None is the bundled model. One of BENCH_MODELS is written for as long as the context lasts.
    """
    if name in BENCH_MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            yield folder, name, write_bench_model(name, folder, seed)
        return
    folder = locate(name or "mini")
    manifest = read_manifest(folder)
    yield folder, folder.name, manifest.digest if manifest else None


def open_model(
    name: str | None, seed: int = 0, backend: str = "auto", device: str = "cpu"
) -> tuple[Transformer, str, str | None]:
    """The model to measure, its name, and what its record says of the weights.

    None is the bundled model, or a small one with random weights where there is none.
    """
    if name == "random":
        model = random_model(small_config(), seed, backend=backend, device=device)
        return model, "random", f"normal, seed {seed}"
    try:
        # Weights are views of the mapped files, which may be gone from the folder afterwards.
        with open_folder(name, seed) as (folder, called, weights):
            return load(folder, backend=backend, device=device), called, weights
    except CheckpointError:
        if name is not None:
            raise
        return open_model("random", seed, backend, device)
