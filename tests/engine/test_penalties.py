"""Penalties through the engine: of the answer alone, also where tokens are proposed and checked."""

import random

import pytest
import torch

from overleap.engine.engine import Engine
from overleap.engine.request import Request, Sampling
from overleap.engine.verify import check
from tests.engine.fake import VOCABULARY, FakeModel, next_logits
from tests.engine.test_verify import make_model

COUNT = 30


def by_definition(prompt: list[int], frequency: float, presence: float) -> list[int]:
    said: list[int] = []
    for _ in range(COUNT):
        logits = next_logits([*prompt, *said])
        for token in set(said):
            logits[token] -= presence + frequency * said.count(token)
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("speculate", ["off", "on"])
def test_what_was_said_is_less_likely(speculate: str, seed: int) -> None:
    draw = random.Random(seed)
    model = FakeModel()
    if speculate == "on":
        model.config = make_config()
    engine = Engine(model, pages=64, slots=4, speculate=speculate)  # type: ignore[arg-type]
    for frequency, presence in ((2.0, 0.0), (0.0, 2.0), (-0.5, 1.0), (0.3, -2.0)):
        prompt = [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(1, 200))]
        sampling = Sampling(
            temperature=0, max_tokens=COUNT, stop_ids=(), frequency_penalty=frequency,
            presence_penalty=presence,
        )  # fmt: skip
        answer = engine.generate(Request(prompt=prompt, sampling=sampling))
        assert answer.ids == by_definition(prompt, frequency, presence)


def make_config():  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from tests.engine.fake import CONFIG

    return replace(CONFIG, num_nextn_predict_layers=1)


def test_such_an_answer_is_sound_when_computed_again(seed: int) -> None:
    model, draw = make_model(seed), random.Random(seed)
    engine = Engine(model, pages=16, slots=2)
    prompt = [draw.randrange(2, model.config.vocab_size) for _ in range(150)]
    for temperature in (0.0, 1.0):
        sampling = Sampling(
            temperature=temperature, max_tokens=20, stop_ids=(), frequency_penalty=1.5,
            logit_bias=((prompt[0], 3.0),),
        )  # fmt: skip
        request = Request(prompt=prompt, sampling=sampling)
        answer = engine.generate(request)
        check(model, request, answer)
        plain = Request(prompt=prompt, sampling=Sampling(temperature=0, max_tokens=20, stop_ids=()))
        if temperature == 0:
            assert engine.generate(plain).ids != answer.ids or len(set(answer.ids)) == 20


def test_bias_reaches_the_answer() -> None:
    engine = Engine(FakeModel(), pages=8)  # type: ignore[arg-type]
    sampling = Sampling(temperature=1.0, max_tokens=9, stop_ids=(), logit_bias=((7, 100.0),))
    assert engine.generate(Request(prompt=[3], sampling=sampling)).ids == [7] * 9
    assert torch.equal(next_logits([3]), next_logits([3]))
