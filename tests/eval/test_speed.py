"""The figures are what the clock said, and the work is what the depths say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache, Sequence
from overleap.checkpoint import save
from overleap.errors import RequestError
from overleap.eval import speed as module
from overleap.eval.random_model import random_model, small_config
from overleap.eval.speed import open_model, speed
from overleap.model.transformer import Transformer
from tests.checkpoints import FORMS, random_tensors, tiny_config

PREFILL_S, DECODE_S = 0.001, 0.05  # of the pretended machine: per token, per step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A model that takes exactly the time above; returns its calls as (position, tokens)."""
    now, calls = [100.0], []

    def run(
        model: Transformer, cache: Cache, parts: list[tuple[Sequence, list[int], bool]]
    ) -> torch.Tensor:
        [(text, ids, _)] = parts
        assert len(text.pages) * 128 >= text.length + len(ids), "pages not reserved"
        calls.append((text.length, len(ids)))
        text.length += len(ids)
        slow = 2 if len(calls) % 3 == 0 else 1  # now and then a step takes twice as long
        now[0] += slow * DECODE_S if len(ids) == 1 else PREFILL_S * len(ids)
        return torch.zeros(1, model.config.vocab_size)

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return calls


def test_figures_are_what_the_clock_said(clock: list[tuple[int, int]]) -> None:
    model = random_model(small_config())
    found = speed(model, [1000, 300, 300], decode_tokens=7, chunk_tokens=128)
    assert [row.depth_tokens for row in found] == [300, 1000]
    for row in found:
        assert row.prefill_s == pytest.approx(PREFILL_S * row.depth_tokens)
        assert row.prefill_tokens_per_s == pytest.approx(1 / PREFILL_S)
        assert row.decode_tokens_per_s == pytest.approx(1 / DECODE_S)
        assert row.decode_slowest_s == pytest.approx(2 * DECODE_S)
    assert clock[0] == (0, module.WARM_UP_TOKENS)
    read_chunks = [call for call in clock[1:] if call[1] > 1]
    assert read_chunks == [
        (start, min(128, end - start))
        for begin, end in ((0, 300), (300, 1000))
        for start in range(begin, end, 128)
    ]
    written = [call for call in clock if call[1] == 1]
    assert written == [(depth + i, 1) for depth in (300, 1000) for i in range(7)]


@pytest.mark.parametrize("form", FORMS)
def test_every_storage_form_and_both_caches_run(form: str, seed: int) -> None:
    config = tiny_config(seed, form)
    model = random_model(config, seed)
    packed = {p.dtype for p in model.parameters()} & {torch.int8, torch.float8_e4m3fn}
    assert bool(packed) == (form in ("release", "base"))
    for cache in CacheFormat:
        progress: list[tuple[int, int]] = []
        found = speed(
            model,
            [1, 129],
            decode_tokens=2,
            chunk_tokens=63,
            format=cache,
            progress=lambda done, total, seen=progress: seen.append((done, total)),
        )
        assert progress == [(1, 129), (64, 129), (127, 129), (129, 129)]
        for row in found:
            assert row.decode_tokens_per_s > 0 and row.prefill_s > 0
            assert row.cache_bytes == held_bytes(Cache(config, pages=2, slots=1, format=cache), row)


def held_bytes(cache: Cache, row: module.Speed) -> int:
    """Counted from the tensors: pages of the depth, and one slot."""
    pages = -(-row.depth_tokens // 128)
    total = cache.pool.nbytes // 2 * pages
    for layer in cache.layers:
        for rows in (layer.ring.rows, layer.tail, layer.index_tail):
            total += 0 if rows is None else rows.nbytes
    return total


@pytest.mark.parametrize("depths", [[], [0], [4090], [5000, 1]])
def test_depths_the_model_cannot_have_are_refused(depths: list[int], seed: int) -> None:
    model = random_model(tiny_config(seed))  # 4,096 positions
    with pytest.raises(RequestError, match=r"do not fit into 1\.\.4096"):
        speed(model, depths, decode_tokens=16)


def test_a_checkpoint_is_named_by_its_digest(tmp_path: Path, seed: int) -> None:
    config = tiny_config(seed)
    save(random_tensors(config, seed), config, tmp_path / "model")
    model, name, weights = open_model(str(tmp_path / "model"))
    manifest = json.loads((tmp_path / "model" / "overleap.manifest.json").read_text())
    assert (name, weights) == ("model", manifest["digest"])
    assert model.config == config


def test_same_seed_same_weights(seed: int) -> None:
    def values(number: int) -> list[Any]:
        return [p.float().sum().item() for p in random_model(small_config(), number).parameters()]

    assert values(seed) == values(seed) != values(seed + 1)
