"""Answers held against the same answers from scratch: sound ones pass, damaged state is named."""

import random
from dataclasses import replace

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.engine.engine import Engine
from overleap.engine.request import Completion, Request, Sampling, Token
from overleap.engine.sampler import Draw
from overleap.engine.verify import LOGIT_ROWS, TIE, Sound, _gap, _open, check, differences
from overleap.errors import BackendError, StateError
from overleap.kernels import select
from overleap.model.transformer import Transformer
from tests.checkpoints import random_tensors, tiny_config


def make_model(seed: int, backend: str = "auto") -> Transformer:
    config = tiny_config(seed)
    model = Transformer(config, select(backend))
    model.assign(random_tensors(config, seed))
    return model


@pytest.mark.parametrize("form", CacheFormat)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sound_answers_pass(form: CacheFormat, temperature: float, seed: int) -> None:
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, slots=2, format=form, chunk_tokens=97)
    shared = [draw.randrange(2, model.config.vocab_size) for _ in range(300)]
    for tail in (1, 70, 200):
        prompt = shared + [draw.randrange(2, model.config.vocab_size) for _ in range(tail)]
        sampling = Sampling(temperature=temperature, max_tokens=9)
        request = Request(prompt=prompt, sampling=sampling)
        check(model, request, engine.generate(request), format=form)
    assert engine.stats().hit_tokens >= 256


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_token_is_named(temperature: float, seed: int) -> None:
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, format=CacheFormat.WIDE)
    prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(40)]
    sampling = Sampling(temperature=temperature, max_tokens=6, stop_ids=())
    request = Request(prompt=prompt, sampling=sampling)
    answer = engine.generate(request)
    worst = (answer.ids[3] + 1) % model.config.vocab_size
    changed = list(answer.tokens)
    changed[3] = Token(worst)
    forged = Completion(tuple(changed), answer.finish)
    found = differences(model, request, forged, format=CacheFormat.WIDE)
    assert found[0].index == 3
    assert (found[0].token, found[0].expected) == (worst, answer.ids[3])


def test_a_damaged_prefix_is_caught(seed: int) -> None:
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, format=CacheFormat.WIDE)
    prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(400)]
    sampling = Sampling(temperature=0, max_tokens=12, stop_ids=())
    engine.generate(Request(prompt=prompt, sampling=sampling))
    generator = torch.Generator().manual_seed(seed)
    pool = engine._cache.pool
    for rows in [p.rows for p in (*pool.entries, *pool.keys) if p is not None]:
        rows.copy_(5 * torch.randn(rows.shape, generator=generator))
    request = Request(prompt=prompt, sampling=sampling)
    damaged = engine.generate(request)
    assert damaged.finish.usage.cached_tokens >= 256
    with pytest.raises(StateError, match="from scratch it is"):
        check(model, request, damaged, format=CacheFormat.WIDE)


def test_a_stop_token_is_checked_too(seed: int) -> None:
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, format=CacheFormat.WIDE)
    prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(40)]
    free = Sampling(temperature=0, max_tokens=3, stop_ids=())
    first = engine.generate(Request(prompt=prompt, sampling=free)).ids[0]
    request = Request(prompt=prompt, sampling=replace(free, stop_ids=(first,)))
    answer = engine.generate(request)
    assert (answer.ids, answer.finish.stop_id) == ([], first)
    assert differences(model, request, answer, format=CacheFormat.WIDE) == []
    lying = Completion((), replace(answer.finish, stop_id=first - 1))
    assert differences(model, request, lying, format=CacheFormat.WIDE)[0].expected == first


def test_a_long_answer_is_compared_to_its_end(seed: int) -> None:
    """In chunks of any size, with more tokens than logits are held for at a time."""
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, format=CacheFormat.WIDE)
    prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(draw.randrange(1, 300))]
    sampling = Sampling(temperature=0, max_tokens=2 * LOGIT_ROWS + 3, stop_ids=())
    request = Request(prompt=prompt, sampling=sampling)
    answer = engine.generate(request)
    for chunk in (1, 64, 512):
        seen: list[tuple[int, int]] = []
        sound = check(
            model,
            request,
            answer,
            format=CacheFormat.WIDE,
            chunk_tokens=chunk,
            progress=lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]
        )
        assert sound.tokens == 2 * LOGIT_ROWS + 3
        total = len(prompt) + sound.tokens - 1
        assert seen[-1] == (total, total) and seen == sorted(set(seen))
    last = list(answer.tokens)
    last[-1] = Token((last[-1].id + 1) % model.config.vocab_size)
    forged = Completion(tuple(last), answer.finish)
    found = differences(model, request, forged, format=CacheFormat.WIDE)
    assert [difference.index for difference in found][-1] == sampling.max_tokens - 1


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_even_choice_is_counted_where_one_can_be(
    backend: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where native kernels serve: there no choice comes out otherwise."""
    try:
        model = make_model(seed, backend)
    except BackendError as error:
        pytest.skip(str(error))
    engine = Engine(model, pages=16, format=CacheFormat.WIDE)
    request = Request(prompt=[5, 6], sampling=Sampling(temperature=0, max_tokens=1, stop_ids=()))
    answer = engine.generate(request)
    other = Token((answer.ids[0] + 1) % model.config.vocab_size)
    forged = Completion((other,), answer.finish)
    assert check(model, request, answer, format=CacheFormat.WIDE) == Sound(1, 0)
    monkeypatch.setitem(TIE, CacheFormat.WIDE, float("inf"))
    if backend == "torch":
        assert check(model, request, forged, format=CacheFormat.WIDE) == Sound(1, 1)
        return
    with pytest.raises(StateError, match="token 0 of the answer"):
        check(model, request, forged, format=CacheFormat.WIDE)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_grammar_forbids_is_no_better_choice(temperature: float) -> None:
    """Two allowed tokens nearly tied; a forbidden one far above them says nothing."""
    logits = torch.tensor([9.0, 1.0, 0.999, 8.0])
    allowed = bytes([0b0110])
    draw = Draw(Sampling(temperature=temperature, seed=1), 1, 0, [])
    near = _gap(_open(logits, allowed), draw, 2)
    assert near == pytest.approx(0.001, abs=1e-4) if temperature == 0 else near <= 0.5
    assert _gap(_open(logits, None), draw, 2) > 2 * near
    assert _open(logits, allowed)[1:3].equal(logits[1:3])
