"""Logits of every position of a text, for comparison with other implementations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from overleap import machine
from overleap.cache.layout import CacheFormat, cache_bytes, pages_for
from overleap.cache.state import Cache
from overleap.config import ModelConfig
from overleap.errors import CapacityError, RequestError
from overleap.model.transformer import Batch, Transformer


def all_logits(
    model: Transformer,
    tokens: Any,
    cache_format: CacheFormat,
    chunk_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """f32 [tokens, V], read in steps of `chunk_tokens`.

    Raises RequestError when `tokens` is not a list of ids of this vocabulary, or more than the
    model has positions; CapacityError where the logits do not fit into the memory that is free.
    """
    config, vocabulary = model.config, model.config.vocab_size
    if not isinstance(tokens, list) or not tokens:
        raise RequestError("the token ids are not a JSON array with at least one id")
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise RequestError(f"token {place} is {token!r}, ids are 0 to {vocabulary - 1}")
    if len(tokens) > config.max_position_embeddings:
        raise RequestError(
            f"{len(tokens)} token ids are given, the model has "
            f"{config.max_position_embeddings} positions",
            "cut the text",
        )
    _refuse_unfit(config, len(tokens), cache_format, chunk_tokens)
    cache = Cache(config, pages=pages_for(len(tokens)), slots=1, format=cache_format)
    sequence, found = cache.open(), torch.empty(len(tokens), vocabulary)
    cache.reserve(sequence, len(tokens))
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk_tokens):
            end = min(start + chunk_tokens, len(tokens))
            batch = Batch.of([(sequence, tokens[start:end])], cache, "all")
            found[start:end] = model(batch, cache).logits
            if progress is not None:
                progress(end, len(tokens))
    return found


def _refuse_unfit(
    config: ModelConfig, tokens: int, cache_format: CacheFormat, chunk_tokens: int
) -> None:
    """Raise CapacityError where all logits, a step's beside them and the cache do not fit."""
    free = machine.free_bytes()
    each, cache = 4 * config.vocab_size, cache_bytes(config, tokens, cache_format).total
    step = min(chunk_tokens, tokens)
    needed = each * (tokens + step) + cache
    if free is not None and needed > free:
        raise CapacityError(
            f"the logits of {tokens} tokens need {machine.size(needed)} of memory "
            f"({machine.size(each)} a token, {machine.size(cache)} of cache), "
            f"{machine.size(free)} is free",
            f"{max(0, (free - cache) // each - step)} tokens fit: cut the text",
        )


def write_logits(path: Path, logits: Tensor) -> None:
    """One safetensors file with the tensor `logits`."""
    try:
        save_file({"logits": logits}, str(path))
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be written: {error}") from None
