"""Native sampling keeps the contract, and a row's token and log-probabilities depend on it alone.

Read next: overleap/kernels/cpu/sampling.py.
"""

import random
import time

import pytest
import torch

from overleap.kernels import select
from overleap.kernels.conformance import conform
from overleap.kernels.spec import Choice
from tests.kernels.native import cuts, isa
from tests.oracles.running import threads

from overleap.kernels.cpu import sampling  # isort: skip (skipped without native)

__all__ = ["isa"]


def test_conforms(isa: str, seed: int) -> None:
    ops = select("cpu")
    assert ops.sample is sampling.sample
    assert [v for v in conform(ops, seed=seed, only=["sample"]) if not v.passed] == []


def drawn_choice(number: random.Random) -> Choice:
    return Choice(
        number.choice([0.0, 0.6, 1.0, 2.0]),
        number.choice([None, 1, 40]),
        number.choice([1.0, 0.9]),
        number.choice([0.0, 0.05]),
        number.random(),
    )


@pytest.mark.parametrize("vocabulary", [127, 1024, 5003])
def test_a_row_alone(vocabulary: int, isa: str, seed: int) -> None:
    number, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(9, vocabulary, generator=generator) * 3
    choices = [drawn_choice(number) for _ in range(9)]
    whole = sampling.sample(logits, choices, None, 4)
    for count in (1, 2):
        with threads(count):
            for rows in cuts(9, number):
                ids, logprob = sampling.sample(logits[rows], choices[rows], None, 4)
                assert torch.equal(ids, whole[0][rows])
                assert logprob.view(torch.int64).equal(whole[1][rows].view(torch.int64))


def test_the_cuts_are_those_of_the_definition(isa: str, seed: int) -> None:
    """A flat row, in which a share of the total holds thousands of tokens, and a steep one."""
    definition, number = select("torch"), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for width in (0.01, 1.0, 30.0):
        logits = torch.randn(1, 20011, generator=generator) * width
        for top_p in (0.01, 0.5, 0.97, 0.9999):
            choice = Choice(1.0, None, top_p, 0.0, number.random())
            want = definition.sample(logits, [choice], None, 3)
            got = sampling.sample(logits, [choice], None, 3)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)


def test_greedy_is_cheap() -> None:
    """One pass over the logits: a few times what torch takes for their sum, not for their sort."""
    logits = torch.randn(1, 129280)

    def shortest(run: object) -> float:
        assert callable(run)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return min(times)

    greedy = shortest(lambda: sampling.sample(logits, [Choice(0.0)], None, None))
    assert greedy < 0.2 * shortest(lambda: logits.sort(descending=True, stable=True))
