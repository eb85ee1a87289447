"""How much of a prompt goes into a step beside answers, so that answers hardly notice.

A step with answers and prompt tokens takes about `alone + tokens * each` seconds. Both are measured
while it runs, and the prompt gets as many tokens as make the step STRETCH times as long as without.
Not here: which prompt (scheduler.py). Seconds only; the tokens chosen do not depend on it.
"""

STRETCH = 1.45  # clients see a step and its way to them: at most twice the undisturbed time
LEAST = 16  # prompt tokens beside answers, however slow: a prompt always moves on
PROBE = 16  # one step in so many takes answers only, to see what they take now
SMOOTH = 0.2  # weight of a new measurement


class Pace:
    """Measures steps; says how many prompt tokens the next one may take beside answers."""

    def __init__(self) -> None:
        self._alone_s: float | None = None
        self._each_s: float | None = None
        self._mixed = 0

    def beside(self) -> int:
        """Prompt tokens beside answers in the next step; 0 now and then."""
        if self._alone_s is None or self._mixed >= PROBE:
            return 0
        if self._each_s is None:
            return LEAST
        return max(LEAST, int((STRETCH - 1) * self._alone_s / self._each_s))

    def measure(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long, for so many answers and so many tokens of prompts."""
        if not prompt_tokens:
            self._alone_s = _blend(self._alone_s, seconds)
            self._mixed = 0
            return
        beside = self._alone_s or 0.0
        if answers:
            self._mixed += 1
            seconds -= beside
        if seconds > 0 and prompt_tokens >= LEAST:
            self._each_s = _blend(self._each_s, seconds / prompt_tokens)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTH * (new - old)
