"""The gate against a simulated machine: what a step costs, how often proposals are right."""

import random
from collections import deque
from dataclasses import dataclass

import pytest

from overleap.engine.gate import MARGIN, ON_EVERY, PAUSE_LIMIT, PAUSE_STEPS, Gate, Load, Step


@dataclass
class Machine:
    """Seconds of a plain step, of a checking one and of proposing; and how often it is right."""

    plain: float = 1.0
    checked: float = 1.1
    draft: float = 0.1
    right: float = 0.6
    noise: float = 0.0
    seconds: float = 0.0
    tokens: int = 0

    def run(self, gate: Gate, steps: int, number: random.Random, requests: int = 1) -> list[Step]:
        """So many steps of answers alone."""
        done = []
        for _ in range(steps):
            step = gate.decide(requests)
            right = 0
            if step is Step.CHECK:
                for _ in range(requests):
                    accepted = int(number.random() < self.right)
                    gate.judge(requests, accepted)
                    right += accepted
            took = self.checked if step is Step.CHECK else self.plain
            # Now and then something else on the machine takes it for a while.
            took *= 1 + self.noise * (number.random() + 20 * (number.random() < 0.03))
            proposing = 0.0 if step is Step.PLAIN else self.draft
            gate.measure(requests, step is Step.CHECK, took, proposing)
            self.seconds += took + proposing
            self.tokens += requests + right
            done.append(step)
        return done


def test_it_stays_on_where_it_pays(seed: int) -> None:
    number, machine, gate = random.Random(seed), Machine(right=0.9, noise=0.2), Gate("auto")
    steps = machine.run(gate, 2000, number)
    assert gate.current.state == "on"
    assert gate.current.gain == pytest.approx(1.9 / 1.2, rel=0.25)
    late = steps[-10 * ON_EVERY :]
    assert late.count(Step.WATCH) == 10 and late.count(Step.CHECK) == 10 * (ON_EVERY - 1)
    plain = Machine(noise=0.2)
    plain.run(Gate("off"), 2000, number)
    assert machine.tokens / machine.seconds > 1.3 * plain.tokens / plain.seconds


def test_it_pauses_where_it_does_not(seed: int) -> None:
    number, machine, gate = random.Random(seed), Machine(right=0.1, checked=1.4), Gate("auto")
    steps = machine.run(gate, 200, number)
    assert gate.current.state == "paused" and steps[-1] is Step.PLAIN
    machine.run(gate, 60_000, number)
    assert machine.tokens / machine.seconds > 0.98, "trying again costs little"


def test_trials_come_back_ever_later(seed: int) -> None:
    number, machine, gate = random.Random(seed), Machine(right=0.0), Gate("auto")
    steps = machine.run(gate, 100_000, number)
    pauses, run = [], 0
    for step in steps:
        if step is Step.PLAIN:
            run += 1
        elif run:
            pauses.append(run)
            run = 0
    limit = [min(PAUSE_STEPS * 2**n, PAUSE_LIMIT) for n in range(len(pauses))]
    assert pauses == limit and limit[-1] == PAUSE_LIMIT


def test_it_follows_the_machine_and_the_text(seed: int) -> None:
    number, machine, gate = random.Random(seed), Machine(right=0.9), Gate("auto")
    machine.run(gate, 300, number)
    assert gate.current.state == "on"
    machine.right = 0.05  # other questions
    machine.run(gate, 300, number)
    assert gate.current.state == "paused"
    machine.right = 0.9
    machine.run(gate, 600, number)
    assert gate.current.state == "on" and gate.current.failed == 0
    machine.checked = 2.5  # a longer context, another neighbour
    machine.run(gate, 8 * ON_EVERY, number)
    assert gate.current.state == "paused"


def test_a_gain_within_the_margin_does_not_switch_on(seed: int) -> None:
    number, machine, gate = random.Random(seed), Machine(right=1.0, checked=1.88), Gate("auto")
    machine.run(gate, 100, number)  # gains 2 / 1.98
    assert gate.current.state == "paused"
    assert 1 < (gate.current.gain or 0) < MARGIN


def test_loads_are_judged_apart(seed: int) -> None:
    number, gate = random.Random(seed), Gate("auto")
    Machine(right=0.9).run(gate, 300, number, 1)
    Machine(right=0.9, checked=2.5).run(gate, 200, number, 6)
    assert gate.load(1).state == "on"
    assert gate.load(5) is gate.load(8) and gate.load(8).state == "paused"
    assert gate.load(4).state == gate.load(9).state == "trial"
    assert gate.load(2) is not gate.load(3)
    assert gate.current is gate.load(6)


def test_steps_that_tell_nothing(seed: int) -> None:
    gate = Gate("auto")
    seen = []
    for _ in range(100):
        seen.append(gate.decide(3))
        gate.measure(3, None, 1.0, 1.0)
    assert gate.current.state == "trial" and gate.current.gain is None
    assert set(seen) == {Step.WATCH, Step.CHECK}, "it does not get stuck in one of them"


@pytest.mark.parametrize("mode, step", [("on", Step.CHECK), ("off", Step.PLAIN)])
def test_modes_that_ask_nobody(mode: str, step: Step, seed: int) -> None:
    gate = Gate(mode)  # type: ignore[arg-type]
    steps = Machine(right=0.0).run(gate, 500, random.Random(seed))
    assert set(steps) == {step}


def test_no_gain_without_measurements() -> None:
    load = Load(costs=deque([1.25] * 6), accepted=deque([1, 0] * 12))
    assert load.gain == 1.5 / 1.25
    for part in (load.costs, load.accepted):
        taken = part.pop()
        assert load.gain is None
        part.append(taken)
