"""Small models in memory and poisoned caches, for tests that compare one way to run with another.

Not about files: tests/checkpoints.py writes those. Read next: ../test_state.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache, Sequence
from overleap.config import ModelConfig
from overleap.kernels.spec import Ops
from overleap.model.transformer import Batch, Transformer
from tests.oracles import where


def build(config: ModelConfig, tensors: dict[str, Tensor], ops: Ops | None = None) -> Transformer:
    """A model with these tensors; plain ones in float32, as on a CPU."""
    model = Transformer(config, ops or where.ops())
    plain = (torch.bfloat16, torch.float16)
    model.assign(
        {n: (t.float() if t.dtype in plain else t).to(where.DEVICE) for n, t in tensors.items()}
    )
    return model


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's setting, which the native kernels share."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held(cache: Cache) -> list[Tensor]:
    """Everything in it."""
    found: list[Tensor | None] = []
    for layer in cache.layers:
        pools = [p.rows for p in (layer.ring, layer.entries, layer.keys) if p is not None]
        found += [*pools, layer.tail, layer.index_tail]
    return [tensor for tensor in found if tensor is not None]


def poison(cache: Cache) -> None:
    """Every byte of the cache becomes a NaN: whoever reads what nobody wrote shows it."""
    for tensor in held(cache):
        tensor.fill_(255 if tensor.dtype is torch.uint8 else torch.nan)


def room(config: ModelConfig, tokens: int, cache_format: CacheFormat, slots: int = 2) -> Cache:
    """A poisoned cache for `slots` sequences of `tokens` tokens each."""
    pages = slots * pages_for(tokens)
    cache = Cache(config, pages=pages, slots=slots, format=cache_format, device=where.DEVICE)
    poison(cache)
    return cache


def start(cache: Cache, tokens: int) -> Sequence:
    """An empty sequence with pages for `tokens` tokens."""
    sequence = cache.open()
    cache.reserve(sequence, tokens)
    return sequence


def feed(
    model: Transformer, cache: Cache, sequence: Sequence, ids: list[int], chunk: int | None = None
) -> Tensor:
    """Logits f32 [len(ids), V] of the next tokens of a sequence, read `chunk` at a time."""
    cache.reserve(sequence, sequence.length + len(ids))
    step = chunk or max(len(ids), 1)
    parts = []
    for low in range(0, len(ids), step):
        batch = Batch.of([(sequence, ids[low : low + step])], cache, "all")
        parts.append(model(batch, cache).logits)
    return torch.cat(parts)


def draw_ids(config: ModelConfig, count: int, generator: torch.Generator) -> list[int]:
    """Random token ids."""
    drawn: list[int] = torch.randint(config.vocab_size, (count,), generator=generator).tolist()
    return drawn


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN if there is any."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())
