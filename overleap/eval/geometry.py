"""A decode step's attention at the real size of a released model, without its weights.

Pools, rings and queries have the released shapes and hold random rows in the release format, so
bytes and times are those of the real thing. Not here: whole steps of a model (speed.py).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.cache.pool import row_formats
from overleap.cache.state import Cache, LayerCache
from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.devices import current, free_bytes, synchronise
from overleap.errors import CapacityError
from overleap.kernels.conformance import Ceilings, Verdict
from overleap.kernels.cost import Cost, Unit, cost
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops, Pool
from overleap.machine import size

CPU = torch.device("cpu")
BANK_ROWS = 4096  # different random rows; every pool is filled with draws from these
FILL_ROWS = 1 << 16
Call = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Part:
    """One op over all layers of a kind, in one decode step of one sequence.

    step_s       of the repeats, the median time for all `layers` layers (or as `pick` says)
    read_bytes   of cache rows that the step must read for it
    moved_bytes  those, queries and results; operations of all layers, and their unit: kernels/cost
    """

    part: str
    layers: int
    step_s: float
    read_bytes: int
    moved_bytes: int
    operations: int
    unit: Unit

    def share(self, limits: Ceilings) -> tuple[float, str]:
        """Of the machine's ceiling that binds, and its name, as `overleap conform` counts it."""
        must = Cost(self.moved_bytes, self.operations, self.unit)
        verdict = Verdict("", self.part, True, 0.0, 0.0, seconds=self.step_s, cost=must)
        share = verdict.share(limits)
        assert share is not None
        return share


@dataclass(frozen=True)
class Geometry:
    """A filled cache: what was allocated, what the formula says, and the times."""

    context_tokens: int
    page_bytes: int
    formula_bytes_per_token: float
    window_bytes: int
    parts: tuple[Part, ...]

    @property
    def bytes_per_token(self) -> float:
        """Measured: bytes of the page pools over the tokens they hold."""
        return self.page_bytes / self.context_tokens


def geometry(
    config: ModelConfig,
    ops: Ops,
    tokens: int,
    *,
    device: torch.device = CPU,
    repeats: int = 3,
    pick: Callable[[list[float]], float] = statistics.median,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Geometry:
    """Fill the caches of all layers with `tokens` tokens and time the attention of one step.

    tokens  a multiple of 128
    pick    of the times of the repeats, the one that is told
    clock   seconds; time.process_time where one thread computes and others share its core
    Raises CapacityError when the cache does not fit into what is free.
    """
    pages = layout.pages_for(tokens)
    needed = pages * layout.page_bytes(config, CacheFormat.RELEASE)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"a cache of {tokens} tokens takes {size(needed)}, {size(free)} is free",
            "give a smaller --context",
        )
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(config, pages=pages, slots=1, device=device)
    entry, key = row_formats(config, CacheFormat.RELEASE)
    bank = ops.quantize(torch.randn(BANK_ROWS, entry.width, generator=generator).to(device), entry)
    keys = ops.quantize(torch.randn(BANK_ROWS, key.width, generator=generator).to(device), key)
    pools = [(p, bank) for p in cache.pool.entries if p] + [(p, keys) for p in cache.pool.keys if p]
    for done, (pool, rows) in enumerate(pools):
        _fill(pool, rows, generator)
        if progress is not None:
            progress(done + 1, len(pools))
    for layer in cache.layers:
        layer.ring.rows[0] = bank[: layer.ring.per_page]
    spans = Spans.of([(tokens - 1, 1, 0, list(range(pages)))], device)
    step = _Step(config, ops, cache.layers, spans, bank, generator, clock)
    return Geometry(
        tokens,
        cache.pool.nbytes,
        layout.bytes_per_token(config, CacheFormat.RELEASE),
        len(config.layer_kinds) * config.sliding_window * bank.shape[1],
        step.measure(repeats, pick),
    )


def _fill(pool: Pool, bank: Tensor, generator: torch.Generator) -> None:
    """Draws from the bank into every row."""
    flat = pool.rows.view(-1, pool.rows.shape[-1])
    for low in range(0, len(flat), FILL_ROWS):
        part = flat[low : low + FILL_ROWS]
        drawn = torch.randint(len(bank), (len(part),), generator=generator)
        part.copy_(bank[drawn.to(bank.device)])


