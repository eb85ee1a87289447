"""Log-probabilities of a prompt's tokens: the definition's, in order, whatever the chunks."""

import random

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.engine.engine import Engine
from overleap.engine.request import FinishReason, Request, Sampling, Scores, Token
from tests.engine.fake import VOCABULARY, FakeModel, next_logits


def scores_of(engine: Engine, request: Request) -> list[Token]:
    handle = engine.submit(request)
    found: list[Token] = []
    for event in engine.stream(handle):
        if isinstance(event, Scores):
            found += event.tokens
    assert handle.finish is not None and handle.finish.error is None
    return found


@pytest.mark.parametrize("chunk", [3, 64, 512])
def test_every_token_but_the_first_has_the_model_s_own(chunk: int, seed: int) -> None:
    draw = random.Random(seed)
    engine = Engine(FakeModel(), pages=32, slots=3, chunk_tokens=chunk)  # type: ignore[arg-type]
    for length in (1, 2, 64, 65, 200):
        prompt = [draw.randrange(2, VOCABULARY) for _ in range(length)]
        sampling = Sampling(temperature=1.7, top_k=2, prompt_logprobs=3, max_tokens=1)
        found = scores_of(engine, Request(prompt=prompt, sampling=sampling))
        assert [token.id for token in found] == prompt[1:]
        for place, token in enumerate(found, 1):
            plain = torch.log_softmax(next_logits(prompt[:place]).double(), 0)
            assert token.logprob == pytest.approx(float(plain[prompt[place]]), abs=1e-5)
            assert [i for i, _ in token.top_logprobs] == plain.topk(3).indices.tolist()


@pytest.mark.parametrize("chunk", [3, 64, 512])
def test_a_prompt_is_scored_and_nothing_is_chosen(chunk: int, seed: int) -> None:
    draw = random.Random(seed)
    engine = Engine(FakeModel(), pages=2, slots=1, chunk_tokens=chunk)  # type: ignore[arg-type]
    for length in (1, 63, 64, 65, 256):  # the last of them fills the cache
        prompt = [draw.randrange(2, VOCABULARY) for _ in range(length)]
        for top in (0, None):
            done = engine.generate(
                Request(prompt=prompt, sampling=Sampling(max_tokens=0, prompt_logprobs=top))
            )
            assert done.tokens == () and done.finish.reason is FinishReason.LENGTH
            assert done.finish.usage.generated_tokens == engine.stats().generated_tokens == 0
        found = scores_of(
            engine, Request(prompt=prompt, sampling=Sampling(max_tokens=0, prompt_logprobs=0))
        )
        assert [token.id for token in found] == prompt[1:]


def test_a_known_prompt_is_computed_again_and_the_answer_is_the_same(seed: int) -> None:
    draw = random.Random(seed)
    engine = Engine(
        FakeModel(),
        pages=32,
        slots=2,
        format=CacheFormat.WIDE,  # type: ignore[arg-type]
    )
    prompt = [draw.randrange(2, VOCABULARY) for _ in range(400)]
    plain = Sampling(temperature=0, max_tokens=8, stop_ids=())
    first = engine.generate(Request(prompt=prompt, sampling=plain))
    assert engine.generate(Request(prompt=prompt, sampling=plain)).finish.usage.cached_tokens >= 256
    scored = Sampling(temperature=0, max_tokens=8, stop_ids=(), prompt_logprobs=0)
    again = engine.generate(Request(prompt=prompt, sampling=scored))
    assert again.finish.usage.cached_tokens == 0, "its logits are nowhere but in the model"
    assert again.ids == first.ids
    assert len(scores_of(engine, Request(prompt=prompt, sampling=scored))) == 399


def test_it_runs_beside_others(seed: int) -> None:
    draw = random.Random(seed)
    engine = Engine(FakeModel(), pages=64, slots=4, chunk_tokens=40)  # type: ignore[arg-type]
    others = [
        engine.submit(
            Request(
                prompt=[draw.randrange(2, VOCABULARY) for _ in range(150)],
                sampling=Sampling(temperature=0, max_tokens=30, stop_ids=()),
            )
        )
        for _ in range(2)
    ]
    prompt = [draw.randrange(2, VOCABULARY) for _ in range(130)]
    sampling = Sampling(prompt_logprobs=1, max_tokens=2, stop_ids=())
    found = scores_of(engine, Request(prompt=prompt, sampling=sampling))
    assert [token.id for token in found] == prompt[1:]
    for handle in others:
        ids = [event.id for event in engine.stream(handle) if isinstance(event, Token)]
        assert len(ids) == 30
