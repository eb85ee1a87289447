"""The loop: requests in, events out. Ties scheduler, cache, model and sampler together.

Not here: text (chat/), threads, HTTP. One thread calls everything; any of them may step.
Read next: docs/walk.md, or scheduler.py for who runs when.
"""

import secrets
import time
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import replace

from torch import Tensor

from overleap import machine
from overleap.cache import layout
from overleap.cache.disk import DiskTier
from overleap.cache.layout import PAGE_TOKENS, CacheFormat, pages_for
from overleap.cache.prefix import Chain, Hit, PrefixCache, common_pages
from overleap.cache.state import Cache, Sequence
from overleap.engine import request as border
from overleap.engine import runner
from overleap.engine.budget import SNAPSHOT_BYTES, pages_in
from overleap.engine.choices import Choices
from overleap.engine.gate import Mode
from overleap.engine.pace import Pace
from overleap.engine.request import (
    Completion,
    Event,
    Finish,
    FinishReason,
    Handle,
    Progress,
    Request,
    Scores,
    Stats,
    Token,
    Usage,
)
from overleap.engine.resident import Resident
from overleap.engine.run import Run
from overleap.engine.sampler import score
from overleap.engine.scheduler import Job, Part, Place, Scheduler, all_can_finish
from overleap.engine.speculate import Speculator
from overleap.errors import BackendError, ConfigError, OverleapError, RequestError
from overleap.kernels import identity
from overleap.model.transformer import Transformer

_NO_HIT = Hit(None, (), 0)
LUMP_PAGES = 4  # that an answer gets at once at least; a long one gets a quarter of what it has


