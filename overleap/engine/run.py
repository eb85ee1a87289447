"""A request on its way: what the engine keeps about it from step to step.

Not here: what happens in a step (engine.py), counts of tokens (scheduler.py, `Job`).
"""

from dataclasses import dataclass, field

from overleap.cache.prefix import Chain
from overleap.cache.state import Sequence, Snapshot
from overleap.engine.request import Chosen, Handle, Walk
from overleap.engine.scheduler import Job, Part


@dataclass(eq=False)
class Draft:
    """Where the draft block stands in a text.

    tokens  proposed to follow the last id; dropped unless the next step checks them
    origin  position of the token at which its window begins: position 0 of its own
    end     tokens before this position are in its window
    """

    tokens: list[int] = field(default_factory=list)
    origin: int = 0
    end: int = 0


@dataclass(eq=False)
class Run:
    """A request on its way.

    chain  names of its full pages
    turn   the last snapshot, if it is not kept yet
    walk   which tokens may come next, None for all
    """

    handle: Handle
    job: Job
    stop_ids: frozenset[int]
    chain: Chain
    ids: list[int]
    submitted: float
    sequence: Sequence | None = None
    cached: int = 0
    turn: Snapshot | None = None
    started: float | None = None
    first: float | None = None
    last: float | None = None
    machine_s: float = 0.0
    draft: Draft = field(default_factory=Draft)
    walk: Walk | None = None
    chosen: tuple[Chosen, ...] = ()

    def row(self, part: Part) -> tuple[Sequence, list[int], int]:
        """The sequence and the token ids of a part, proposals last, for the runner."""
        assert self.sequence is not None and self.sequence.length == part.start
        ids = self.ids[part.start : part.start + part.count - part.drafted]
        return self.sequence, ids + self.draft.tokens[: part.drafted], part.rows
