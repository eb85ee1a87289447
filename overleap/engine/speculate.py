"""Speculative decoding: the MTP block proposes a token, the next step checks it beside its own.

A proposal is kept only if it is the very token that plain decoding chooses there. The sampler
draws token n of an answer from the logits before it and (seed, n), nothing else, so every row of
a checking step yields the token it would have yielded alone: greedy or sampled, the answer is
that of plain decoding, whatever was proposed, and there is no bias to correct. What the numbers
of the same seed would draw from the draft's logits is the best guess, so that is proposed.

When what happens: a step runs positions [s, e) of a text through the main layers; then every
next token is known (from the prompt, or just chosen), so the MTP block takes in position t with
the token at t + 1 for all of them at once, and the last one's logits propose the token at e + 1.
Nothing needs to be kept for later. It attends to a window only, so a prompt's last `window`
positions are enough; where some were left out (restored prefixes, pauses) its window begins
anew. Its positions count from there: rotary phases depend on distances alone.

Not here: whether it pays (gate.py), the block itself (model/draft.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.state import Cache
from overleap.engine import runner
from overleap.engine.gate import Gate, Mode, Step
from overleap.engine.request import Speculation, Token
from overleap.engine.run import Run
from overleap.engine.sampler import Draw, sample
from overleap.engine.scheduler import Part
from overleap.errors import BackendError, ConfigError, OverleapError
from overleap.kernels.spec import Ops
from overleap.model.transformer import Transformer

TOKENS = 1  # proposed at a time: one per MTP block, and releases have one


def choose(
    rows: Iterable[Tensor],
    drafts: list[int],
    draw: Callable[[Tensor, int], Token],
    stop_ids: frozenset[int],
) -> tuple[list[Token], OverleapError | None]:
    """The tokens of one part of a step, and the error that ended them early.

    rows    logits f32 [V] after the last certain token, then after each proposal
    drafts  the proposals, one fewer than rows
    draw    chooses from a row for the n-th of these tokens

    A row counts only while all proposals before it are the tokens chosen there.
    """
    tokens: list[Token] = []
    for index, logits_V in enumerate(rows):
        try:
            token = draw(logits_V, index)
        except OverleapError as error:
            return tokens, error
        tokens.append(token)
        if token.id in stop_ids or drafts[index : index + 1] != [token.id]:
            break
    return tokens, None


class Speculator:
    """Proposes and keeps account of it.

    mode         "auto" does it while it pays, "on" always, "off" never
    whole_pages  a step must not pass a page boundary: a snapshot is taken there

    Raises ConfigError for "on" with a model that has no MTP block.
    """

    def __init__(self, model: Transformer, cache: Cache, mode: Mode, whole_pages: bool) -> None:
        if mode not in ("auto", "on", "off"):
            raise ConfigError(f"speculate is {mode!r}", "it is auto, on or off")
        self.able = model.config.num_nextn_predict_layers > 0
        if mode == "on" and not self.able:
            raise ConfigError(
                "speculate is on, but the model has no MTP block to propose tokens",
                "num_nextn_predict_layers is 0 in its config; leave speculate at auto",
            )
        self._model, self._cache, self._whole_pages = model, cache, whole_pages
        self._window = model.config.sliding_window
        self._gate = Gate(mode if self.able else "off")
        self._step, self._answering = Step.PLAIN, 0
        self._checked, self._accepted = [0] * TOKENS, [0] * TOKENS

    def prepare(self, runs: list[Run]) -> None:
        """Before a step is planned: which proposals of these running requests it checks."""
        answering = [run for run in runs if not run.job.reading]
        self._answering = len(answering)
        self._step = self._gate.decide(len(answering) or len(runs))
        for run in answering:
            job, checks = run.job, self._step is Step.CHECK
            assert run.sequence is not None
            room = len(run.sequence.pages) * PAGE_TOKENS - 1 - job.done
            job.drafted = min(len(run.draft.tokens), room) if checks else 0
            if self._whole_pages:
                job.drafted = min(job.drafted, PAGE_TOKENS - 1 - job.done % PAGE_TOKENS)

    def choose(
        self, run: Run, part: Part, rows: list[Tensor]
    ) -> tuple[list[Token], OverleapError | None]:
        """The next tokens of a request from the logits of its part, and what ended them early.

        Of the proposals that were checked, all but the last of these tokens are right.
        """
        job, sampling, seed = run.job, run.handle.request.sampling, run.handle.seed
        drafts = run.draft.tokens[: part.drafted]
        said = run.ids[job.prompt_tokens :] if sampling.shifts else []

        def draw(logits_V: Tensor, index: int) -> Token:
            # Rows are drawn in order, and each drawn token is kept: the walk never goes back.
            allowed = None if run.walk is None else run.walk.allowed()
            where = Draw(sampling, seed, job.generated + index, said)
            token = sample(logits_V, where, self._model.ops, allowed)
            said.append(token.id)
            if run.walk is not None and token.id not in run.stop_ids:
                run.walk.accept(token.id)
            return token

        tokens, error = choose(rows, drafts, draw, run.stop_ids)
        right = 0
        for place, (token, proposed) in enumerate(zip(tokens, drafts, strict=False)):
            self._checked[place] += 1
            if token.id != proposed:
                break
            self._accepted[place] += 1
            right += 1
        if drafts:
            self._gate.judge(self._answering, right)
        return tokens, error

    def follow(self, runs: list[Run], parts: list[Part], streams_TMD: Tensor) -> None:
        """After a step and its choices: the draft block takes in what was added, and proposes.

        streams_TMD  of all tokens of the parts, in order
        """
        for run in runs:
            run.draft.tokens = []
        if self._step is Step.PLAIN:
            return
        offset = 0
        rows: list[int] = []
        follows: list[runner.Follow] = []
        proposing: list[Run] = []
        for run, part in zip(runs, parts, strict=True):
            added = self._added(run, part)
            if added is not None:
                first = offset + run.draft.end - len(added.ids) - part.start
                rows += range(first, first + len(added.ids))
                follows.append(added)
                proposing += [run] * added.wanted
            offset += part.count
        if not follows:
            return
        rows_T = torch.tensor(rows, dtype=torch.int64, device=streams_TMD.device)
        logits_RV = runner.draft(self._model, self._cache, streams_TMD[rows_T], follows)
        for run, logits_V in zip(proposing, logits_RV, strict=True):
            run.draft.tokens = [_guess(run, logits_V, self._model.ops)]

    def _added(self, run: Run, part: Part) -> runner.Follow | None:
        """What the draft block needs of the tokens that a part has added; None for nothing."""
        job, draft = run.job, run.draft
        first, end = max(part.start, job.prompt_tokens - self._window), job.done
        useful = job.max_tokens >= max(1, job.generated) + 2  # to choose it, and one after it
        if run.handle.finish is not None or first >= end or not useful:
            return None
        assert run.sequence is not None
        if draft.end != first:
            draft.origin = first
        draft.end = end
        ids = run.ids[first + 1 : end + 1]
        return runner.Follow(run.sequence.slot, first - draft.origin, ids, not job.reading)

    def measure(self, parts: list[Part], step_s: float, draft_s: float) -> None:
        """A step took step_s seconds with its choices, and draft_s for the proposals after it."""
        answers = [part for part in parts if part.start >= part.job.prompt_tokens]
        if not answers:
            return
        drafted = sum(part.drafted > 0 for part in answers)
        pure = len(answers) == len(parts) and drafted in (0, len(parts))
        checked = drafted > 0 if pure else None
        self._gate.measure(len(answers), checked, step_s, draft_s)

    def stats(self) -> Speculation:
        """What it did so far, and how it stands."""
        load = self._gate.current
        state = load.state if self._gate.mode == "auto" else self._gate.mode
        return Speculation(
            state=state if self.able else "none",
            checked=tuple(self._checked),
            accepted=tuple(self._accepted),
            gain=load.gain,
        )


def _guess(run: Run, logits_V: Tensor, ops: Ops) -> int:
    """What the sampler would choose if the draft's logits were the model's."""
    sampling = replace(run.handle.request.sampling, logprobs=None)
    try:
        return sample(logits_V, Draw(sampling, run.handle.seed, run.job.generated), ops).id
    except BackendError:
        return 0  # not numbers: a guess like any other, and an acceptance that tells of it
