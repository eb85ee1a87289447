"""How much of a prompt goes into a step beside answers, so that answers hardly notice.

A step with answers and prompt tokens takes about `alone + tokens * each` seconds, and `each` is the
less the more tokens share what a chunk costs anyway. So prompts move in one step of EVERY, in a
chunk that makes those EVERY steps together STRETCH times as long as without; both numbers are
measured while it runs. Not here: which prompt (scheduler.py). Seconds only; the tokens chosen do
not depend on it.
"""

STRETCH = 1.5  # the mean time between tokens of an answer, against that without a prompt
EVERY = 4  # the slowest step then takes 1 + 4 * 0.5 = 3 times as long, the others as without
LEAST = 16  # prompt tokens of a chunk, however slow: a prompt always moves on
SMOOTH = 0.2  # weight of a new measurement


class Pace:
    """Measures steps; says how many prompt tokens the next one may take beside answers."""

    def __init__(self) -> None:
        self._alone_s: float | None = None
        self._each_s: float | None = None
        self._since = 0  # steps since the last that was to take a chunk

    def beside(self) -> int:
        """Tokens of long prompts beside answers in the next step, asked once for each."""
        self._since += 1
        if self._since < EVERY:
            return 0
        self._since = 0
        if self._alone_s is None or self._each_s is None:
            return LEAST
        return max(LEAST, int(EVERY * (STRETCH - 1) * self._alone_s / self._each_s))

    def measure(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long, for so many answers and so many tokens of prompts."""
        if not prompt_tokens:
            self._alone_s = _blend(self._alone_s, seconds)
            return
        if answers:
            seconds -= self._alone_s or 0.0
        if seconds > 0 and prompt_tokens >= LEAST:
            self._each_s = _blend(self._each_s, seconds / prompt_tokens)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTH * (new - old)