class Engine:
    """Serves requests on one model.

    model           its config says vocabulary, context and end of sequence
    memory_bytes    for pages and slots; or `pages` of 128 tokens; 1 GiB when neither is given
    slots           requests that run at once
    format          how cache rows are kept
    chunk_tokens    tokens of a step at most: what a long prompt makes the others wait for
    snapshot_bytes  for snapshots that let later requests share a prefix, beside memory_bytes;
                    0 switches sharing off
    speculate       propose tokens with the MTP block: while it pays, always, or never; answers
                    are the same
    model_digest    names the weights, for prefixes that outlive the process
    disk            where prefixes are kept beyond the memory and the process; needs model_digest
    choices         of this model, for requests that want to know them
    resident        what bounds the model's experts in memory, where anything does, for stats()

    Raises CapacityError when the memory does not hold a page, ConfigError for a bad budget.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        memory_bytes: int | None = None,
        pages: int | None = None,
        slots: int = 8,
        format: CacheFormat = CacheFormat.RELEASE,
        chunk_tokens: int = 512,
        snapshot_bytes: int = SNAPSHOT_BYTES,
        speculate: Mode = "auto",
        model_digest: str = "",
        disk: DiskTier | None = None,
        choices: Choices | None = None,
        resident: Resident | None = None,
    ) -> None:
        if disk is not None and not model_digest:
            raise ConfigError("disk is given without model_digest, which names what is kept there")
        if pages is None:
            pages = pages_in(model.config, memory_bytes or 2**30, slots, format)
        elif memory_bytes is not None:
            raise ConfigError("memory_bytes and pages are both given", "give one of them")
        self.model, self.format, self._resident = model, format, resident
        self._scheduler = Scheduler(pages=pages, slots=slots, chunk_tokens=chunk_tokens)
        self._cache = Cache(
            model.config, pages=pages, slots=slots, format=format, device=model.device
        )
        computes = identity(model.ops, model.device.type, str(model.dtype))
        self._prefix = PrefixCache(
            self._cache,
            snapshot_bytes=snapshot_bytes,
            model_digest=f"{model_digest} {computes}",
            disk=disk,
        )
        self._speculator = Speculator(model, self._cache, speculate, self._prefix.enabled)
        self._pace, self._choices = Pace(), choices
        self._runs: dict[str, Run] = {}
        self._finished = self._read = self._hit = self._generated = self._peak = 0
        self._prefill_s = self._decode_s = 0.0

    def submit(self, request: Request) -> Handle:
        """Put a request in the queue.

        Raises RequestError for what this model cannot answer or an id that is being served,
        CapacityError for what can never fit into the cache.
        """
        config = self.model.config
        border.check(
            request,
            vocab_size=config.vocab_size,
            context_tokens=config.max_position_embeddings,
        )
        if request.id in self._runs:
            raise RequestError(f"a request with the id {request.id!r} is being served")
        sampling = request.sampling
        job = Job(
            request.id,
            len(request.prompt),
            sampling.max_tokens,
            request.flow,
            request.weight,
            sampling.prompt_logprobs is not None,
        )
        chain: Chain = []
        if self._prefix.enabled:
            chain = self._prefix.chain(request.prompt, request.salt, request.public_tokens)
            job.marks = _marks(job.prompt_tokens, (*request.branches, request.public_tokens))
        stop_ids = sampling.stop_ids
        run = Run(
            Handle(request, secrets.randbits(63) if sampling.seed is None else sampling.seed),
            job,
            frozenset((config.eos_token_id,) if stop_ids is None else stop_ids),
            chain,
            list(request.prompt),
            time.perf_counter(),
            walk=request.constraint.start() if request.constraint is not None else None,
        )
        self._scheduler.submit(job)
        self._runs[request.id] = run
        return run.handle

    def abort(self, handle: Handle) -> None:
        """End a request now; its Finish follows the events it already has. Twice is harmless.

        What was read of its prompt is kept, up to the last step that ended with a full page.
        """
        run = self._runs.get(handle.request.id)
        if run is not None and run.handle is handle:
            self._finish(run, FinishReason.ABORT)

    def stream(self, handle: Handle) -> Iterator[Event]:
        """The events of a request as they come, stepping when there are none.

        Other requests move along with it. Leaving the loop early aborts the request.
        """
        try:
            while handle.events or handle.finish is None:
                if handle.events:
                    yield handle.events.popleft()
                else:
                    self.step()
        finally:
            self.abort(handle)

    def generate(self, request: Request) -> Completion:
        """Submit and wait. Raises the error of a request that ended with one."""
        tokens = []
        handle = self.submit(request)
        for event in self.stream(handle):
            if isinstance(event, Token):
                tokens.append(event)
        assert handle.finish is not None
        if handle.finish.error is not None:
            raise handle.finish.error
        return Completion(tuple(tokens), handle.finish)

    def step(self) -> bool:
        """Have answers grow, admit what fits, run one packed step. False: there is nothing to do.

        An error of the step ends the requests in it, because their state is then undefined;
        one that is not an OverleapError is raised as well.
        """
        self._grow()
        self._scheduler.admit(self._offer)
        moving = [job for job in self._scheduler.running if not job.held_up]
        self._speculator.prepare([self._runs[job.id] for job in moving])
        parts = self._scheduler.plan(self._pace.beside())
        if not parts:
            assert not self._scheduler.waiting, "a request waits for an idle engine"
            assert not self._scheduler.running, "all that run are held up"
            return False
        self._peak = max(self._peak, self._held_bytes())
        runs = [self._runs[part.job.id] for part in parts]
        try:
            self._advance(runs, parts)
        except BaseException as error:
            for run in runs:
                if run.handle.finish is None:
                    self._fail(run, error)
            if not isinstance(error, OverleapError):
                raise
        return True

    def _advance(self, runs: list[Run], parts: list[Part]) -> None:
        """Run a step, choose the next tokens, and have those after them proposed."""
        began = time.perf_counter()
        rows = [run.row(part) for run, part in zip(runs, parts, strict=True)]
        self._expect_choices(runs, parts)
        output = runner.step(self.model, self._cache, rows)
        each = (time.perf_counter() - began) / sum(part.count for part in parts)
        for run, part in zip(runs, parts, strict=True):
            run.machine_s += each * part.count
        wanted, end = iter(output.logits), 0
        for run, part in zip(runs, parts, strict=True):
            end += part.count
            self._commit(run, part, [next(wanted) for _ in range(part.rows)], end)
        chosen = time.perf_counter()
        self._speculator.follow(runs, parts, output.streams)
        ended = time.perf_counter()
        self._speculator.measure(parts, chosen - began, ended - chosen)
        self._count(parts, ended - began)

    def _expect_choices(self, runs: list[Run], parts: list[Part]) -> None:
        """Have noted what may become the last token of those who want to know its choices."""
        if self._choices is None:
            return
        rows, end = list[int](), 0
        for run, part in zip(runs, parts, strict=True):
            end += part.count
            if run.handle.request.choices:
                rows += range(end - 1 - part.drafted, end)
        self._choices.expect(rows)

    def _grow(self) -> None:
        """Give every answer the page of its next token, or hold it up.

        Where it may, it gets some more at once: steps are recorded anew (replay.py) whenever the
        table of pages has changed its shape.
        """
        for job in self._scheduler.running:
            sequence = self._runs[job.id].sequence
            assert sequence is not None
            held = len(sequence.pages)
            if job.reading or pages_for(job.done + 1) <= held:
                continue
            most = min(max(LUMP_PAGES, held // LUMP_PAGES), job.pages - held)
            counts = dict.fromkeys((most, 1))
            job.held_up = not any(self._lend(job, sequence, count) for count in counts)

    def _lend(self, job: Job, sequence: Sequence, count: int) -> bool:
        """Give a running job so many pages more, if all can finish then."""
        free = self._cache.pages_free + self._prefix.reclaimable(_NO_HIT)
        if not self._can_finish(job, sequence.pages, count, free):
            return False
        self._prefix.reclaim(count, _NO_HIT)
        self._cache.reserve(sequence, (len(sequence.pages) + count) * PAGE_TOKENS)
        return True

    def _can_finish(self, job: Job, held: Ids[int], count: int, free: int) -> bool:
        """Whether all that run, and this job, can finish once it has `count` of the free pages.

        held  pages that it holds besides
        """
        fresh = range(-count, 0)  # pages that are not chosen yet: numbers that no page has
        jobs = [(job.pages - len(held) - count, [*held, *fresh])]
        for other in self._scheduler.running:
            sequence = self._runs[other.id].sequence
            if other is not job and sequence is not None:
                jobs.append((other.pages - len(sequence.pages), sequence.pages))
        return all_can_finish(free - count, jobs)

    def _offer(self, job: Job) -> Place:
        """Set a slot and pages of its prompt aside for a waiting job, behind a known prefix."""
        run = self._runs[job.id]
        # The last prompt token is always computed: its logits choose the first token.
        usable = 0 if job.scored else job.prompt_tokens - 1
        hit = self._prefix.lookup(run.chain, usable)
        if not job.scored and self._read_by_another(run, hit.length):
            return Place.LATER
        needed = pages_for(job.prompt_tokens) - len(hit.pages)
        free = self._cache.pages_free + self._prefix.reclaimable(hit)
        if not self._can_finish(job, hit.pages, needed, free):
            return Place.FULL
        try:
            self._prefix.reclaim(needed, hit)
            hit = self._prefix.fetch(run.chain, usable, hit)
            if hit.snapshot is None:
                run.sequence = self._cache.open()
            else:
                run.sequence = self._cache.restore(hit.snapshot, list(hit.pages))
            self._cache.reserve(run.sequence, job.prompt_tokens)
        except BaseException as error:
            self._fail(run, error)
            if not isinstance(error, OverleapError):
                raise
            return Place.DROPPED
        self._prefix.use(run.chain, hit)
        job.done = run.cached = hit.length
        if hit.known > hit.length:
            job.marks.add(hit.known)
        self._hit += hit.length
        run.started = time.perf_counter()
        run.handle.events.append(Progress(job.done, job.prompt_tokens, run.cached))
        return Place.TAKEN

    def _read_by_another(self, run: Run, found: int) -> bool:
        """True where a running request is about to compute pages that this one can share.

        It is asked to leave a snapshot where the two part, and this one waits for it.
        """
        for job in self._scheduler.running:
            if not job.reading:
                continue
            pages = common_pages(run.chain, self._runs[job.id].chain)
            shared = min(pages, (run.job.prompt_tokens - 1) // PAGE_TOKENS) * PAGE_TOKENS
            if shared > max(found, job.done):
                job.marks.add(shared)
                return True
        return False

    def _commit(self, run: Run, part: Part, rows: list[Tensor], end: int) -> None:
        """Take note of what a step did for one request, and choose its next tokens.

        rows  logits wanted; end: the packed row behind the part's last
        """
        job, reading = run.job, run.job.reading
        if part.scored:
            try:
                self._score(run, part, rows)
            except OverleapError as unscored:
                return self._fail(run, unscored)
            rows = rows[-1:] if part.logits else []
        tokens, error = self._speculator.choose(run, part, rows)
        refused = part.drafted - max(0, len(tokens) - 1)
        if refused:
            assert run.sequence is not None
            self._cache.rewind(run.sequence, run.sequence.length - refused)
        self._scheduler.commit(part, refused)
        if run.handle.request.choices and self._choices is not None:
            run.chosen = self._choices.of(end - 1 - refused, job.done)
        if reading:
            run.handle.events.append(Progress(job.done, job.prompt_tokens, run.cached))
        if self._prefix.enabled and job.done % PAGE_TOKENS == 0:
            self._remember(run, reading)
        for token in tokens:
            job.generated += 1
            self._generated += 1
            run.last = time.perf_counter()
            run.first = run.first or run.last
            if token.id in run.stop_ids:
                self._finish(run, FinishReason.STOP, stop_id=token.id)
                return
            run.ids.append(token.id)
            run.handle.events.append(token)
        if error is not None:
            self._finish(run, FinishReason.ERROR, error=error)
        elif not job.reading and job.generated == job.max_tokens:
            self._finish(run, FinishReason.LENGTH)

    def _score(self, run: Run, part: Part, rows: list[Tensor]) -> None:
        """Tell the log-probabilities of the prompt tokens that follow those of the part."""
        top = run.handle.request.sampling.prompt_logprobs
        assert top is not None
        following = run.ids[part.start + 1 : part.start + part.count + 1]
        scored = tuple(
            score(logits_V, token, top, self.model.ops)
            for logits_V, token in zip(
                rows, following, strict=part.start + part.count < len(run.ids)
            )
        )
        run.handle.events.append(Scores(scored))

    def _remember(self, run: Run, reading: bool) -> None:
        """At a page boundary: take a snapshot, and keep it where one of the prompt is wanted.

        Of all others only the last is worth keeping, so it waits for the end: of the answer, or
        of a prompt that is aborted before all of it was read.
        """
        assert run.sequence is not None
        run.turn = self._cache.snapshot(run.sequence)
        if reading and run.job.done in run.job.marks:
            self._prefix.keep(run.chain, run.sequence.pages, run.turn)
            run.turn = None
            machine.trim()

    def _fail(self, run: Run, error: BaseException) -> None:
        """End a request with an error; what it has read is not kept."""
        if not isinstance(error, OverleapError):
            what = f"{type(error).__name__}: {error}"
            error = BackendError(f"the step with this request failed: {what}")
        self._finish(run, FinishReason.ERROR, error=error)

    def _finish(
        self,
        run: Run,
        reason: FinishReason,
        *,
        stop_id: int | None = None,
        error: OverleapError | None = None,
    ) -> None:
        """Take a request out, give back what it holds, and send its last event."""
        self._scheduler.remove(run.job)
        now = time.perf_counter()
        usage = Usage(
            prompt_tokens=run.job.prompt_tokens,
            cached_tokens=run.cached,
            generated_tokens=run.job.generated,
            waiting_s=(run.started or now) - run.submitted,
            prefill_s=(run.first or now) - run.started if run.started else 0.0,
            decode_s=run.last - run.first if run.last and run.first else 0.0,
            machine_s=run.machine_s,
        )
        if run.sequence is not None:
            cache = self._cache
            took = layout.cache_bytes(cache.config, run.sequence.length, cache.format)
            usage = replace(usage, cache_bytes=took.total)
            if run.turn is not None and reason is not FinishReason.ERROR:
                request = run.handle.request
                chain = self._prefix.chain(run.ids, request.salt, request.public_tokens, run.chain)
                self._prefix.keep(chain, run.sequence.pages, run.turn)
            self._cache.close(run.sequence)
        del self._runs[run.job.id]
        self._finished += 1
        run.handle.finish = Finish(
            reason=reason,
            usage=usage,
            seed=run.handle.seed,
            stop_id=stop_id,
            error=error,
            chosen=run.chosen,
        )
        run.handle.events.append(run.handle.finish)

    def stats(self) -> Stats:
        """What has been done so far, and what is held now."""
        held = self._held_bytes()
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            finished=self._finished,
            read_tokens=self._read,
            hit_tokens=self._hit,
            generated_tokens=self._generated,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            pages=self._scheduler.pages,
            pages_free=self._cache.pages_free,
            cache_bytes=held,
            peak_cache_bytes=max(self._peak, held),
            allocated_bytes=self._cache.allocated_bytes,
            peak_process_bytes=machine.peak_resident_bytes(),
            speculation=self._speculator.stats(),
            disk=self._prefix.disk_stats(),
            experts=None if self._resident is None else self._resident.stats(),
        )

    def _count(self, parts: list[Part], seconds: float) -> None:
        """Book the tokens and the time of a step."""
        answered = sum(part.count for part in parts if part.start >= part.job.prompt_tokens)
        total = sum(part.count for part in parts)
        answering = sum(part.start >= part.job.prompt_tokens for part in parts)
        self._pace.measure(answering, total - answered, seconds)
        self._read += total - answered
        self._decode_s += seconds * answered / total
        self._prefill_s += seconds * (total - answered) / total

    def _held_bytes(self) -> int:
        cache = self._cache
        pages = self._scheduler.pages - cache.pages_free
        slots = cache.slots - cache.slots_free
        return (
            pages * layout.page_bytes(cache.config, cache.format)
            + slots * layout.slot_bytes(cache.config, cache.format).total
            + self._prefix.snapshot_bytes
            + sum(run.turn.nbytes for run in self._runs.values() if run.turn is not None)
        )


def _marks(prompt_tokens: int, branches: tuple[int, ...]) -> set[int]:
    """Where to keep snapshots while reading: now and then, and as late as a repeat can use one.

    A prompt of whole pages also gets one at its end, for prompts that go on from there.
    """
    marks = set(range(layout.SNAPSHOT_TOKENS, prompt_tokens, layout.SNAPSHOT_TOKENS))
    late = (prompt_tokens - 1, prompt_tokens, *(n for n in branches if n <= prompt_tokens))
    marks |= {n // PAGE_TOKENS * PAGE_TOKENS for n in late}
    return marks - {0}
