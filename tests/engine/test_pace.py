"""The pace of prompts beside answers, against machines whose times are known."""

import random
from itertools import pairwise

import pytest

from overleap.engine.pace import LEAST, PROBE, STRETCH, Pace


def drive(pace: Pace, alone_s: float, each_s: float, steps: int, noise: random.Random) -> list[int]:
    """Tokens beside 8 answers in each step, on a machine that takes alone + tokens * each."""
    took = []
    for _ in range(steps):
        tokens = pace.beside()
        took.append(tokens)
        pace.measure(8, tokens, (alone_s + tokens * each_s) * noise.uniform(0.95, 1.05))
    return took


@pytest.mark.parametrize(("alone_s", "each_s"), [(0.02, 0.0003), (0.1, 0.0001), (0.005, 5e-5)])
def test_mixed_steps_are_as_long_as_they_may(alone_s: float, each_s: float, seed: int) -> None:
    took = drive(Pace(), alone_s, each_s, 400, random.Random(seed))[200:]
    mixed = sorted(tokens for tokens in took if tokens)
    middle = mixed[len(mixed) // 2]
    assert middle > LEAST
    assert alone_s + middle * each_s == pytest.approx(STRETCH * alone_s, rel=0.08)


def test_now_and_then_a_step_is_of_answers_alone(seed: int) -> None:
    took = drive(Pace(), 0.02, 0.0003, 500, random.Random(seed))
    alone = [index for index, tokens in enumerate(took) if not tokens]
    assert alone[0] == 0, "first of all it is measured what answers take"
    assert {b - a for a, b in pairwise(alone[1:])} == {PROBE + 1}


def test_a_slow_machine_still_reads_a_little(seed: int) -> None:
    took = drive(Pace(), 0.001, 0.01, 200, random.Random(seed))
    assert {tokens for tokens in took if tokens} == {LEAST}


def test_it_follows_a_machine_that_changes(seed: int) -> None:
    pace, noise = Pace(), random.Random(seed)
    fast = drive(pace, 0.02, 0.0002, 200, noise)[-1] or pace.beside()
    drive(pace, 0.02, 0.0008, 200, noise)  # the text has grown: each token takes four times as long
    slow = pace.beside() or LEAST
    assert fast / 6 < slow < fast / 2


def test_prompts_alone_are_measured_and_not_held_back(seed: int) -> None:
    pace = Pace()
    pace.measure(8, 0, 0.02)
    for _ in range(20):
        pace.measure(0, 512, 512 * 0.0003)  # nobody answers
    assert pace.beside() == pytest.approx((STRETCH - 1) * 0.02 / 0.0003, abs=1)
