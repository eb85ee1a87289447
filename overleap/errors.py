"""Every error a person can meet. One sentence, the numbers, and a hint that says what to do next.

OverleapError
 |- ConfigError        a config.json or an option that contradicts itself or the architecture
 |- CheckpointError    a checkpoint folder or file that is missing, damaged or not what it claims
 |- CapacityError      something does not fit: memory, pages, slots, context, disk
 |- BackendError       a kernel backend that was asked for cannot serve
 |- RequestError       a request that cannot be answered as it was asked
 |- StateError         an answer that differs from the same answer computed from scratch
 |- DialectError       a chat request or a generated text that does not follow its format
 |- AuthError          an API key that is missing, unknown or revoked (HTTP 401)
 |- AccessError        a key that is known, on a tier that does not allow this (HTTP 403)
 |- QuotaError         a quota or balance that does not cover a request (HTTP 402)
 |- RateError          too many requests a minute or at once; says when to come back (HTTP 429)
 |- LedgerError        a ledger that cannot be opened, or does not keep its books (HTTP 503)
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


class AuthError(OverleapError):
    """An API key that is missing, unknown or revoked."""


class AccessError(OverleapError):
    """A key that is known, on a tier that does not allow what was asked for."""


class QuotaError(OverleapError):
    """A quota or balance that does not cover a request: waiting a little does not help."""


class RateError(OverleapError):
    """Too many requests a minute or at once.

    retry_after_s  whole seconds after which the same request may be accepted
    """

    def __init__(self, message: str, hint: str | None = None, *, retry_after_s: int) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class LedgerError(OverleapError):
    """A ledger that cannot be opened, cannot be written, or does not keep its books."""


class TrainingError(OverleapError):
    """A training run, recipe or data set that cannot go on."""
