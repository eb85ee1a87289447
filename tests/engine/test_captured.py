"""Steps that a device was given as one have the bits of those that were given op by op.

Skipped but in a process with the pretend device and Triton's interpreter: kernels/test_triton.py.
"""

import gc
import random
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.engine import replay
from overleap.engine.replay import Replays
from overleap.engine.runner import Follow, draft, step
from overleap.kernels import recorder, select
from overleap.kernels.composed import Assembled
from overleap.kernels.mixed import mixed
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Ops
from overleap.model.transformer import Transformer
from tests import pretend
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles import where
from tests.oracles.running import build, held
from tests.pretend.graph import Graph, provide

if where.DEVICE.type != pretend.NAME or where.BACKEND != "triton":
    pytest.skip("not on the pretend device with Triton's interpreter", allow_module_level=True)

PLACES = (0, 118, 1014)  # where texts stand at first: shortly before a page, or many, are full


@pytest.fixture(autouse=True)
def _pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch)
    monkeypatch.setattr(replay, "OFTEN", 1)


def drive(model: Transformer, cache: Cache, seed: int, steps: int = 26) -> Iterator[list[Tensor]]:
    """Logits, the streams and the logits of a draft, of steps of some of three texts, a token or
    two each; now and then one goes back."""
    draw = random.Random(seed)
    texts = [cache.open() for _ in PLACES]
    for text, place in zip(texts, PLACES, strict=True):
        cache.reserve(text, 1200)
        text.length = place  # the rows before are what the cache was filled with
    for _ in range(steps):
        chosen = texts[draw.choice([0, len(texts) // 2, -1, -1]) :]
        count = draw.choice([1, 1, 1, 1, 2])
        if draw.random() < 0.1 and chosen[0].length > chosen[0].oldest + 1:
            cache.rewind(chosen[0], chosen[0].length - 1)
        ids = [[draw.randrange(model.config.vocab_size) for _ in range(count)] for _ in chosen]
        starts = [text.length for text in chosen]
        parts = [(text, own, count) for text, own in zip(chosen, ids, strict=True)]
        output = step(model, cache, parts)
        follows = [
            Follow(text.slot, at, own, True)
            for text, at, own in zip(chosen, starts, ids, strict=True)
        ]
        kept = [output.logits, output.streams.clone()]
        yield [*kept, draft(model, cache, output.streams, follows)]


def filled(model: Transformer, cache_format: CacheFormat, seed: int) -> Cache:
    """A cache as if texts had been read: rows of random values everywhere."""
    cache = Cache(model.config, pages=36, slots=3, format=cache_format, device=where.DEVICE)
    noise, rounded = torch.Generator().manual_seed(seed), select("torch").quantize
    for layer in cache.layers:
        for pool in (layer.ring, layer.entries, layer.keys):
            if pool is not None:
                values = torch.randn(*pool.rows.shape[:-1], pool.format.width, generator=noise)
                pool.rows.copy_(rounded(values, pool.format).to(where.DEVICE))
        for tail in (layer.tail, layer.index_tail):
            if tail is not None:
                tail.copy_(torch.randn(tail.shape, generator=noise).to(where.DEVICE))
    return cache


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def small(seed: int, form: str, ops: Ops | None = None) -> Transformer:
    sizes = {"hidden_size": 64, "hc_mult": 2, "index_n_heads": 2, "index_topk": 8}
    config = tiny_config(seed, form, compress_ratios=(4, 128), **sizes)
    return build(config, random_tensors(config, seed), ops)


def said_and_played(
    model: Transformer, cache_format: CacheFormat, seed: int, steps: int
) -> tuple[list[list[Tensor]], Replays]:
    """What steps left that were played, after comparing with what they leave said one by one: all
    that they yielded and all that is in the cache, bit for bit."""
    said, played = (filled(model, cache_format, seed) for _ in range(2))
    model.watchers.add("the test")
    expected = list(drive(model, said, seed, steps))
    assert not Graph.captured
    model.watchers.clear()
    found = list(drive(model, played, seed, steps))
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert all(a.isfinite().all() for a in one), number
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True)), number
    for a, b in zip(held(said), held(played), strict=True):
        assert torch.equal(bits(a), bits(b))
    return found, replay._REPLAYS[played]


@pytest.mark.parametrize(
    ("form", "cache_format"), [("f32", CacheFormat.WIDE), ("release", CacheFormat.RELEASE)]
)
def test_captured_steps_have_the_bits_of_those_that_are_said(
    form: str, cache_format: CacheFormat, seed: int
) -> None:
    _, records = said_and_played(small(seed, form), cache_format, seed, 26)
    print(f"{Graph.captured} captured, {Graph.replays} played")
    assert records.record is not None and Graph.replays >= 10
    assert len(records.kept) == min(Graph.captured, replay.MOST_GRAPHS)
    assert {key[0] == "draft" for key in records.kept} == {True, False}


def test_what_is_not_told_anew_shows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of the step before, kept in a captured one: these tests are not blind to it."""

    def follow(self: Spans, other: Spans) -> None:
        self.position_T.copy_(other.position_T)

    monkeypatch.setattr(Spans, "follow", follow)
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    with pytest.raises(AssertionError):
        said_and_played(small(seed, "f32"), CacheFormat.WIDE, seed, 14)
    assert Graph.replays > 4


def test_what_waits_for_the_device_is_refused_and_steps_go_on(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ops = where.ops()
    own = ops.rms_norm

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        assert x.abs().max().item() >= 0
        return own(x, weight, eps)

    rms_norm.__module__ = own.__module__
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    model = small(seed, "f32", Assembled(vars(ops) | {"rms_norm": rms_norm}))
    _, records = said_and_played(model, CacheFormat.WIDE, seed, 6)
    assert records.record is None and not records.kept and Graph.captured == 1 and not Graph.replays
    assert "waits for the device, which is capturing" in caplog.text


def test_a_device_without_graphs_goes_on(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And is asked for one once."""
    monkeypatch.setattr(torch.get_device_module(pretend.NAME), "Graph", no_graph)
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    model = small(seed, "f32")
    _, records = said_and_played(model, CacheFormat.WIDE, seed, 4)
    assert records.record is None and "not captured: no graphs here" in caplog.text
    said_and_played(model, CacheFormat.WIDE, seed, 4)
    assert caplog.text.count("not captured") == 1


def no_graph() -> None:
    raise RuntimeError("no graphs here")


def test_a_capture_without_memory_is_tried_no_more(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Graph) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Graph, "__enter__", full)
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    _, records = said_and_played(small(seed, "f32"), CacheFormat.WIDE, seed, 4)
    assert records.large and not records.kept and records.record is not None


def test_captured_steps_end_with_their_cache(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    monkeypatch.setattr(replay, "MOST_GRAPHS", 3)
    model = small(seed, "f32")
    cache = filled(model, CacheFormat.WIDE, seed)
    kept = [len(replay._REPLAYS[cache].kept) for _ in drive(model, cache, seed, 8)]
    assert max(kept) == 3
    there = weakref.ref(cache)
    del cache
    gc.collect()
    assert there() is None


def test_ops_of_the_definition_are_not_captured(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ask the device for numbers; experts on the host are computed by the host."""
    monkeypatch.setattr("tests.engine.test_captured.PLACES", (118,))
    model = small(seed, "f32", select("torch", pretend.NAME))
    _, records = said_and_played(model, CacheFormat.WIDE, seed, 6)
    assert records.record is None and not Graph.captured
    assert recorder(where.ops(), where.DEVICE) is not None
    assert recorder(mixed(where.ops(), select()), where.DEVICE) is None

    def page_write(*given: object) -> None:
        """Of another package."""

    theirs = Assembled(vars(where.ops()) | {"page_write": page_write})
    assert recorder(theirs, where.DEVICE) is None
