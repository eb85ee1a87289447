"""V4 and V3.2 attention measured beside each other, at equal width and depth, without weights.

One layer of every kind is filled and timed, and counted as often as the model has it: what a step
over all layers takes, without the memory of all layers. Both run the plain torch definition, or
V4 another backend. Not here: the V4 caches and their filling (geometry.py), V3.2 (previous.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, previous_bytes_per_token, stored_bytes
from overleap.config import LayerKind, ModelConfig
from overleap.errors import CapacityError
from overleap.eval.geometry import BANK_ROWS, FILL_ROWS, Geometry, geometry
from overleap.eval.previous import Layer, Shape
from overleap.eval.record import Scalar
from overleap.kernels.spec import Ops
from overleap.machine import free_bytes, size
from overleap.plan.flops import Flops, Rules, token_flops

CONTEXTS = (4096, 16384, 65536, 262144, 1048576)
KINDS = {LayerKind.SLIDING: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}


@dataclass(frozen=True)
class Both:
    """One context. Bytes and seconds of a decode step's attention over all layers.

    own, previous  of V4 and of V3.2 at the same width and depth
    bytes          allocated for entries, keys and windows; formula: what cache/layout.py says
    flops          attention over rows, and scores of entries, as planned for one token
    """

    context: int
    own_bytes: int
    own_formula_bytes: int
    previous_bytes: int
    previous_formula_bytes: int
    own_s: float
    previous_s: float
    own_scan_s: float
    previous_scan_s: float
    own_flops: Flops
    previous_flops: Flops

    def row(self) -> dict[str, Scalar]:
        """As a record keeps it, ratios beside: how many times V3.2 takes more."""
        own, previous = self.own_flops, self.previous_flops
        raw = [flops.core + flops.index for flops in (own, previous)]
        counted = [flops.counted(Rules()) for flops in (own, previous)]
        return {
            "context_tokens": self.context,
            "cache_bytes": self.own_bytes,
            "cache_formula_bytes": self.own_formula_bytes,
            "v32_cache_bytes": self.previous_bytes,
            "v32_cache_formula_bytes": self.previous_formula_bytes,
            "cache_ratio": self.previous_bytes / self.own_bytes,
            "cache_ratio_computed": self.previous_formula_bytes / self.own_formula_bytes,
            "step_s": self.own_s,
            "scan_s": self.own_scan_s,
            "v32_step_s": self.previous_s,
            "v32_scan_s": self.previous_scan_s,
            "time_ratio": self.previous_s / self.own_s,
            "flops_ratio": raw[1] / raw[0],
            "fp8_flops_ratio": counted[1] / counted[0],
        }


def generations(
    config: ModelConfig,
    ops: Ops,
    contexts: Sequence[int] = CONTEXTS,
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Both]:
    """Measure every context, multiples of 128. Times are the fastest of the repeats, of both alike:
    other work on the machine only ever adds to them.

    clock  seconds; time.process_time where one thread computes and others share its core
    Raises CapacityError where the largest layer does not fit into what is free.
    """
    shape, layers = Shape.like(config), config.num_hidden_layers
    row = round(previous_bytes_per_token(config) / layers)
    needed, free = 2 * row * max(contexts), free_bytes()
    if free is not None and needed > free:
        raise CapacityError(
            f"a layer of {max(contexts)} tokens takes {size(needed)} to fill and measure, "
            f"{size(free)} is free",
            "give a smaller --context",
        )
    found = []
    for done, context in enumerate(contexts):
        own = _own(config, ops, context, repeats, clock, seed)
        scan, step, held = _previous(shape, context, repeats, clock, seed)
        if progress is not None:
            progress(done + 1, len(contexts))
        windows = config.sliding_window * layers * own.window_row
        found.append(
            Both(
                context,
                own.page_bytes + windows,
                stored_bytes(config, context, CacheFormat.RELEASE),
                layers * held,
                layers * row * context,
                own.step_s,
                layers * step,
                own.scan_s,
                layers * scan,
                _attention(token_flops(config, context)),
                _previous_flops(shape, layers, context),
            )
        )
    return found


@dataclass(frozen=True)
class _Own:
    """Of all layers: bytes of pages, of a window row; seconds of a step, and of its scan alone."""

    page_bytes: int
    window_row: int
    step_s: float
    scan_s: float


def _own(
    config: ModelConfig,
    ops: Ops,
    context: int,
    repeats: int,
    clock: Callable[[], float],
    seed: int,
) -> _Own:
    """A layer of each kind that the model has, by how many it has."""
    pages, step, scan, row = 0, 0.0, 0.0, 0
    for kind, ratio in KINDS.items():
        count = config.layer_kinds.count(kind)
        if not count:
            continue
        one = config.with_(
            num_hidden_layers=1, num_nextn_predict_layers=0, num_hash_layers=0,
            compress_ratios=(ratio,),
        )  # fmt: skip
        measured: Geometry = geometry(
            one, ops, context, repeats=repeats, pick=min, clock=clock, seed=seed
        )
        pages += count * measured.page_bytes
        step += count * sum(part.step_s for part in measured.parts)
        scan += count * sum(part.step_s for part in measured.parts if "scan" in part.part)
        row = measured.window_bytes // config.sliding_window
    return _Own(pages, row, step, scan)


def _previous(
    shape: Shape, context: int, repeats: int, clock: Callable[[], float], seed: int
) -> tuple[float, float, int]:
    """Fastest seconds of the scan and of a whole step of one V3.2 layer, and its bytes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    bank = Layer.of(
        shape,
        random(BANK_ROWS, shape.latent),
        random(BANK_ROWS, shape.rope),
        random(BANK_ROWS, shape.index_dim),
    )
    layer = Layer(
        shape, _drawn(bank.rows, context, generator), _drawn(bank.keys, context, generator)
    )
    index_q, weight = random(shape.index_heads, shape.index_dim), random(shape.index_heads)
    q, scale = random(shape.heads, shape.latent + shape.rope), (shape.latent + shape.rope) ** -0.5
    scans, steps = [], []
    with torch.inference_mode():
        layer.attend(q, layer.choose(index_q, weight), scale)  # the first call allocates
        for _ in range(repeats):
            began = clock()
            chosen = layer.choose(index_q, weight)
            scanned = clock()
            layer.attend(q, chosen, scale)
            scans.append(scanned - began)
            steps.append(clock() - began)
    return min(scans), min(steps), layer.nbytes


def _drawn(bank: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """So many rows, drawn from the bank."""
    found = torch.empty(rows, bank.shape[1], dtype=bank.dtype)
    for low in range(0, rows, FILL_ROWS):
        part = found[low : low + FILL_ROWS]
        part.copy_(bank[torch.randint(len(bank), (len(part),), generator=generator)])
    return found


def _attention(flops: Flops) -> Flops:
    """Only what is measured here."""
    return Flops(0, 0, 0, flops.core, flops.index, flops.index_is_fp4)


def _previous_flops(shape: Shape, layers: int, context: int) -> Flops:
    """Of V3.2 layers of this shape (compare plan/flops.py, `Previous`)."""
    rows = min(shape.topk, context)
    core = 2 * layers * shape.heads * (2 * shape.latent + shape.rope) * rows
    index = 2 * layers * shape.index_heads * shape.index_dim * context
    return Flops(0, 0, 0, core, index, index_is_fp4=False)
