"""Flows share by weight: measured in tokens, over schedulers that run to the end of their work."""

import random

import pytest

from overleap.engine.scheduler import Job, Place, Scheduler


class Served:
    """Runs a scheduler with room for every page, and counts what each flow had."""

    def __init__(self, slots: int, chunk_tokens: int = 256) -> None:
        self.scheduler = Scheduler(pages=100_000, slots=slots, chunk_tokens=chunk_tokens)
        self.tokens: dict[str, int] = {}
        self.first: dict[str, int] = {}  # step in which a job was admitted
        self.steps = self.jobs = 0

    def submit(self, flow: str, count: int, weight: float, prompt: int, answer: int) -> None:
        for _ in range(count):
            self.jobs += 1
            job = Job(f"{flow}-{self.jobs}", prompt, answer, flow, weight)
            self.scheduler.submit(job)

    def step(self) -> None:
        self.scheduler.admit(self._offer)
        for part in self.scheduler.plan():
            job = part.job
            self.scheduler.commit(part)
            job.generated += part.logits
            self.tokens[job.flow] = self.tokens.get(job.flow, 0) + part.count
            if job.generated == job.max_tokens:
                self.scheduler.remove(job)
        self.steps += 1

    def _offer(self, job: Job) -> Place:
        self.first[job.id] = self.steps
        return Place.TAKEN


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_tokens_are_shared_by_weight_while_both_want_more(ratio: int, seed: int) -> None:
    # Of 24 places one is always the light flow's: enough for its share, even where that is a ninth.
    draw, served = random.Random(seed), Served(slots=24)
    for _ in range(400):
        for flow, weight in (("light", 1.0), ("heavy", float(ratio))):
            served.submit(flow, 1, weight, draw.randint(10, 400), draw.randint(5, 40))
    while {job.flow for job in served.scheduler.waiting} == {"light", "heavy"}:
        served.step()
    found = served.tokens["heavy"] / served.tokens["light"]
    print(f"weights 1:{ratio}, tokens 1:{found:.2f}")
    assert found == pytest.approx(ratio, rel=0.15)


def test_a_flood_does_not_keep_another_flow_out() -> None:
    served = Served(slots=4)
    served.submit("flood", 500, 1.0, 200, 50)
    for _ in range(20):
        served.step()
    served.submit("late", 1, 1.0, 50, 5)
    name = next(job.id for job in served.scheduler.waiting if job.flow == "late")
    arrived = served.steps
    served.step()
    assert served.first[name] == arrived, "the last place is kept for a flow that has none"


def test_nobody_saves_up_while_idle() -> None:
    served = Served(slots=2)
    served.submit("busy", 60, 1.0, 100, 20)
    for _ in range(300):
        served.step()
    served.submit("idle", 60, 1.0, 100, 20)
    before = dict(served.tokens)
    for _ in range(400):
        served.step()
    busy, idle = served.tokens["busy"] - before["busy"], served.tokens["idle"]
    assert idle == pytest.approx(busy, rel=0.2), "it had no credit for the time before"


def test_requests_without_a_flow_come_first_come_first_served(seed: int) -> None:
    draw, served = random.Random(seed), Served(slots=3)
    for _ in range(50):
        served.submit("", 1, 1.0, draw.randint(1, 300), draw.randint(1, 20))
    names = [job.id for job in served.scheduler.waiting]
    while served.scheduler.waiting or served.scheduler.running:
        served.step()
    assert list(served.first) == names


def test_a_heavy_prompt_gets_its_share_of_a_step() -> None:
    served = Served(slots=4, chunk_tokens=500)
    served.submit("light", 1, 1.0, 100_000, 1)
    served.submit("heavy", 1, 4.0, 100_000, 1)
    served.step()
    assert served.tokens == {"heavy": 400, "light": 100}
