"""Every error a person can meet. One sentence, the numbers, and a hint that says what to do next.

OverleapError
 |- ConfigError        a config.json or an option that contradicts itself or the architecture
 |- CheckpointError    a checkpoint folder or file that is missing, damaged or not what it claims
 |- CapacityError      something does not fit: memory, pages, slots, context, disk
 |- BackendError       a kernel backend that was asked for cannot serve
 |- RequestError       a request that cannot be answered as it was asked
 |- StateError         an answer that differs from the same answer computed from scratch
 |- DialectError       a chat request or a generated text that does not follow its format
 '- TrainingError      a training run, recipe or data set that cannot go on

Mistakes of ours are `assert`, not these.
"""


class OverleapError(Exception):
    """Base of all errors meant for people.

    message  one sentence with the numbers, no trailing full stop
    hint     what the reader can do about it, or None
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(OverleapError):
    """A configuration that contradicts itself or the architecture."""


class CheckpointError(OverleapError):
    """A checkpoint that is missing, damaged or not what it claims to be."""


class CapacityError(OverleapError):
    """Something does not fit: memory, pages, slots, context or disk."""


class BackendError(OverleapError):
    """A kernel backend that was asked for by name cannot serve."""


class RequestError(OverleapError):
    """A request that cannot be answered as it was asked."""


class StateError(OverleapError):
    """An answer that differs from the same answer computed from scratch."""


class DialectError(OverleapError):
    """A chat request or a generated text that does not follow its format."""


class TrainingError(OverleapError):
    """A training run, recipe or data set that cannot go on."""
