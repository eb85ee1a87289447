"""What crosses the border of this room: requests come in, events go out. Token ids, never text.

Not here: how a request is served. No tensors either, so every room may build one.
Read next: scheduler.py (who runs next), sampler.py (what the numbers of `Sampling` do).
"""

import math
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from overleap.cache.store import DiskStats
from overleap.errors import OverleapError, RequestError

_PENALTIES = ("frequency_penalty", "presence_penalty")
SEED_LIMIT = 2**63  # a seed is a signed 64-bit number, as the APIs send it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    temperature  0 is greedy: the likeliest token, the smaller id on ties
    top_k        keep the k likeliest tokens; None keeps all
    top_p        then keep the likeliest tokens that together hold this share of probability
    min_p        and only tokens at least this fraction as likely as the likeliest one
    seed         the same seed, prompt and model give the same tokens; None draws a fresh seed
    logprobs     None: none; 0: of the chosen token; n: also of the n likeliest. Natural
                 logarithms of the model's own distribution, before all of the above
    max_tokens   tokens to choose at most, the stop token counted; 0: the prompt is read, no more
    stop_ids     tokens that end the answer; None is the model's end of sequence, () is none
    prompt_logprobs  as logprobs, for the tokens of the prompt; all of it is then computed
    frequency_penalty  taken off a token's logit for every time the answer has it already
    presence_penalty   taken off once, if the answer has it at all; both from -2 to 2
    logit_bias   (token, value) pairs: added to the token's logit, from -100 to 100

    Raises RequestError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    max_tokens: int = 256
    stop_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise RequestError(f"{name} is {value!r}, expected a number")
        for name in ("top_k", "seed", "logprobs", "prompt_logprobs", "max_tokens"):
            value = getattr(self, name)
            if value is None and name != "max_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise RequestError(f"{name} is {value!r}, expected a whole number")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(
                f"temperature is {self.temperature}, it must be 0 or more",
                "0 is greedy, 1 is the model's own distribution",
            )
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p is {self.min_p}, it must be between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k is {self.top_k}, it must be at least 1", "None keeps all")
        if self.seed is not None and not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise RequestError(f"seed is {self.seed}, it must fit into 64 bits with a sign")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RequestError(f"{name} is {value}, it must be 0 or more")
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens is {self.max_tokens}, it must be 0 or more")
        for name in _PENALTIES:
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name} is {getattr(self, name)}, it must be from -2 to 2")
        _ids("logit_bias", [token for token, _ in self.logit_bias])
        for token, value in self.logit_bias:
            if not -100 <= value <= 100:
                raise RequestError(f"logit_bias of {token} is {value}, it must be from -100 to 100")
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _ids("stop_ids", self.stop_ids))

    @property
    def greedy(self) -> bool:
        """True where no random number is drawn."""
        return self.temperature == 0

    @property
    def shifts(self) -> bool:
        """True where logits are changed before a token is chosen by them."""
        return bool(self.frequency_penalty or self.presence_penalty or self.logit_bias)


class Walk(Protocol):
    """One answer under a constraint, token by token. Not shared between answers."""

    def allowed(self) -> bytes:
        """Bit `id % 8` of byte `id // 8` is set where the next token may be `id`.

        Raises RequestError where nothing can follow.
        """

    def accept(self, token: int) -> None:
        """This token was chosen; it was allowed."""


class Constraint(Protocol):
    """What an answer must look like. Holds no state of an answer."""

    def start(self) -> Walk:
        """A walk from the beginning of an answer."""