class _Step:
    """The attention calls of one decode step, layer kind by layer kind."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        layers: list[LayerCache],
        spans: Spans,
        bank: Tensor,
        generator: torch.Generator,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.ops, self.spans, self.clock = config, ops, spans, clock
        kinds = config.layer_kinds
        self.of = {
            kind: [x for x, k in zip(layers, kinds, strict=False) if k is kind]
            for kind in LayerKind
        }
        heads, width = config.num_attention_heads, config.head_dim
        device = bank.device
        # As a released model has them: products in bf16 are what chips are made for.
        self.q = torch.randn(1, heads, width, generator=generator).to(device, torch.bfloat16)
        self.sink, self.fresh = torch.zeros(heads, device=device), bank[:1]
        _, key = row_formats(config, CacheFormat.RELEASE)
        index = torch.randn(1, config.index_n_heads, key.width, generator=generator)
        self.index_q = ops.quantize(index.to(device), key)
        visible = (spans.start[0] + 1) // 4
        count = min(config.index_topk, visible)
        self.chosen = torch.randperm(visible, generator=generator)[None, :count].to(device)
        self.index_weight = torch.randn(1, config.index_n_heads, generator=generator).to(device)

    def measure(self, repeats: int, pick: Callable[[list[float]], float]) -> tuple[Part, ...]:
        """The picked time of every part, each over all its layers."""
        config, entry = self.config, self.fresh.shape[-1]
        context = self.spans.start[0] + 1
        csa, hca = self.of[LayerKind.CSA], self.of[LayerKind.HCA]
        window = config.sliding_window * entry
        chosen = min(config.index_topk, context // RATIO_OF_KIND[LayerKind.CSA])
        found = []
        if csa:
            assert csa[0].keys is not None
            scan = context // 4 * csa[0].keys.rows.shape[-1]
            found.append(self._time("index scan (CSA)", csa, scan, repeats, pick, self._index))
            gathered = window + chosen * entry
            found.append(
                self._time("gather attention (CSA)", csa, gathered, repeats, pick, self._gather)
            )
        if hca:
            dense = window + context // 128 * entry
            found.append(
                self._time("dense attention (HCA)", hca, dense, repeats, pick, self._dense)
            )
        if sliding := self.of[LayerKind.SLIDING]:
            found.append(
                self._time("window attention", sliding, window, repeats, pick, self._window)
            )
        return tuple(found)

    def _time(
        self,
        name: str,
        layers: list[LayerCache],
        read_bytes: int,
        repeats: int,
        pick: Callable[[list[float]], float],
        call: Callable[[LayerCache], Call],
    ) -> Part:
        """call  the op of a layer and its arguments"""
        times, device, count = [], self.fresh.device, len(layers)
        calls = [call(layer) for layer in layers]
        op, first = calls[0]
        run = getattr(self.ops, op)
        with torch.inference_mode(), current(device):
            run(*first)  # the first call allocates
            synchronise(device)
            for _ in range(repeats):
                began = self.clock()
                for _, arguments in calls:
                    run(*arguments)
                synchronise(device)
                times.append(self.clock() - began)
        must = cost(op, first)  # of every layer the same
        moved, operations = count * must.bytes, count * must.operations
        return Part(name, count, pick(times), count * read_bytes, moved, operations, must.unit)

    def _index(self, layer: LayerCache) -> Call:
        topk = self.config.index_topk
        return "index_topk", (self.index_q, self.index_weight, layer.keys, 4, self.spans, topk)

    def _gather(self, layer: LayerCache) -> Call:
        return self._attend(layer, self.chosen, 4)

    def _dense(self, layer: LayerCache) -> Call:
        return self._attend(layer, None, 128)

    def _window(self, layer: LayerCache) -> Call:
        return self._attend(layer, None, 0)

    def _attend(self, layer: LayerCache, chosen: Tensor | None, ratio: int) -> Call:
        config = self.config
        scale, window = config.head_dim**-0.5, config.sliding_window
        return "attend", (
            self.q,
            self.fresh,
            layer.ring,
            layer.entries,
            chosen,
            ratio,
            self.sink,
            scale,
            window,
            self.spans,
        )
