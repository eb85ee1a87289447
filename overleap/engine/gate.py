"""Whether proposing tokens pays: measured seconds and acceptance decide, step by step.

Not here: proposing and checking (speculate.py). No tensors and no clock of its own.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median
from typing import Literal

Mode = Literal["auto", "on", "off"]
State = Literal["trial", "on", "paused"]

MARGIN = 1.05  # what it must gain to be switched on; below 1.0 it is switched off
TRIAL_EVERY, ON_EVERY = 4, 24  # one step in so many is plain, to know what a plain one costs
TRIAL_COSTS, TRIAL_CHECKS = 6, 24  # what a verdict takes: steps compared, proposals checked
PAUSE_STEPS, PAUSE_LIMIT = 256, 8192  # until the next trial; doubled each time one fails


class Step(Enum):
    """What a decode step does."""

    PLAIN = "plain"  # no draft block at all
    WATCH = "watch"  # proposes for the step after it, but checks nothing itself
    CHECK = "check"  # checks what was proposed, and proposes


@dataclass(eq=False)
class Load:
    """What is known about steps of about this many requests.

    checked   seconds of the latest checking steps, proposing included, since a plain one
    costs     of the latest plain steps: the checking ones before it, in units of its seconds
    accepted  proposed tokens accepted in each of the latest checks
    steps     since `state` began
    failed    trials in a row that did not pay
    """

    state: State = "trial"
    steps: int = 0
    failed: int = 0
    checked: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    accepted: deque[int] = field(default_factory=lambda: deque(maxlen=128))

    @property
    def gain(self) -> float | None:
        """Tokens a second against plain decoding; None before enough was measured to say."""
        if len(self.costs) < TRIAL_COSTS or len(self.accepted) < TRIAL_CHECKS:
            return None
        return (1 + fmean(self.accepted)) / median(self.costs)

    def enter(self, state: State) -> None:
        """Begin a state; a trial forgets what was measured before."""
        self.state, self.steps = state, 0
        self.checked.clear()
        if state == "trial":
            self.costs.clear()
            self.accepted.clear()


class Gate:
    """Decides for each step. Loads of 1, 2, 3-4, 5-8, ... requests are judged apart.

    A trial mixes plain and checking steps; its verdict holds until the gain falls below 1, or
    for a pause after which it is tried again.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._loads: dict[int, Load] = {}
        self._last = 1

    def load(self, requests: int) -> Load:
        """What is known about steps of so many requests."""
        return self._loads.setdefault((requests - 1).bit_length(), Load())

    @property
    def current(self) -> Load:
        """Of the load that was last asked about."""
        return self.load(self._last)

    def decide(self, requests: int) -> Step:
        """What the next step of so many requests should do."""
        self._last = max(1, requests)
        if self.mode != "auto":
            return Step.CHECK if self.mode == "on" else Step.PLAIN
        load = self.current
        if load.state == "paused":
            return Step.PLAIN
        every = TRIAL_EVERY if load.state == "trial" else ON_EVERY
        return Step.WATCH if load.steps % every == every - 1 else Step.CHECK

    def judge(self, requests: int, accepted: int) -> None:
        """A proposal was checked, and so many of its tokens were accepted."""
        self.load(requests).accepted.append(accepted)

    def measure(self, requests: int, checked: bool | None, step_s: float, draft_s: float) -> None:
        """A step of so many requests took step_s, and proposing for the next one draft_s.

        checked  True where it checked a proposal of every request, False where of none; None
                 for steps that tell nothing: a mixture of both, or prompts beside the answers
        """
        load = self.load(requests)
        load.steps += 1
        if checked is None:
            return
        if checked:
            load.checked.append(step_s + draft_s)
        elif load.checked:
            # Steps are compared with their neighbours, since contexts grow and machines are
            # shared; and medians are taken, so that one disturbed step does not decide.
            load.costs.append(median(load.checked) / step_s)
            load.checked.clear()
        if self.mode == "auto":
            self._switch(load)

    def _switch(self, load: Load) -> None:
        if load.state == "paused":
            if load.steps >= min(PAUSE_STEPS << load.failed - 1, PAUSE_LIMIT):
                load.enter("trial")
            return
        gain = load.gain
        if gain is None or (load.state == "on" and gain >= 1):
            return
        if load.state == "trial" and gain >= MARGIN:
            load.failed = 0
            load.enter("on")
        else:
            load.failed += 1
            load.enter("paused")
