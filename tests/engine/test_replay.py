"""Steps played from a record have the bits of those that are said, wherever sequences stand."""

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.engine import replay
from overleap.engine.choices import Choices
from overleap.engine.replay import Replays
from overleap.engine.runner import Follow, draft, run, step
from overleap.kernels import native, select
from overleap.kernels.composed import Assembled
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles.running import poison

needs_native = pytest.mark.skipif(not native(), reason="there is no native code here")


def make(seed: int, form: str = "release", backend: str = "auto") -> Transformer:
    config = tiny_config(seed, form)
    model = Transformer(config, select(backend))
    model.assign(random_tensors(config, seed))
    return model


def made(model: Transformer, cache_format: CacheFormat) -> Cache:
    cache = Cache(model.config, pages=24, slots=4, format=cache_format, device=torch.device("cpu"))
    poison(cache)
    return cache


def of(cache: Cache) -> Replays:
    return replay._REPLAYS[cache]


def drive(model: Transformer, cache: Cache, seed: int, steps: int = 160) -> Iterator[Tensor]:
    """Logits of steps of some of three texts, a token or two each; now and then one goes back."""
    draw = random.Random(seed)
    texts = [cache.open() for _ in range(3)]
    for text in texts:
        cache.reserve(text, 1024)
    for _ in range(steps):
        chosen = texts[: draw.choice([1, 1, 2, 3])]
        if draw.random() < 0.05:
            chosen = texts[-1:]
        if draw.random() < 0.1 and chosen[0].length > chosen[0].oldest + 1:
            cache.rewind(chosen[0], chosen[0].length - 1)
        count = 40 if draw.random() < 0.05 else draw.choice([1, 1, 2])
        ids = [[draw.randrange(model.config.vocab_size) for _ in range(count)] for _ in chosen]
        if max(text.length for text in chosen) + count > 1024:
            return
        wanted = draw.choice([1, count])
        yield run(model, cache, [(t, i, wanted) for t, i in zip(chosen, ids, strict=True)])


@needs_native
@pytest.mark.parametrize("form", ["release", "bf16", "f32"])
@pytest.mark.parametrize("cache_format", CacheFormat)
def test_played_steps_have_the_bits_of_those_that_are_said(
    form: str, cache_format: CacheFormat, seed: int
) -> None:
    model = make(seed, form)
    watched, played = made(model, cache_format), made(model, cache_format)
    model.watchers.add("the test")
    said = list(drive(model, watched, seed))
    assert watched not in replay._REPLAYS
    model.watchers.clear()
    kept = list(drive(model, played, seed))
    assert of(played).kept and of(played).record is not None
    for number, (one, other) in enumerate(zip(said, kept, strict=True)):
        assert torch.equal(one, other), number
    for a, b in zip(watched.layers, played.layers, strict=True):
        assert torch.equal(bits(a.ring.rows), bits(b.ring.rows))


def bits(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8)


@needs_native
def test_results_belong_to_the_caller(seed: int) -> None:
    model = make(seed)
    cache = made(model, CacheFormat.RELEASE)
    found = list(drive(model, cache, seed))
    copies = [one.clone() for one in drive(model, made(model, CacheFormat.RELEASE), seed)]
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))


@needs_native
def test_new_weights_are_used(seed: int) -> None:
    model = make(seed)
    cache = made(model, CacheFormat.RELEASE)
    list(drive(model, cache, seed))
    assert of(cache).kept
    model.assign(random_tensors(model.config, seed + 1))
    other = made(model, CacheFormat.RELEASE)
    model.watchers.add("the test")
    said = list(drive(model, other, seed, 30))
    model.watchers.clear()
    fresh = made(model, CacheFormat.RELEASE)
    replay._REPLAYS[fresh] = of(cache)  # as if these records were of this cache
    assert all(torch.equal(a, b) for a, b in zip(said, drive(model, fresh, seed, 30), strict=True))


def test_what_cannot_be_repeated_is_said_each_time(seed: int) -> None:
    model = make(seed, "f32", "torch")
    cache = made(model, CacheFormat.WIDE)
    list(drive(model, cache, seed))
    assert not of(cache).kept
    assert of(cache).record is None


@needs_native
def test_native_code_of_others_is_not_left_out(seed: int) -> None:
    """A recording does not see it, so a model with any of it is not recorded."""
    model = make(seed)
    own = model.ops.rms_norm

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return own(x, weight, eps)

    other = Transformer(model.config, Assembled(vars(model.ops) | {"rms_norm": rms_norm}))
    other.assign(random_tensors(model.config, seed))
    cache = made(other, CacheFormat.RELEASE)
    list(drive(other, cache, seed, 60))
    assert of(cache).record is None and not of(cache).kept