def _fresh_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    prompt         token ids, at least one; kept as a tuple
    sampling       how to continue it
    id             names the request in its events and in errors; unique among those being served
    salt           requests share cached prefixes only with requests of the same salt
    branches       prompt lengths after which later prompts may go on differently: the end of a
                   document, of a system prompt. A later prompt then continues from the page before
    public_tokens  the first so many tokens of the prompt are nobody's secret: full pages of them
                   are shared whatever the salt
    flow           requests of one flow share what is its due; flows share by weight
    weight         how much of a busy engine the flow is due, beside others; above 0
    constraint     which tokens may be chosen, None for all
    choices        tell at the end what the indexer chose for the last token

    Raises RequestError for an empty prompt or ids that are not whole numbers >= 0.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str = field(default_factory=_fresh_id)
    salt: str = ""
    branches: tuple[int, ...] = ()
    public_tokens: int = 0
    flow: str = ""
    weight: float = 1.0
    constraint: Constraint | None = None
    choices: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RequestError(f"the weight is {self.weight}, it must be above 0")
        object.__setattr__(self, "prompt", _ids("the prompt", self.prompt))
        object.__setattr__(self, "branches", _ids("branches", self.branches, "a length"))
        if not self.prompt:
            raise RequestError(
                "the prompt is empty", "start with the model's beginning-of-sequence token"
            )
        if not 0 <= self.public_tokens <= len(self.prompt):
            raise RequestError(
                f"public_tokens is {self.public_tokens}, the prompt has {len(self.prompt)} tokens"
            )

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer: what the cache must be able to hold."""
        return len(self.prompt) + self.sampling.max_tokens


def _ids(name: str, ids: Sequence[int], what: str = "a token id") -> tuple[int, ...]:
    """The ids as a tuple; RequestError names the first that cannot be a token id."""
    for index, token in enumerate(ids):
        if type(token) is not int or token < 0:
            raise RequestError(f"{name} holds {token!r} at {index}, expected {what}")
    return tuple(ids)


def check(request: Request, *, vocab_size: int, context_tokens: int) -> None:
    """Refuse what this model can never answer (RequestError with the numbers).

    vocab_size      ids must be below it
    context_tokens  positions the model has (max_position_embeddings)
    """
    sampling = request.sampling
    for name, ids in (
        ("the prompt", request.prompt),
        ("stop_ids", sampling.stop_ids or ()),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise RequestError(
                f"{name} holds token {largest}, the vocabulary has {vocab_size}",
                "the prompt was probably made with another model's tokenizer",
            )
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(sampling, name)
        if wanted is not None and wanted > vocab_size:
            raise RequestError(f"{name} is {wanted}, the vocabulary has {vocab_size}")
    if request.total_tokens > context_tokens:
        raise RequestError(
            f"{len(request.prompt)} prompt tokens and {sampling.max_tokens} new ones are "
            f"{request.total_tokens} positions, the model has {context_tokens}",
            "shorten the prompt or lower max_tokens",
        )


@dataclass(frozen=True)
class Progress:
    """Part of the prompt has been read.

    done    prompt tokens in the cache now
    total   tokens of the prompt
    cached  of `done`, those that an earlier request had left behind
    """

    done: int
    total: int
    cached: int


@dataclass(frozen=True)
class Token:
    """A chosen token.

    id            the token
    logprob       its log-probability, None where none were asked for
    top_logprobs  (id, log-probability) of the likeliest tokens, likeliest first
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Scores:
    """Tokens of the prompt with their log-probabilities, in order; the first token has none."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Chosen:
    """Which compressed blocks a layer's indexer chose for a token.

    visible  blocks there were; entries: numbers of the chosen ones, ascending
    """

    layer: int
    visible: int
    entries: tuple[int, ...]


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # a stop token was chosen
    LENGTH = "length"  # max_tokens were chosen
    ABORT = "abort"  # the caller asked for it
    ERROR = "error"  # Finish.error says what


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took.

    prompt_tokens     tokens of the prompt
    cached_tokens     of those, not computed because an earlier request had left them behind
    generated_tokens  tokens chosen, the stop token counted
    cache_bytes       bytes of cache its tokens took: whole pages and a slot
    waiting_s         seconds from submission until the first step
    prefill_s         seconds from then until the first token
    decode_s          seconds from the first token until the last
    machine_s         its share, by tokens, of the time of the model's steps it took part in
    """

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    cache_bytes: int = 0
    waiting_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    machine_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The last event of a request.

    stop_id  the stop token, which is not sent as a Token; None for other reasons
    seed     the seed that was used: with it the same request gives the same answer
    error    what went wrong, where the reason is ERROR
    chosen   what the indexer chose for the last token, where the request asked for it
    """

    reason: FinishReason
    usage: Usage
    seed: int
    stop_id: int | None = None
    error: OverleapError | None = None
    chosen: tuple[Chosen, ...] = ()


Event = Progress | Scores | Token | Finish


@dataclass(eq=False)
class Handle:
    """A submitted request. `events` are those nobody has taken yet, in order.

    seed    the seed in use: the request's, or the one drawn for it
    finish  the last event, once it is there
    """

    request: Request
    seed: int
    events: deque[Event] = field(default_factory=deque)
    finish: Finish | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    tokens: tuple[Token, ...]
    finish: Finish

    @property
    def ids(self) -> list[int]:
        """The token ids, the stop token left out."""
        return [token.id for token in self.tokens]


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What proposing tokens brought.

    state     "none": the model has nothing to propose with; "off" and "on": as asked for, "on"
              also where it was found to pay; "trial": being measured; "paused": it did not pay,
              and is tried again later. Of the number of requests served last
    checked   how often a proposal was checked, by its place (the first, the second, ...); those
              after a wrong one are not
    accepted  how many of those were the tokens chosen
    gain      tokens a second of an answer against plain decoding, None before it was measured
    """

    state: str
    checked: tuple[int, ...]
    accepted: tuple[int, ...]
    gain: float | None


@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """What keeping only some of the routed experts in memory has cost and brought so far.

    kept        times a layer of a step wanted an expert that was in memory from earlier on
    ahead       that was read, or being read, because it was expected
    missed      that nobody had begun to read
    read_ahead  experts read because they were expected; `right` of them were then used
    read_bytes  of experts brought into memory, from the disk or the system's cache of it
    waited_s    seconds the model waited for them
    bounded     False where the system takes no advice about pages and keeps them as it likes
    """

    kept: int
    ahead: int
    missed: int
    read_ahead: int
    right: int
    read_bytes: int
    resident_bytes: int
    bound_bytes: int
    waited_s: float
    bounded: bool


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine has done since it was made, and what it holds now.

    read_tokens      prompt tokens computed; hit_tokens: those found in the prefix cache instead
    prefill_s        seconds spent on prompts, decode_s on answers; a mixed step is split by tokens
    cache_bytes      pages held (by requests or as prefixes), slots taken and snapshots
    allocated_bytes  pages and slots, in use or not
    disk             prefixes on disk, None where none are kept
    experts          None where all of them may be in memory
    """

    waiting: int
    running: int
    finished: int
    read_tokens: int
    hit_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    pages: int
    pages_free: int
    cache_bytes: int
    peak_cache_bytes: int
    allocated_bytes: int
    peak_process_bytes: int | None
    speculation: Speculation
    disk: DiskStats | None = None
    experts: ExpertStats | None = None
