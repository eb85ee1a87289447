"""What may cross the border: ranges, types, and sentences with the numbers for the rest."""

import math
from typing import Any

import pytest

from overleap.engine.request import (
    Completion,
    Finish,
    FinishReason,
    Request,
    Sampling,
    Token,
    Usage,
    check,
)
from overleap.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "temperature is inf"),
        ("temperature", "1", "expected a number"),
        ("temperature", True, "expected a number"),
        ("top_p", 0.0, "top_p is 0.0"),
        ("top_p", 1.01, "top_p is 1.01"),
        ("top_p", math.nan, "top_p is nan"),
        ("top_p", None, "expected a number"),
        ("min_p", -1e-9, "min_p is"),
        ("min_p", 1.5, "min_p is 1.5"),
        ("top_k", 0, "top_k is 0"),
        ("top_k", 2.0, "expected a whole number"),
        ("top_k", True, "expected a whole number"),
        ("seed", 2**63, "64 bits"),
        ("seed", -(2**63) - 1, "64 bits"),
        ("seed", 0.5, "expected a whole number"),
        ("logprobs", -1, "logprobs is -1"),
        ("max_tokens", -1, "max_tokens is -1"),
        ("max_tokens", None, "expected a whole number"),
        ("stop_ids", (3, -1), "stop_ids holds -1 at 1"),
        ("stop_ids", (3, "x"), "stop_ids holds 'x' at 1"),
        ("frequency_penalty", 2.1, "frequency_penalty is 2.1"),
        ("presence_penalty", math.nan, "presence_penalty is nan"),
        ("presence_penalty", "1", "expected a number"),
        ("logit_bias", ((3, 101.0),), "logit_bias of 3 is 101.0"),
        ("logit_bias", ((-3, 1.0),), "logit_bias holds -3 at 0"),
    ],
)
def test_sampling_refuses(field: str, value: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        Sampling(**{field: value})


def test_sampling_takes_the_ends_of_its_ranges() -> None:
    Sampling(temperature=0, top_k=1, top_p=1, min_p=1, seed=-(2**63), logprobs=0, max_tokens=0)
    assert Sampling(stop_ids=[4, 5]).stop_ids == (4, 5)  # type: ignore[arg-type]
    assert Sampling(temperature=0).greedy and not Sampling().greedy


@pytest.mark.parametrize("prompt", [[1, -2], [1, 2.0], [1, True], ["a", 1], [1, None]])
def test_prompts_hold_token_ids(prompt: list[Any]) -> None:
    with pytest.raises(RequestError, match="expected a token id"):
        Request(prompt=prompt)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        Request(prompt=())


def test_requests_are_frozen_copies_with_ids_of_their_own() -> None:
    ids = [5, 6]
    one, two = Request(prompt=ids), Request(prompt=ids)
    ids.append(7)
    assert one.prompt == (5, 6) and one.id != two.id
    assert one.total_tokens == 2 + Sampling().max_tokens


def test_check_knows_the_model() -> None:
    fine = Request(prompt=[0, 9], sampling=Sampling(max_tokens=6, stop_ids=(9,), logprobs=10))
    check(fine, vocab_size=10, context_tokens=8)
    with pytest.raises(RequestError, match="the prompt holds token 9, the vocabulary has 9"):
        check(fine, vocab_size=9, context_tokens=8)
    with pytest.raises(RequestError, match="are 8 positions, the model has 7"):
        check(fine, vocab_size=10, context_tokens=7)
    stop = Request(prompt=[0], sampling=Sampling(stop_ids=(12,)))
    with pytest.raises(RequestError, match="stop_ids holds token 12"):
        check(stop, vocab_size=12, context_tokens=10**6)
    many = Request(prompt=[0], sampling=Sampling(logprobs=11))
    with pytest.raises(RequestError, match="logprobs is 11, the vocabulary has 10"):
        check(many, vocab_size=10, context_tokens=10**6)


def test_a_completion_lists_its_ids() -> None:
    finish = Finish(reason=FinishReason.STOP, usage=Usage(prompt_tokens=1), seed=0, stop_id=1)
    assert Completion((Token(4), Token(2)), finish).ids == [4, 2]
