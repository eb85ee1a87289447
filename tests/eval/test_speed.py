"""The figures are what the clock said, and the work is what the depths say."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from overleap import machine
from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache, Sequence
from overleap.checkpoint import save
from overleap.engine.budget import budget
from overleap.errors import CapacityError, RequestError
from overleap.eval import speed as module
from overleap.eval.random_model import random_model, small_config
from overleap.eval.speed import Memory, Speed, ladder, open_model, rows_of, speed
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
    found = list(speed(model, [1000, 300, 300], decode_tokens=7, chunk_tokens=128))
    assert [row.depth_tokens for row in found] == [300, 1000]
    for row, interval in zip([one.row() for one in found], (300, 700), strict=True):
        assert row["prefill_s"] == pytest.approx(PREFILL_S * row["depth_tokens"])
        assert row["prefill_tokens_per_s"] == pytest.approx(1 / PREFILL_S)
        assert row["interval_tokens"] == interval
        assert row["interval_tokens_per_s"] == pytest.approx(1 / PREFILL_S)
        assert row["decode_tokens_per_s"] == pytest.approx(1 / DECODE_S)
        assert row["decode_slowest_s"] == pytest.approx(2 * DECODE_S)
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
        found = list(
            speed(
                model,
                [1, 129],
                decode_tokens=2,
                chunk_tokens=63,
                format=cache,
                progress=lambda done, total, seen=progress: seen.append((done, total)),
            )
        )
        assert progress == [(1, 129), (64, 129), (127, 129), (129, 129)]
        for row in found:
            assert min(row.decode_steps_s) > 0 and 0 < row.interval_s <= row.prefill_s
            assert row.memory.cache_bytes == held_bytes(
                Cache(config, pages=2, slots=1, format=cache), row
            )


def held_bytes(cache: Cache, row: module.Speed) -> int:
    """Counted from the tensors: pages of the depth, and one slot."""
    pages = -(-row.depth_tokens // 128)
    pooled = cache.pool.nbytes
    return pooled // 2 * pages + sum(rows.nbytes for rows in every_tensor(cache)) - pooled


def test_a_rate_that_falls_shows_in_the_interval() -> None:
    memory = Memory(5, 10, 100, 150, 120)
    row = Speed(4096, 8.0, 3072, 6.0, (0.5, 0.1, 0.2), memory).row()
    assert (row["prefill_tokens_per_s"], row["interval_tokens_per_s"]) == (512, 512)
    row = Speed(4096, 8.0, 3072, 7.5, (0.5, 0.1, 0.2), memory).row()
    assert (row["prefill_tokens_per_s"], row["interval_tokens_per_s"]) == (512, 409.6)
    assert (row["decode_tokens_per_s"], row["decode_slowest_s"]) == (5, 0.5)
    assert (row["scratch_bytes"], row["peak_off_percent"]) == (40, pytest.approx(25))
    unknown = replace(memory, peak_bytes=None)
    assert unknown.scratch_bytes is unknown.peak_off_percent is None
    assert replace(memory, base_bytes=0).scratch_bytes is None


def test_backends_are_compared_with_the_first() -> None:
    memory = Memory(5, 10, 100, 150, 120)
    slow = [Speed(4, 4.0, 4, 4.0, (1.0,), memory), Speed(8, 9.0, 4, 5.0, (2.0, 8.0, 3.0), memory)]
    fast = [Speed(4, 2.0, 4, 2.0, (1.0,), memory), Speed(8, 3.0, 4, 1.0, (0.5,), memory)]
    rows = rows_of({"torch": slow, "cpu": fast})
    assert [row["backend"] for row in rows] == ["torch", "torch", "cpu", "cpu"]
    assert [row.get("prefill_ratio") for row in rows] == [None, None, 2, 3]
    assert [row.get("interval_ratio") for row in rows] == [None, None, 2, 5]
    assert [row.get("decode_ratio") for row in rows] == [None, None, 1, 6]


def test_a_backend_that_was_stopped_has_fewer_rows() -> None:
    memory = Memory(5, 10, 100, 150, 120)
    both = [Speed(4, 4.0, 4, 4.0, (1.0,), memory), Speed(8, 9.0, 4, 5.0, (2.0,), memory)]
    rows = rows_of({"torch": both, "cpu": both[:1]})
    assert [(row["backend"], row["depth_tokens"]) for row in rows] == [
        ("torch", 4), ("torch", 8), ("cpu", 4),
    ]  # fmt: skip


def test_usual_depths_end_where_asked() -> None:
    assert ladder(1048576) == list(module.DEPTHS)
    assert ladder(131072) == [1024, 4096, 16384, 65536, 131072]
    assert ladder(5000) == [1024, 4096, 5000]
    assert ladder(7) == [7]


def test_without_depths_those_the_model_has(clock: list[tuple[int, int]], seed: int) -> None:
    model = random_model(tiny_config(seed))  # 4,096 positions
    assert [row.depth_tokens for row in speed(model, chunk_tokens=1024)] == [1024, 4096]


def test_at_the_last_position_the_fork_is_taken_earlier(
    clock: list[tuple[int, int]], seed: int
) -> None:
    model = random_model(tiny_config(seed))  # 4,096 positions
    [row] = speed(model, [4096], decode_tokens=5, chunk_tokens=4000)
    read, written = [(0, 4000), (4000, 91)], [(4091 + i, 1) for i in range(5)]
    assert clock[1:] == [*read, *written, (4091, 5)]
    assert row.prefill_s == pytest.approx(PREFILL_S * 4096)


def test_memory_is_that_of_a_run_to_this_depth(
    clock: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(module.machine, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(machine, "recent_peak_bytes", lambda: 10**9)
    config = tiny_config(seed)
    for row in speed(random_model(config), [129, 1000], decode_tokens=3, chunk_tokens=77):
        fits = budget(config, row.depth_tokens + 3, CacheFormat.RELEASE, resident_bytes=1000)
        assert row.memory.allocated_bytes == fits.cache_bytes
        scratch = layout.scratch_bytes(config, 77)
        assert row.memory.predicted_peak_bytes == 1000 + fits.cache_bytes + scratch
        assert row.memory.scratch_bytes == 10**9 - 1000 - fits.cache_bytes


def test_what_does_not_fit_is_refused_before_the_first_token(
    clock: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    config = tiny_config(seed)
    model = random_model(config)
    needed = budget(config, 4000 + 16, CacheFormat.RELEASE, resident_bytes=0, memory_bytes=2**40)
    exactly = needed.cache_bytes + layout.scratch_bytes(config, 512)
    beside = budget(config, 1000 + 16, CacheFormat.RELEASE, resident_bytes=0, memory_bytes=2**40)
    monkeypatch.setattr(module.machine, "resident_bytes", lambda: 10**9)

    def read(free: int, *depths: int) -> None:
        monkeypatch.setattr(module.devices, "free_bytes", lambda device: free)
        list(speed(model, depths))

    read(exactly, 4000)
    read(exactly + beside.cache_bytes, 1000, 4000)
    clock.clear()
    for free, depths in ((exactly - 1, [4000]), (exactly + beside.cache_bytes - 1, [1000, 4000])):
        with pytest.raises(CapacityError, match=r"a context of 4016 tokens needs .* may be used"):
            read(free, *depths)
    assert clock == []


def test_a_text_moves_with_all_that_is_remembered(seed: int) -> None:
    config = tiny_config(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (300,), generator=generator)
    reading = module._Reading(random_model(config), ids, 77, CacheFormat.RELEASE, None)
    reading.make_room(200)
    reading.read(200)
    old, text = reading.cache, reading.text
    for rows in every_tensor(old):
        rows.view(torch.uint8).random_(generator=generator)  # also what no step has written
    reading.make_room(300)
    new, moved = reading.cache, reading.text
    assert (moved.length, moved.oldest) == (200, text.oldest)
    paged = len([pool for pool in (*old.pool.entries, *old.pool.keys) if pool])
    assert paged >= 3
    for number, (before, after) in enumerate(
        zip(every_tensor(old), every_tensor(new), strict=True)
    ):
        is_paged = number < paged
        a = before[text.pages if is_paged else text.slot].contiguous()
        b = after[moved.pages if is_paged else moved.slot].contiguous()
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), number


def every_tensor(cache: Cache) -> list[torch.Tensor]:
    """Page pools first, then what every slot owns."""
    pools = [pool.rows for pool in (*cache.pool.entries, *cache.pool.keys) if pool]
    owned = [
        rows
        for layer in cache.layers
        for rows in (layer.ring.rows, layer.tail, layer.index_tail)
        if rows is not None
    ]
    return pools + owned


def test_a_moved_text_is_read_on(seed: int) -> None:
    config = tiny_config(seed)
    model = random_model(config, seed)
    logits: list[torch.Tensor] = []
    for rooms in ([77, 154, 231], [231]):
        ids = torch.arange(231) % config.vocab_size
        reading = module._Reading(model, ids, 77, CacheFormat.WIDE, None)
        for room in rooms:
            reading.make_room(room + 1)
            reading.read(room)
        logits.append(module._step(model, reading.cache, reading.text, [1])[1])
    torch.testing.assert_close(*logits)


def test_a_peak_can_be_forgotten() -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system keeps the peak of a process")
    taken = torch.ones(256 * 2**20, dtype=torch.uint8)
    del taken
    high = machine.recent_peak_bytes()
    machine.forget_peak()
    after = machine.recent_peak_bytes()
    assert high is not None and after is not None
    assert after < high - 128 * 2**20


def test_the_peak_is_that_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    status = tmp_path / "self" / "status"
    status.write_text("Name:\tx\nVmHWM:\t     512 kB\nVmRSS:\t   500 kB\n", "ascii")
    assert machine.recent_peak_bytes(tmp_path) == 512 * 1024
    for text in ("Name:\tx\n", None):
        status.unlink() if text is None else status.write_text(text, "ascii")
        assert machine.recent_peak_bytes(tmp_path) == machine.peak_resident_bytes()


@pytest.mark.parametrize("depths", [[], [0], [4097], [5000, 1], [4090, 4096]])
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