@pytest.mark.parametrize("backend", ["torch", pytest.param("auto", marks=needs_native)])
def test_who_wants_choices_gets_those_of_the_step(seed: int, backend: str) -> None:
    model = make(seed, backend=backend)
    choices, cache = Choices(model), made(model, CacheFormat.RELEASE)
    text = cache.open()
    cache.reserve(text, 600)
    draw = random.Random(seed)
    for number in range(400):
        wanted = number % 7 == 6
        choices.expect([0] if wanted else [])
        run(model, cache, [(text, [draw.randrange(model.config.vocab_size)], 1)])
        if wanted:
            for one in choices.of(0, text.length):
                most = min(one.visible, model.config.index_topk)
                assert len(one.entries) == most and max(one.entries, default=-1) < one.visible
    assert backend == "torch" or of(cache).kept


@needs_native
def test_records_take_little_memory(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(seed)
    monkeypatch.setattr(replay, "MOST_BYTES", 2**20)
    cache = made(model, CacheFormat.RELEASE)
    held = []
    for _ in drive(model, cache, seed):
        if cache in replay._REPLAYS:  # not before the first small step
            held.append(sum(played.recording.nbytes for played in of(cache).kept.values()))
    assert 0 < max(held) <= 2**20


@needs_native
def test_a_large_step_is_said_and_small_ones_are_still_played(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(seed)
    cache = made(model, CacheFormat.RELEASE)
    list(drive(model, cache, seed))
    sizes = sorted(played.recording.nbytes for played in of(cache).kept.values())
    between = (sizes[0] + sizes[-1]) // 2
    assert sizes[0] < between < sizes[-1]
    monkeypatch.setattr(replay, "MOST_BYTES", replay.LEAST_KEPT * between)
    other, said = made(model, CacheFormat.RELEASE), made(model, CacheFormat.RELEASE)
    found = list(drive(model, other, seed))
    assert of(other).large and of(other).kept and of(other).record is not None
    assert all(played.recording.nbytes <= between for played in of(other).kept.values())
    model.watchers.add("the test")
    for one, want in zip(found, drive(model, said, seed), strict=True):
        assert torch.equal(one, want)


@needs_native
def test_records_end_with_their_cache(seed: int) -> None:
    model = make(seed)
    cache = made(model, CacheFormat.RELEASE)
    list(drive(model, cache, seed))
    there, records = weakref.ref(cache), weakref.ref(of(cache))
    del cache
    gc.collect()
    assert there() is None and records() is None


IMPORTS = """
import sys
from tests.engine.test_replay import CacheFormat, drive, made, make, of
model = make(1)
cache = made(model, CacheFormat.RELEASE)
list(drive(model, cache, 1))
assert of(cache).kept
print("torch._dynamo" in sys.modules)
"""


@needs_native
def test_recording_does_not_import_the_compiler() -> None:
    """torch's own way imports it at the first recorded call: 140 MiB that no one predicted."""
    found = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def drafts(model: Transformer, cache: Cache, seed: int, steps: int = 120) -> Iterator[Tensor]:
    """Logits of the draft block over a token or two of some of two texts after every step."""
    draw = random.Random(seed)
    texts = [cache.open() for _ in range(2)]
    for text in texts:
        cache.reserve(text, 400)
    for _ in range(steps):
        chosen = texts[: draw.choice([1, 2])]
        count = draw.choice([1, 1, 2])
        ids = [[draw.randrange(model.config.vocab_size) for _ in range(count)] for _ in chosen]
        starts = [text.length for text in chosen]
        parts = [(text, own, 1) for text, own in zip(chosen, ids, strict=True)]
        streams = step(model, cache, parts).streams
        follows = [
            Follow(text.slot, start, own, draw.random() < 0.9)
            for text, start, own in zip(chosen, starts, ids, strict=True)
        ]
        yield draft(model, cache, streams, follows)


@needs_native
@pytest.mark.parametrize("form", ["release", "bf16", "f32"])
def test_played_drafts_have_the_bits_of_those_that_are_said(form: str, seed: int) -> None:
    model = make(seed, form)
    watched, played = made(model, CacheFormat.RELEASE), made(model, CacheFormat.RELEASE)
    model.watchers.add("the test")
    said = list(drafts(model, watched, seed))
    model.watchers.clear()
    kept = list(drafts(model, played, seed))
    assert any(key[0] == "draft" for key in of(played).kept)
    for number, (one, other) in enumerate(zip(said, kept, strict=True)):
        assert torch.equal(one, other), number
    ring = model.config.num_hidden_layers
    assert torch.equal(bits(watched.layers[ring].ring.rows), bits(played.layers[ring].ring.rows))
