"""The scheduler against a ledger: budgets, order of arrival, marks, and that every job ends."""

import random
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.cache.layout import PAGE_TOKENS
from overleap.engine.scheduler import (
    SCORED_TOKENS,
    Job,
    Part,
    Place,
    Scheduler,
    all_can_finish,
)
from overleap.errors import CapacityError, ConfigError


class Ledger:
    """Plays the engine: sets pages aside, runs plans, and checks each of them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.held: dict[str, int] = {}
        self.admitted: list[str] = []
        self.finished: list[str] = []

    @property
    def free(self) -> int:
        return self.scheduler.pages - sum(self.held.values())

    def offer(self, job: Job) -> Place:
        assert len(self.scheduler.running) < self.scheduler.slots
        if job.pages > self.free:
            return Place.FULL
        self.held[job.id] = job.pages
        self.admitted.append(job.id)
        return Place.TAKEN

    def end(self, job: Job) -> None:
        self.scheduler.remove(job)
        self.held.pop(job.id, None)
        self.finished.append(job.id)

    def check(self, parts: list[Part]) -> None:
        running = self.scheduler.running
        assert sum(part.count for part in parts) <= self.scheduler.chunk_tokens
        assert {part.job for part in parts} == set(running) and len(parts) == len(running)
        assert len(running) <= self.scheduler.slots and self.free >= 0
        for part in parts:
            job, end = part.job, part.start + part.count
            assert part.start == job.done and part.count >= 1
            assert not any(part.start < mark < end for mark in job.marks)
            assert end <= job.pages * PAGE_TOKENS
            if part.start < job.prompt_tokens:
                assert end <= job.prompt_tokens and part.logits == (end == job.prompt_tokens)
            else:
                assert part.count == 1 and part.logits and job.generated > 0
        if not any(job.marks for job in running):
            wanted = sum(job.prompt_tokens - job.done if job.reading else 1 for job in running)
            budget = self.scheduler.chunk_tokens
            assert sum(part.count for part in parts) == min(budget, wanted), "nothing is wasted"
        decodes = [part.start >= part.job.prompt_tokens for part in parts]
        assert decodes == sorted(decodes, reverse=True)

    def step(self) -> bool:
        self.scheduler.admit(self.offer)
        parts = self.scheduler.plan()
        self.check(parts)
        for part in parts:
            self.scheduler.commit(part)
            part.job.generated += part.logits
            if part.job.generated == part.job.max_tokens:
                self.end(part.job)
        return bool(parts)


JOBS = st.lists(
    st.tuples(
        st.integers(1, 700),  # prompt
        st.integers(1, 40),  # answer
        st.integers(0, 30),  # step at which it arrives
        st.none() | st.integers(0, 60),  # step at which it is aborted
        st.sets(st.integers(1, 700).map(lambda n: n // 8 * 8), max_size=4),  # marks
    ),
    max_size=12,
)


@given(jobs=JOBS, pages=st.integers(1, 14), slots=st.integers(1, 5), spare=st.integers(0, 300))
def test_every_job_ends_and_no_page_leaks(
    jobs: list[tuple[int, int, int, int | None, set[int]]], pages: int, slots: int, spare: int
) -> None:
    scheduler = Scheduler(pages=pages, slots=slots, chunk_tokens=slots + spare)
    ledger = Ledger(scheduler)
    coming = sorted(enumerate(jobs), key=lambda item: item[1][2])
    accepted: dict[str, Job] = {}
    aborted: set[str] = set()
    step = 0
    while True:
        while coming and coming[0][1][2] <= step:
            number, (prompt, answer, _, _, marks) = coming.pop(0)
            job = Job(str(number), prompt, answer, marks={m for m in marks if 0 < m <= prompt})
            if job.pages > pages:
                with pytest.raises(CapacityError, match=f"the cache has {pages}"):
                    scheduler.submit(job)
            else:
                scheduler.submit(job)
                accepted[job.id] = job
        for number, (*_, abort, _) in enumerate(jobs):
            job = accepted.get(str(number))
            if abort == step and job is not None and job.id not in ledger.finished:
                aborted.add(job.id)
                ledger.end(job)
        if not ledger.step() and not coming:
            break
        step += 1
        assert step < 12 * 740 + 100, "the scheduler stands still"
    assert sorted(ledger.finished) == sorted(accepted)
    assert not scheduler.running and not scheduler.waiting and ledger.free == pages
    arrival = [name for name in accepted if name in ledger.admitted]
    assert ledger.admitted == arrival, "first come, first served"
    for name, job in accepted.items():
        if name not in aborted:
            assert job.generated == job.max_tokens
            assert job.done == job.prompt_tokens + job.max_tokens - 1


def test_a_short_prompt_passes_a_long_one() -> None:
    scheduler = Scheduler(pages=1000, slots=4, chunk_tokens=512)
    ledger = Ledger(scheduler)
    for name, prompt in (("long", 100_000), ("short", 300)):
        scheduler.submit(Job(name, prompt, 1))
    ledger.step()
    assert {job.id: job.done for job in scheduler.running} == {"long": 256, "short": 256}
    ledger.step()
    assert ledger.finished == ["short"]
    assert scheduler.running[0].done == 256 + 512 - 44, "the rest of the share is not wasted"


def test_a_job_that_waits_for_its_good_lets_others_pass() -> None:
    scheduler = Scheduler(pages=10, slots=4, chunk_tokens=64)
    for name in "abc":
        scheduler.submit(Job(name, 10, 1))
    places = {"a": Place.TAKEN, "b": Place.LATER, "c": Place.TAKEN}
    scheduler.admit(lambda job: places[job.id])
    assert [job.id for job in scheduler.running] == ["a", "c"]
    assert [job.id for job in scheduler.waiting] == ["b"]


def test_a_full_cache_stops_the_queue() -> None:
    scheduler = Scheduler(pages=10, slots=4, chunk_tokens=64)
    for name in "abc":
        scheduler.submit(Job(name, 10, 1))
    offered: list[str] = []

    def offer(job: Job) -> Place:
        offered.append(job.id)
        return Place.TAKEN if job.id == "a" else Place.FULL

    scheduler.admit(offer)
    assert offered == ["a", "b"] and len(scheduler.waiting) == 2


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(pages=8, slots=1, chunk_tokens=1)
    scheduler.submit(Job("fits", 1000, 24))
    with pytest.raises(CapacityError) as error:
        scheduler.submit(Job("not", 1000, 25))
    assert "1000 prompt tokens and 25 new ones need 9 cache pages, the cache has 8" in str(
        error.value
    )
    assert "1024 tokens fit" in str(error.value)


@pytest.mark.parametrize(("pages", "slots", "chunk"), [(0, 1, 1), (1, 0, 1), (1, 4, 3)])
def test_budgets_that_cannot_work_are_refused(pages: int, slots: int, chunk: int) -> None:
    with pytest.raises(ConfigError):
        Scheduler(pages=pages, slots=slots, chunk_tokens=chunk)


def paced(weights: dict[str, float], beside: int, steps: int) -> dict[str, int]:
    """Tokens read of 60,000-token prompts, one of each flow, beside an answer that never ends."""
    scheduler = Scheduler(pages=1 << 20, slots=len(weights) + 1, chunk_tokens=512)
    talker = Job("talker", 1, 1 << 20, "talker")
    readers = [Job(flow, 60_000, 1, flow, weight) for flow, weight in weights.items()]
    for job in (talker, *readers):
        scheduler.submit(job)
    scheduler.admit(lambda job: Place.TAKEN)
    for number in range(steps):
        for part in scheduler.plan(None if number == 0 else beside * (number % 4 == 0)):
            part.job.generated += part.logits
            scheduler.commit(part)
        if number == 0:
            begun = {job.id: job.done for job in readers}
    return {job.id: job.done - begun[job.id] for job in readers}


def test_long_prompts_share_what_goes_beside_answers_by_weight() -> None:
    read = paced({"a": 1.0, "b": 1.0, "c": 2.0}, 64, 401)
    assert abs(read["a"] - read["b"]) <= 100 and read["a"] >= 1500, read
    assert read["c"] == pytest.approx(2 * read["a"], rel=0.05)


def test_no_long_prompt_starves_however_many_there_are() -> None:
    read = paced({str(n): 1.0 for n in range(30)}, 16, 401)
    assert min(read.values()) >= 100, read


def test_scored_prompts_share_the_rows_of_a_step() -> None:
    scheduler = Scheduler(pages=100, slots=8, chunk_tokens=512)
    for number in range(8):
        scheduler.submit(Job(str(number), 300, 1, scored=True))
    scheduler.admit(lambda job: Place.TAKEN)
    parts = scheduler.plan()
    assert len(parts) == 8 and sum(part.rows for part in parts) <= SCORED_TOKENS


def finishes(free: int, jobs: list[tuple[int, list[int]]]) -> bool:
    """Whether these jobs can finish in this very order."""
    for place, (need, held) in enumerate(jobs):
        if need > free:
            return False
        free += len(set(held) - {page for _, others in jobs[place + 1 :] for page in others})
    return True


def test_all_can_finish_is_that_some_order_exists(seed: int) -> None:
    draw, told = random.Random(seed), {True: 0, False: 0}
    for _ in range(2000):
        pages = range(draw.randint(1, 9))
        jobs = [
            (draw.randint(0, 5), draw.sample(pages, draw.randint(0, min(4, len(pages)))))
            for _ in range(draw.randint(1, 5))
        ]
        free = draw.randint(-1, 5)
        expected = any(finishes(free, list(order)) for order in permutations(jobs))
        assert all_can_finish(free, jobs) == expected, (free, jobs)
        told[expected] += 1
    assert min(told.values()) > 100


def test_a_decode_that_is_held_up_sits_out_and_nobody_comes_behind_the_oldest() -> None:
    scheduler = Scheduler(pages=10, slots=4, chunk_tokens=64)
    first, second, third = (Job(name, 10, 9) for name in "abc")
    for job in (first, second):
        scheduler.submit(job)
    scheduler.admit(lambda job: Place.TAKEN)
    for part in scheduler.plan():
        part.job.generated += part.logits
        scheduler.commit(part)
    scheduler.submit(third)
    for held_up, admitted in ((first, False), (second, True)):
        held_up.held_up = True
        scheduler.admit(lambda job: Place.TAKEN)
        assert (third in scheduler.running) == admitted
        assert held_up not in [part.job for part in scheduler.plan()]
        held_up.held_up = False
