"""State equivalence through the engine: however a prompt came to be in the cache, one answer.

Models of all layer kinds whose indexer has to choose, for every kernel backend. Torch computes in
`Steady` arithmetic and is held to a tolerance; native code that computes everything itself runs as
it is, on two threads where the answer it is held to took one, and is held to equal bits. What a
sequence remembers: test_state.py. Other processes: engine/test_disk_true_model.py. Read next:
engine/engine.py.
"""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overleap.cache import layout
from overleap.cache.disk import DiskTier
from overleap.cache.layout import PAGE_TOKENS, CacheFormat
from overleap.engine.engine import Engine
from overleap.engine.request import Handle, Progress, Request, Sampling, Token
from overleap.errors import BackendError
from overleap.kernels import backends, select
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles.running import build, distance, poison, threads
from tests.oracles.steady import Steady
from tests.oracles.where import DEVICE, exact

SHORT = (1, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512, 513)
LONG = (4095, 4096, 4097)
STEPS = 16
TOLERANCE = 1e-4  # of the largest log-probability, where bits are not promised


@dataclass(frozen=True)
class Said:
    """An answer: its tokens, the log-probabilities [STEPS, V] they came from, what was cached."""

    ids: list[int]
    logprobs: Tensor
    cached: int


@dataclass
class Case:
    """A model, the answers of reading each prompt alone in one piece, and how equal is equal."""

    model: Transformer
    format: CacheFormat
    tolerance: float
    folder: Path
    number: random.Random
    answers: dict[tuple[int, ...], Said] = field(default_factory=dict)
    far: float = 0.0

    def engine(self, **options: Any) -> Engine:
        """An engine over a poisoned cache."""
        usual = {"pages": 110, "slots": 2, "chunk_tokens": 300, "speculate": "off"}
        made = Engine(self.model, format=self.format, model_digest="11" * 32, **usual | options)
        poison(made._cache)
        return made

    def disk(self) -> DiskTier:
        return DiskTier(self.folder, space_bytes=10**10)

    def text(self, tokens: int) -> list[int]:
        return [self.number.randrange(2, self.model.config.vocab_size) for _ in range(tokens)]

    def request(self, prompt: list[int], **options: Any) -> Request:
        every = self.model.config.vocab_size
        sampling = Sampling(temperature=0, max_tokens=STEPS, stop_ids=(), logprobs=every)
        return Request(prompt=prompt, sampling=sampling, **options)

    def cold(self, prompt: list[int]) -> Said:
        """The answer by an engine that does nothing else, in one chunk, on one thread."""
        if tuple(prompt) not in self.answers:
            engine = self.engine(pages=40, slots=1, chunk_tokens=10_000, snapshot_bytes=0)
            with threads(1):
                self.answers[tuple(prompt)] = said(run(engine, [self.request(prompt)])[0])
        return self.answers[tuple(prompt)]

    def ask(self, engine: Engine, prompts: list[list[int]], **options: Any) -> list[int]:
        """Ask at once, hold every answer against the cold one; how much of each was cached."""
        handles = run(engine, [self.request(prompt, **options) for prompt in prompts])
        for prompt, handle in zip(prompts, handles, strict=True):
            wanted, got = self.cold(prompt), said(handle)
            assert got.ids == wanted.ids, len(prompt)
            off = distance(got.logprobs, wanted.logprobs)
            assert off <= self.tolerance, (len(prompt), off)
            self.far = max(self.far, off)
        return [said(handle).cached for handle in handles]


def run(engine: Engine, requests: list[Request]) -> list[Handle]:
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return handles


def said(handle: Handle) -> Said:
    assert handle.finish is not None and handle.finish.error is None, handle.finish
    tokens = [event for event in handle.events if isinstance(event, Token)]
    rows = [[value for _, value in sorted(token.top_logprobs)] for token in tokens]
    assert len(tokens) == STEPS
    return Said(
        [token.id for token in tokens], torch.tensor(rows), handle.finish.usage.cached_tokens
    )


def whole(tokens: int) -> int:
    """Of so many tokens, those in full pages."""
    return tokens // PAGE_TOKENS * PAGE_TOKENS


@pytest.fixture(params=[(b, f) for b in backends() for f in CacheFormat], ids=lambda p: "-".join(p))
def case(request: pytest.FixtureRequest, seed: int, tmp_path: Path) -> Iterator[Case]:
    backend, cache_format = request.param
    ratios = tuple(random.Random(seed).sample((0, 4, 128), 3))
    config = tiny_config(
        seed,
        compress_ratios=ratios,
        index_topk=8,
        index_n_heads=16,
        vocab_size=130,
        n_routed_experts=4,
        hc_mult=2,
        hc_sinkhorn_iters=3,  # a third of the time otherwise
        max_position_embeddings=8192,
    )
    try:
        ops = select(backend, DEVICE.type)
    except BackendError as error:
        pytest.skip(str(error))
    bits = exact(backend)
    assert bits or backend != "cpu", "the native code lacks an op"
    model = build(config, random_tensors(config, seed), ops)
    arithmetic: AbstractContextManager[object] = nullcontext() if bits else Steady()
    with arithmetic, threads(2 if bits else 1):
        made = Case(
            model,
            cache_format,
            0.0 if bits else TOLERANCE,
            tmp_path / "kept",
            random.Random(seed),
        )
        yield made
        print(f"largest distance {made.far:.1e}")


