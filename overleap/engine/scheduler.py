"""Who runs next: admission in order of arrival, chunks of prompts, one token for each decode.

Not here: tensors, pages themselves, customers. It counts tokens and is told what fits.
Read next: engine.py (the loop that asks), runner.py (what becomes of a plan).

A job is admitted only when pages for its whole prompt and its longest answer can be set aside, so
an admitted job always finishes: nothing is preempted, and nothing fails half-way.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from overleap.cache.layout import PAGE_TOKENS, pages_for
from overleap.errors import CapacityError, ConfigError


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it: counts only.

    done       tokens in the cache
    generated  tokens chosen so far; the last of them is not in the cache yet
    drafted    tokens proposed to follow it, to be checked in the next step
    marks      prompt positions where a chunk must end (a snapshot is wanted there)
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    done: int = 0
    generated: int = 0
    drafted: int = 0
    marks: set[int] = field(default_factory=set)

    @property
    def pages(self) -> int:
        """Pages for the prompt and the longest answer."""
        return pages_for(self.prompt_tokens + self.max_tokens)

    @property
    def reading(self) -> bool:
        """True while part of the prompt is not in the cache."""
        return self.done < self.prompt_tokens


@dataclass(frozen=True)
class Part:
    """Tokens `start .. start + count` of a job, to run in this step.

    logits   choose a token after them
    drafted  the last of them that are proposals: the token after each decides on the next
    """

    job: Job
    start: int
    count: int
    logits: bool
    drafted: int = 0

    @property
    def rows(self) -> int:
        """Logits wanted: after the last certain token and after every proposal."""
        return self.logits + self.drafted


class Place(Enum):
    """What becomes of a waiting job that is offered a place."""

    TAKEN = "taken"  # it has its slot and its pages
    FULL = "full"  # no room: it and all behind it wait
    LATER = "later"  # it is better off waiting; those behind it may pass
    DROPPED = "dropped"  # it failed and has been removed


class Scheduler:
    """Which tokens of which jobs go into the next step.

    pages         pages of the cache: a job that needs more is refused at submission
    slots         jobs that run at once
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

    def admit(self, offer: Callable[[Job], Place]) -> None:
        """Offer places to the waiting jobs, first come first served.

        `offer` sets the pages of a job aside and, where a prefix of it was found, moves
        `job.done`. It is not called when all slots are taken.
        """
        for job in list(self.waiting):
            if len(self.running) == self.slots:
                return
            place = offer(job)
            if place is Place.FULL:
                return
            if place is Place.TAKEN:
                self.waiting.remove(job)
                self.running.append(job)

    def plan(self) -> list[Part]:
        """The next step: a token for every decode, then chunks of prompts, shared evenly.

        An even share lets a short prompt pass a long one: what the short ones leave over goes
        to the long ones. Running jobs never outnumber the budget, so each gets a token at
        least. A chunk ends at the next mark at the latest. Proposals take what is left when
        each has its token, before the chunks do. Empty: nothing runs.
        """
        parts = []
        spare = self.chunk_tokens - len(self.running)
        for job in self.running:
            if not job.reading:
                drafted = min(job.drafted, spare)
                parts.append(Part(job, job.done, 1 + drafted, True, drafted))
                spare -= drafted
        budget = self.chunk_tokens - sum(part.count for part in parts)
        readers = [job for job in self.running if job.reading]
        readers.sort(key=lambda job: job.prompt_tokens - job.done)
        for index, job in enumerate(readers):
            share = -(-budget // (len(readers) - index))
            end = min(job.prompt_tokens, job.done + share)
            end = min([end, *(mark for mark in job.marks if job.done < mark)])
            parts.append(Part(job, job.done, end - job.done, end == job.prompt_tokens))
            budget -= end - job.done
        return parts

    def commit(self, part: Part, refused: int = 0) -> None:
        """The part ran: its tokens are in the cache, but for the last `refused` proposals."""
        assert part.start == part.job.done and 0 <= refused <= part.drafted
        part.job.done += part.count - refused

    def remove(self, job: Job) -> None:
        """Forget a job, waiting or running: it is finished or aborted."""
        if job in self.running:
            self.running.remove(job)
        else:
            self.waiting.remove(job)
