"""Who runs next: admission in fair shares, chunks of prompts, one token for each decode.

Not here: tensors, pages themselves, customers. It counts tokens and is told what fits.
Read next: engine.py (the loop that asks), runner.py (what becomes of a plan), pace.py (how much of
a prompt goes beside answers).

A job gets the pages of its prompt when it is admitted and those of its answer as it grows, but only
where all that run could still finish one after the other, however long each answer gets
(`all_can_finish`). So one can always go on, and each that ends gives pages back: nothing is
preempted, and nothing fails half-way. An answer whose next page others need is held up meanwhile.

Jobs belong to flows. What a flow has had, divided by its weight, is its clock; the flow whose clock
is behind goes first (start-time fair queueing). A flow that was idle begins at the clock of those
that were not: nobody saves up.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from overleap.cache.layout import PAGE_TOKENS, pages_for
from overleap.errors import CapacityError, ConfigError

SHORT_TOKENS = 256  # left to read: so few pass whatever answers are written, a hiccup at most
SCORED_TOKENS = 64  # of prompts whose every token wants logits, in one step: 32 MiB of 129,280


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it: counts only.

    flow       who it shares with; weight: what its flow is due beside others
    scored     logits are wanted after every token of the prompt
    done       tokens in the cache
    generated  tokens chosen so far; the last of them is not in the cache yet
    drafted    tokens proposed to follow it, to be checked in the next step
    marks      prompt positions where a chunk must end (a snapshot is wanted there)
    held_up    running, and without a page for its next token: it sits the step out
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    flow: str = ""
    weight: float = 1.0
    scored: bool = False
    done: int = 0
    generated: int = 0
    drafted: int = 0
    marks: set[int] = field(default_factory=set)
    held_up: bool = False

    @property
    def pages(self) -> int:
        """Pages for the prompt and the longest answer."""
        return pages_for(self.prompt_tokens + self.max_tokens)

    @property
    def reading(self) -> bool:
        """True while part of the prompt is not in the cache."""
        return self.done < self.prompt_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not in the cache."""
        return max(0, self.prompt_tokens - self.done)


@dataclass(frozen=True)
class Part:
    """Tokens `start .. start + count` of a job, to run in this step.

    logits   choose a token after them
    drafted  the last of them that are proposals: the token after each decides on the next
    scored   logits are wanted after each of them, whether a token is chosen or not
    """

    job: Job
    start: int
    count: int
    logits: bool
    drafted: int = 0
    scored: bool = False

    @property
    def rows(self) -> int:
        """Logits wanted: after the last certain token and after every proposal, or after all."""
        return self.count if self.scored else self.logits + self.drafted


class Place(Enum):
    """What becomes of a waiting job that is offered a place."""

    TAKEN = "taken"  # it has its slot and its pages
    FULL = "full"  # no room: it and all behind it wait
    LATER = "later"  # it is better off waiting; those behind it may pass
    DROPPED = "dropped"  # it failed and has been removed


def all_can_finish(free: int, jobs: Iterable[tuple[int, Sequence[int]]]) -> bool:
    """Whether all can finish, one after the other, where each takes the most it may.

    free  pages that none of them holds; below 0: so many too few
    jobs  how many pages each may still take, and which it holds, some of them with others

    Who may take least goes first: whoever finishes only gives back, so no other order does better.
    """
    jobs = sorted(jobs, key=lambda job: job[0])
    if sum(need for need, _ in jobs) <= free:
        return True
    back, later = list[int](), set[int]()  # pages that are free when one ends: none behind has them
    for _, held in reversed(jobs):
        back.append(len(set(held) - later))
        later.update(held)
    for need, _ in jobs:
        if need > free:
            return False
        free += back.pop()
    return True