@pytest.mark.parametrize("lengths", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_every_way_to_an_answer(case: Case, lengths: tuple[int, ...]) -> None:
    """Every length on packed rows, held to equal bits; else some, drawn anew each time."""
    every = case.format is CacheFormat.RELEASE and (case.tolerance == 0 or lengths is LONG)
    count = len(lengths) if every else min(4, len(lengths))
    prompts = [case.text(length) for length in case.number.sample(lengths, count)]
    found_again(case, prompts)
    forked(case, prompts)


def found_again(case: Case, prompts: list[list[int]]) -> None:
    """Batched and in small chunks; known in memory, on disk, and to a new engine and folder."""
    nothing, found = [0 for _ in prompts], [whole(len(prompt) - 1) for prompt in prompts]
    with case.disk() as disk:
        chunk = case.number.randint(60, 400)
        engine = case.engine(slots=5, chunk_tokens=chunk, speculate="on", disk=disk)
        assert case.ask(engine, prompts) == nothing
        assert case.ask(engine, prompts) == found
        engine._prefix.clear()
        poison(engine._cache)
        assert case.ask(engine, prompts) == found
        (checked,) = engine.stats().speculation.checked
        assert checked >= len(prompts), "speculation had no part in it"
    with case.disk() as disk:
        assert case.ask(case.engine(disk=disk), prompts) == found
        assert disk.stats().errors == disk.stats().dropped == 0


def forked(case: Case, prompts: list[list[int]]) -> None:
    """Conversations that go on, and beside each the same one with its answer edited."""
    engine = case.engine(slots=3)
    case.ask(engine, prompts)
    turns = []
    for prompt in prompts:
        answer = case.cold(prompt).ids
        turns.append(prompt + answer + case.text(case.number.randint(1, 150)))
        turns.append(prompt + answer[: STEPS // 2] + case.text(case.number.randint(1, 150)))
    found = case.ask(engine, turns)
    for prompt, on, edited in zip(prompts, found[::2], found[1::2], strict=True):
        assert on == whole(len(prompt) + STEPS - 1), "all but the last token of the answer"
        assert on >= edited >= whole(len(prompt) - 1)


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_under_pressure(case: Case, kept: str) -> None:
    """Room for two conversations and three snapshots, five conversations in turns, two at once.

    Chains are evicted between requests, and while others run on pages that they share.
    """
    snapshot = layout.snapshot_bytes(case.model.config, case.format)
    with case.disk() as disk:
        engine = case.engine(
            pages=11,
            chunk_tokens=case.number.randint(60, 400),
            snapshot_bytes=3 * snapshot,
            disk=disk if kept == "disk" else None,
        )
        start = case.text(200)
        pasts = [start + case.text(case.number.randint(50, 200)) for _ in range(5)]
        evicted = reused = rounds = 0
        while rounds < 4 or not (evicted and reused):
            assert rounds < 100, (evicted, reused)
            one, other = (rounds % 5, (rounds + case.number.randint(1, 4)) % 5)
            held = set(engine._prefix._nodes)
            reused += sum(case.ask(engine, [pasts[one], pasts[other]]))
            evicted += len(held - set(engine._prefix._nodes))
            if len(pasts[one]) < 450:
                pasts[one] = pasts[one] + case.cold(pasts[one]).ids + case.text(20)
            assert engine._prefix.snapshot_bytes <= 3 * snapshot
            rounds += 1
    engine._prefix.clear()
    assert engine.stats().pages_free == 11


def test_an_aborted_prompt_goes_on_where_it_was(case: Case) -> None:
    """What was read before the abort is not read again, up to the last chunk that filled a page."""
    prompt = case.text(900)
    for chunk, steps in ((128, 5), (256, 2), (64, 7), (100, 3)):
        engine = case.engine(chunk_tokens=chunk)
        handle = engine.submit(case.request(prompt))
        for _ in range(steps):
            engine.step()
        engine.abort(handle)
        read = [event.done for event in handle.events if isinstance(event, Progress)]
        assert read[-1] == steps * chunk
        kept = max(done for done in (0, *read) if done % PAGE_TOKENS == 0)
        assert case.ask(engine, [prompt]) == [kept]
        assert case.ask(engine, [prompt]) == [896]
        engine._prefix.clear()
        assert engine.stats().pages_free == engine.stats().pages
