"""Logits of every position of a text, for comparison with other implementations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from overleap.cache.layout import CacheFormat, pages_for
from overleap.cache.state import Cache
from overleap.errors import RequestError
from overleap.model.transformer import Batch, Transformer


def all_logits(
    model: Transformer,
    tokens: Any,
    cache_format: CacheFormat,
    chunk_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """f32 [tokens, V], read in steps of `chunk_tokens`.

    Raises RequestError when `tokens` is not a list of ids of this vocabulary.
    """
    vocabulary = model.config.vocab_size
    if not isinstance(tokens, list) or not tokens:
        raise RequestError("the token ids are not a JSON array with at least one id")
    for place, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise RequestError(f"token {place} is {token!r}, ids are 0 to {vocabulary - 1}")
    cache = Cache(model.config, pages=pages_for(len(tokens)), slots=1, format=cache_format)
    sequence, parts = cache.open(), []
    cache.reserve(sequence, len(tokens))
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk_tokens):
            batch = Batch.of([(sequence, tokens[start : start + chunk_tokens])], cache, "all")
            parts.append(model(batch, cache).logits)
            if progress is not None:
                progress(sequence.length, len(tokens))
    return torch.cat(parts)


def write_logits(path: Path, logits: Tensor) -> None:
    """One safetensors file with the tensor `logits`."""
    try:
        save_file({"logits": logits}, str(path))
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be written: {error}") from None