class Scheduler:
    """Which tokens of which jobs go into the next step.

    pages         pages of the cache: a job that needs more is refused at submission
    slots         jobs that run at once; the last free one is kept for a flow that has none. Jobs
                  of the flow "" take it all the same: they come from a caller that knows of one
                  flow only, as a server does where requests need no key
    chunk_tokens  tokens of a step at most

    Raises ConfigError for a budget in which not every running job gets a token each step.
    """

    def __init__(self, *, pages: int, slots: int, chunk_tokens: int) -> None:
        if slots < 1 or pages < 1:
            raise ConfigError(f"an engine needs a page and a slot, not {pages} and {slots}")
        if chunk_tokens < slots:
            raise ConfigError(
                f"chunk_tokens is {chunk_tokens}, fewer than the {slots} slots",
                "every running request takes a token of each step",
            )
        self.pages = pages
        self.slots = slots
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self._clocks: dict[str, float] = {}  # of flows that have jobs
        self._now = 0.0  # the clock of the flow that was served last

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. CapacityError when it could never run."""
        if job.pages > self.pages:
            raise CapacityError(
                f"{job.prompt_tokens} prompt tokens and {job.max_tokens} new ones need "
                f"{job.pages} cache pages, the cache has {self.pages}",
                f"{self.pages * PAGE_TOKENS} tokens fit: shorten the prompt, lower max_tokens "
                "or give the cache more memory",
            )
        self.waiting.append(job)
        self._clocks.setdefault(job.flow, self._now)

    def admit(self, offer: Callable[[Job], Place]) -> None:
        """Offer places to the waiting jobs: the flow that is behind first, its jobs in order.

        `offer` sets the pages of a job aside and, where a prefix of it was found, moves
        `job.done`. It is not called when all slots are taken, nor while the job that runs longest
        is held up: those that come later could take what it waits for, again and again.
        """
        passed: set[str] = set()
        if self.running and self.running[0].held_up:
            return
        while len(self.running) < self.slots:
            job = self._next(passed)
            if job is None:
                return
            place = offer(job)
            if place is Place.FULL:
                return
            if place is Place.TAKEN:
                self.waiting.remove(job)
                self.running.append(job)
                # All that it has to read, at once: else a flow that is behind takes every place
                # that is free before the first step tells what that costs.
                self._serve(job, job.unread)
            elif place is Place.LATER:
                passed.add(job.id)

    def _next(self, passed: set[str]) -> Job | None:
        """The waiting job that is due, without those that were passed."""
        held = {job.flow for job in self.running}
        last = self.slots > 1 and len(self.running) == self.slots - 1
        best: Job | None = None
        for job in self.waiting:
            if job.id in passed or (last and job.flow and job.flow in held):
                continue
            # Earlier jobs come first in the queue, so only a flow further behind goes before.
            if best is None or self._clocks[job.flow] < self._clocks[best.flow]:
                best = job
        return best

    def plan(self, beside: int | None = None) -> list[Part]:
        """The next step: a token for every decode, then chunks of prompts, shared by weight.

        beside  tokens of long prompts that may go beside answers at most; None: all of the budget

        Shares let a short prompt pass a long one: what the short ones leave over goes to the
        long ones. Running jobs never outnumber the budget, so each gets a token at least (long
        prompts where there is any of `beside`, and no decode that is held up). A chunk ends at
        the next mark at the latest.
        Proposals take what is left when each has its token, before the chunks do. Empty: nothing
        runs.
        """
        parts = []
        spare = self.chunk_tokens - len(self.running)
        for job in self.running:
            if not job.reading and not job.held_up:
                drafted = min(job.drafted, spare)
                parts.append(Part(job, job.done, 1 + drafted, True, drafted))
                spare -= drafted
        readers = [job for job in self.running if job.reading]
        budget = self.chunk_tokens - sum(part.count for part in parts)
        paced = budget if beside is None or not parts else min(budget, beside)
        readers.sort(key=lambda job: job.unread / job.weight)
        weight = sum(job.weight for job in readers)
        long = sum(job.weight for job in readers if job.unread > SHORT_TOKENS)
        scored = max(1, SCORED_TOKENS // max(1, sum(job.scored for job in readers)))
        least = min(1, paced)
        for index, job in enumerate(readers):
            behind = len(readers) - index - 1  # each of them gets a token at least
            share = max(1, min(math.ceil(budget * job.weight / weight), budget - behind))
            weight -= job.weight
            paces = job.unread > SHORT_TOKENS
            if paces:
                share = min(share, max(least, math.ceil(paced * job.weight / long)))
                long -= job.weight
            if share == 0:
                continue
            end = min(job.prompt_tokens, job.done + share)
            if job.scored:
                end = min(end, job.done + scored)
            end = min([end, *(mark for mark in job.marks if job.done < mark)])
            count, ends = end - job.done, end == job.prompt_tokens and job.max_tokens > 0
            parts.append(Part(job, job.done, count, ends, scored=job.scored))
            budget -= count
            paced -= count * paces
        return parts

    def commit(self, part: Part, refused: int = 0) -> None:
        """The part ran: its tokens are in the cache, but for the last `refused` proposals."""
        assert part.start == part.job.done and 0 <= refused <= part.drafted
        reading = part.job.reading  # booked when it got its place
        part.job.done += part.count - refused
        if not reading:
            self._serve(part.job, part.count)

    def _serve(self, job: Job, tokens: int) -> None:
        self._clocks[job.flow] += tokens / job.weight
        behind = min(self._clocks[other.flow] for other in self.running)
        self._now = max(self._now, behind)

    def remove(self, job: Job) -> None:
        """Forget a job, waiting or running: it is finished or aborted."""
        if job in self.running:
            self._clocks[job.flow] -= job.unread / job.weight
            self.running.remove(job)
        else:
            self.waiting.remove(job)
        if all(other.flow != job.flow for other in (*self.running, *self.waiting)):
            del self._clocks[job.flow]  # what it has had is remembered while it is busy
