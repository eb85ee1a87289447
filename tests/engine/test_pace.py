"""The pace of prompts beside answers, against machines whose times are known."""

import random
import statistics

import pytest

from overleap.engine.pace import EVERY, LEAST, STRETCH, Pace


def drive(pace: Pace, times: tuple[float, float, float], count: int, seed: int) -> list[int]:
    """Tokens beside answers in each step of a machine that takes alone + fixed + tokens * each."""
    alone_s, fixed_s, each_s = times
    noise, took = random.Random(seed), []
    for _ in range(count):
        tokens = pace.beside()
        took.append(tokens)
        seconds = alone_s + (fixed_s + tokens * each_s if tokens else 0)
        pace.measure(8, tokens, seconds * noise.uniform(0.95, 1.05))
    return took


@pytest.mark.parametrize("times", [(0.02, 0.0, 0.0003), (0.1, 0.02, 0.0001), (0.005, 0.004, 5e-5)])
def test_answers_are_slowed_by_so_much_and_no_more(
    times: tuple[float, float, float], seed: int
) -> None:
    alone_s, fixed_s, each_s = times
    took = drive(Pace(), times, 1200, seed)[400:]
    gaps = [alone_s + (fixed_s + tokens * each_s if tokens else 0) for tokens in took]
    assert statistics.mean(gaps) == pytest.approx(STRETCH * alone_s, rel=0.08)
    assert statistics.median(gaps) == alone_s, "most steps are of answers alone"
    assert min(tokens for tokens in took if tokens) >= LEAST


def test_prompts_move_in_one_step_of_so_many(seed: int) -> None:
    took = drive(Pace(), (0.02, 0.0, 0.0003), 400, seed)
    chunks = [index for index, tokens in enumerate(took) if tokens]
    assert chunks == list(range(EVERY - 1, 400, EVERY))


def test_prompts_move_whatever_short_ones_come_in_every_step() -> None:
    pace, chunks = Pace(), 0
    for _ in range(40 * EVERY):
        tokens = pace.beside()
        chunks += tokens > 0
        pace.measure(3, tokens + 100, 0.05)
    assert chunks == 40


def test_a_slow_machine_still_reads_a_little(seed: int) -> None:
    took = drive(Pace(), (0.001, 0.0, 0.01), 200, seed)
    assert {tokens for tokens in took if tokens} == {LEAST}


def test_it_follows_a_machine_that_changes(seed: int) -> None:
    pace = Pace()
    fast = drive(pace, (0.02, 0.0, 0.0002), 400, seed)[-1]
    # The text has grown, and each token takes four times as long.
    slow = drive(pace, (0.02, 0.0, 0.0008), 400, seed)[-1]
    assert fast / 6 < slow < fast / 3


def test_prompts_alone_are_measured_too() -> None:
    pace = Pace()
    for _ in range(20):
        pace.measure(0, 512, 512 * 0.0003)  # nobody answers
    for _ in range(EVERY - 1):
        assert pace.beside() == 0
        pace.measure(8, 0, 0.02)
    assert pace.beside() == pytest.approx(EVERY * (STRETCH - 1) * 0.02 / 0.0003, abs=1)
