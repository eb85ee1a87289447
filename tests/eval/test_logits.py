"""Logits of every position: what has no position or no room is refused before anything is read."""

import re
from pathlib import Path

import pytest
import torch

from overleap import machine
from overleap.cache.layout import CacheFormat, cache_bytes
from overleap.checkpoint import load
from overleap.errors import CapacityError, RequestError
from overleap.eval.logits import all_logits
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

FORM = CacheFormat.WIDE


def unread(done: int, total: int) -> None:
    pytest.fail(f"{done} of {total} tokens were read")


@pytest.fixture
def model(seed: int, tmp_path: Path) -> Transformer:
    config = tiny_config(seed)
    return load(write_checkpoint(tmp_path, config, random_tensors(config, seed)))


def test_more_tokens_than_positions(model: Transformer) -> None:
    most = model.config.max_position_embeddings
    with pytest.raises(
        RequestError, match=f"{most + 1} token ids are given, the model has {most} positions"
    ):
        all_logits(model, [1] * (most + 1), FORM, 512, unread)


@pytest.mark.parametrize(("tokens", "chunk"), [(300, 77), (129, 512)])
def test_logits_that_do_not_fit(
    model: Transformer, tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them once, those of one step beside them, and the cache."""
    rows = 4 * model.config.vocab_size * (tokens + min(chunk, tokens))
    needed = rows + cache_bytes(model.config, tokens, FORM).total
    monkeypatch.setattr(machine, "free_bytes", lambda: needed - 1)
    said = rf"the logits of {tokens} tokens need {re.escape(machine.size(needed))} of memory"
    with pytest.raises(CapacityError, match=said) as caught:
        all_logits(model, [1] * tokens, FORM, chunk, unread)
    hint = re.fullmatch(r"(\d+) tokens fit: cut the text", caught.value.hint or "")
    assert hint is not None
    fitting = int(hint[1])
    assert fitting < tokens
    if fitting:
        assert all_logits(model, [1] * fitting, FORM, chunk).shape[0] == fitting
    monkeypatch.setattr(machine, "free_bytes", lambda: needed)
    found = all_logits(model, [1] * tokens, FORM, chunk)
    assert found.shape == (tokens, model.config.vocab_size) and found.dtype == torch.float32
    assert found.isfinite().all()
