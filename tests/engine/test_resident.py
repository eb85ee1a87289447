"""Experts that come and go leave the bits as they are, within a bound, and say what it took."""

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from overleap.cache.state import Cache
from overleap.checkpoint import Checkpoint, Placed, build, pages, placed
from overleap.config import ModelConfig
from overleap.engine import runner
from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.engine.resident import Resident
from overleap.errors import CapacityError
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

FORMS = ["release", "base", "bf16"]


def checkpoint(folder: Path, seed: int, form: str, **changes: object) -> Checkpoint:
    fields: dict[str, object] = {
        "hidden_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 16,
        "num_experts_per_tok": 3,
    }  # fmt: skip
    config = tiny_config(seed, form, **(fields | changes))
    return Checkpoint(write_checkpoint(folder / "m", config, random_tensors(config, seed)))


@contextmanager
def bounded(model: Transformer, where: Placed, share: float) -> Iterator[Resident]:
    least, most = where.weights.least_bytes, where.weights.expert_bytes
    resident = Resident(model, where, max(least, int(share * most)))
    try:
        yield resident
    finally:
        resident.close()


def prompt(config: ModelConfig, seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(config.vocab_size) for _ in range(tokens)]


def logits(model: Transformer, ids: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits of every position, read in chunks of these sizes."""
    cache = Cache(model.config, pages=4, slots=1)
    sequence, rows = cache.open(), []
    cache.reserve(sequence, len(ids))
    for size in chunks:
        part, ids = ids[:size], ids[size:]
        rows.append(runner.run(model, cache, [(sequence, part, len(part))]))
    return torch.cat(rows)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits(form: str, share: float, seed: int, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, seed, form)
    model = build(found, dtype=torch.bfloat16)
    ids, chunks = prompt(found.config, seed, 100), [64, 1, 1, 1, 20, 13]
    before = logits(model, ids, chunks)
    where = placed(found, model)
    with bounded(model, where, share) as resident:
        assert logits(model, ids, chunks).equal(before)
        stats = resident.stats()
    assert stats.missed and stats.read_bytes and stats.bounded == (sys.platform == "linux")
    assert 0 < stats.resident_bytes <= stats.bound_bytes < where.weights.expert_bytes
    assert stats.right == stats.ahead <= stats.read_ahead
    assert logits(model, ids, chunks).equal(before), "after it is closed as well"


def mapped(folder: Path, ranges: list[tuple[int, int]]) -> int:
    """Bytes of the model's file that are resident in the ranges (of file offsets)."""
    text, total = Path("/proc/self/smaps").read_text("ascii"), 0
    line = rf"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) .*{re.escape(str(folder))}.*$\n"
    for begin, end, offset, rss in re.findall(rf"{line}(?:.*\n)*?Rss: +(\d+) kB", text, re.M):
        at, size = int(offset, 16), int(end, 16) - int(begin, 16)
        if any(at < stop and start < at + size for start, stop in ranges):
            total += 1024 * int(rss)
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="advice about pages is Linux's")
def test_the_bound_is_held_in_memory(seed: int, tmp_path: Path) -> None:
    """What the system says is resident of the experts, while a model runs."""
    found = checkpoint(tmp_path, seed, "release", hidden_size=256, moe_intermediate_size=256)
    model = build(found, dtype=torch.bfloat16)
    where = placed(found, model)
    every = [e for layer in where.experts for expert in layer for e in expert]
    ranges = [(e.start, e.end) for e in every]
    ids, seen = prompt(found.config, seed, 60), []
    with bounded(model, where, 0.4) as resident:
        watch = model.layers[-1].register_forward_pre_hook(
            lambda *_: seen.append(mapped(found.folder, ranges))
        )
        logits(model, ids, [30] + [1] * 30)
        watch.remove()
        bound = resident.stats().bound_bytes
    assert bound / 3 < max(seen) <= bound
    logits(model, ids, [60])
    assert mapped(found.folder, ranges) > bound, "without it there would be more"


@pytest.mark.parametrize("speculate", ["off", "on"])
def test_the_same_answer_and_the_engine_tells(speculate: str, seed: int, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, seed, "release")
    model = build(found, dtype=torch.bfloat16)
    sampling = Sampling(seed=seed, max_tokens=20, stop_ids=())
    request = Request(prompt=prompt(found.config, seed, 40), sampling=sampling)
    plain = Engine(model, pages=4, slots=1, speculate=speculate)
    wanted = plain.generate(request).ids
    assert plain.stats().experts is None
    with bounded(model, placed(found, model), 0.3) as resident:
        engine = Engine(model, pages=4, slots=1, speculate=speculate, resident=resident)
        assert engine.generate(request).ids == wanted
        told = engine.stats().experts
    layers = found.config.num_hidden_layers
    assert told is not None and told.kept + told.ahead + told.missed >= 21 * layers * 3 - 6 * layers
    assert told.waited_s > 0


def test_hash_layers_are_known_beforehand(seed: int, tmp_path: Path) -> None:
    """What is read ahead for them is always right, and only their experts can be expected so."""
    found = checkpoint(
        tmp_path, seed, "release", compress_ratios=(0, 4, 128, 0), num_hidden_layers=4,
        num_hash_layers=4, num_nextn_predict_layers=0,
    )  # fmt: skip
    model = build(found, dtype=torch.bfloat16)
    with bounded(model, placed(found, model), 0.6) as resident:
        logits(model, prompt(found.config, seed, 50), [1] * 50)
        stats = resident.stats()
    assert stats.read_ahead and stats.right == stats.read_ahead


def test_without_advice_all_of_it_still_runs(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    found = checkpoint(tmp_path, seed, "release")
    model = build(found, dtype=torch.bfloat16)
    ids = prompt(found.config, seed, 30)
    before = logits(model, ids, [20, 10])
    with bounded(model, placed(found, model), 0.3) as resident:
        assert logits(model, ids, [20, 10]).equal(before)
        assert not resident.stats().bounded


def test_less_than_a_token_takes_is_refused(seed: int, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, seed, "release")
    model = build(found, dtype=torch.bfloat16)
    where = placed(found, model)
    with pytest.raises(CapacityError, match="one token of one layer takes"):
        Resident(model, where, where.weights.least_bytes - 1)
