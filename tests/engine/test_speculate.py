"""Speculation changes how fast an answer comes and nothing else.

Most tests run the fake model, whose every token depends on all before it, and whose draft block
checks that its window holds what it should. Then the true architecture, and its MTP block.
"""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from overleap.cache.layout import PAGE_TOKENS, CacheFormat
from overleap.engine import speculate as room
from overleap.engine.engine import Engine
from overleap.engine.gate import Gate, Step
from overleap.engine.request import Completion, FinishReason, Request, Sampling, Token
from overleap.engine.run import Run
from overleap.engine.sampler import choice_of
from overleap.engine.scheduler import Job, Place, Scheduler
from overleap.engine.speculate import choose
from overleap.errors import BackendError, ConfigError
from overleap.kernels.spec import Ops
from overleap.kernels.torch.sample import candidates
from overleap.model.transformer import Batch, Transformer
from tests.checkpoints import random_tensors, tiny_config
from tests.engine.fake import VOCABULARY, FakeModel, answer, next_logits, poison
from tests.engine.test_sampler import RARE, deviations
from tests.engine.test_true_model import assert_same as assert_close
from tests.oracles.running import build, distance, draw_ids, start
from tests.oracles.running import poison as fill_with_nan
from tests.oracles.running import room as cache_room
from tests.oracles.steady import Steady

EDGES = [1, 5, 127, 128, 129, 255, 256, 257, 300]


def make(**options: Any) -> tuple[Engine, FakeModel]:
    model = FakeModel()
    options = {"pages": 40, "slots": 4, "chunk_tokens": 200, "speculate": "on"} | options
    engine = Engine(model, format=CacheFormat.WIDE, **options)  # type: ignore[arg-type]
    poison(engine._cache)
    return engine, model


def text(seed: int, tokens: int) -> list[int]:
    number = random.Random(seed)
    return [number.randrange(VOCABULARY) for _ in range(tokens)]


def ask(prompt: list[int], **sampling: Any) -> Request:
    return Request(
        prompt=prompt, sampling=Sampling(**{"temperature": 0, "stop_ids": ()} | sampling)
    )


def serve(engine: Engine, requests: list[Request]) -> list[Completion]:
    """The answers to requests submitted at once."""
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    done = []
    for handle in handles:
        assert handle.finish is not None
        tokens = tuple(event for event in handle.events if isinstance(event, Token))
        done.append(Completion(tokens, handle.finish))
    return done


def assert_same(one: Completion, other: Completion) -> None:
    """Everything but the times."""
    assert one.tokens == other.tokens
    a, b = one.finish, other.finish
    assert (a.reason, a.seed, a.stop_id) == (b.reason, b.seed, b.stop_id)
    assert str(a.error) == str(b.error)
    for field in ("prompt_tokens", "cached_tokens", "generated_tokens", "cache_bytes"):
        assert getattr(a.usage, field) == getattr(b.usage, field), field


def assert_empty(engine: Engine) -> None:
    engine._prefix.clear()
    stats = engine.stats()
    assert stats.pages_free == stats.pages and stats.cache_bytes == 0
    assert engine._cache.slots_free == engine._cache.slots and not engine._runs


# -- the same answers


@pytest.mark.parametrize("chunk_tokens", [4, 127, 1000])
@pytest.mark.parametrize("prompt_tokens", EDGES)
def test_an_answer_follows_from_its_prompt(
    prompt_tokens: int, chunk_tokens: int, seed: int
) -> None:
    engine, model = make(chunk_tokens=chunk_tokens)
    prompt = text(seed, prompt_tokens)
    done = engine.generate(ask(prompt, max_tokens=140))
    assert done.ids == answer(prompt, 140)
    assert done.finish.usage.generated_tokens == 140
    stats = engine.stats()
    (checked,), (accepted,) = stats.speculation.checked, stats.speculation.accepted
    assert 0.4 < accepted / checked < 0.9
    decodes = 140 - 1 - accepted  # the first token comes with the prompt
    assert decodes - 4 <= checked <= decodes, "a few steps end at a page, or at the end"
    assert model.steps[-checked:].count([2]) >= checked - 4
    assert stats.read_tokens == prompt_tokens and stats.generated_tokens == 140
    assert_empty(engine)


def test_the_draft_block_sees_the_end_of_the_prompt_and_every_token_after(seed: int) -> None:
    engine, model = make(chunk_tokens=100, snapshot_bytes=0)
    engine.generate(ask(text(seed, 530), max_tokens=60))
    # Chunks end at 100, 200, ...; of the prompt, positions 402 .. 529 count.
    assert model.drafted[:2] == [[98], [30]]
    fed = sum(map(sum, model.drafted))
    assert 128 + 59 - 3 <= fed <= 128 + 59, "the last tokens have nothing to propose"


@pytest.mark.parametrize("hot, share", [(True, True), (False, True), (True, False)])
def test_batched_with_others_as_without_speculation(hot: bool, share: bool, seed: int) -> None:
    number = random.Random(seed)
    document = text(seed, 400)
    requests = []
    for n, tokens in enumerate(EDGES):
        requests.append(
            ask(
                document[:tokens] + text(n, number.randint(0, 3)),
                temperature=1.2 if hot else 0,
                seed=n,
                logprobs=number.choice([None, 0, 3]),
                max_tokens=number.randint(1, 130),
                stop_ids=tuple(number.sample(range(VOCABULARY), number.choice([0, 1]))),
            )
        )
    options = {"pages": 60, "snapshot_bytes": 2**26 if share else 0}
    plain = serve(make(speculate="off", **options)[0], requests)
    for chunk_tokens in (number.randint(4, 6), number.randint(50, 300)):
        engine, _ = make(chunk_tokens=chunk_tokens, **options)
        for one, other in zip(plain, serve(engine, requests), strict=True):
            assert one.tokens == other.tokens
            assert one.finish.reason == other.finish.reason
            assert one.finish.stop_id == other.finish.stop_id
            assert one.finish.usage.cache_bytes == other.finish.usage.cache_bytes
        spoken = engine.stats().speculation
        assert spoken.state == "on"
        assert spoken.checked[0] > spoken.accepted[0] > 0
        assert_empty(engine)


def test_right_and_wrong_proposals_all_the_way(seed: int) -> None:
    prompt = text(seed, 200)
    for right, steps in ((1.0, 1 + 100 // 2), (0.0, 100)):
        engine, model = make(snapshot_bytes=0)
        model.right = right
        done = engine.generate(ask(prompt, max_tokens=100))
        assert done.ids == answer(prompt, 100)
        spoken = engine.stats().speculation
        assert spoken.accepted == (spoken.checked if right else (0,))
        assert len(model.steps) == steps


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_short_answers(max_tokens: int, right: float, seed: int) -> None:
    prompt = text(seed, 128)
    engine, model = make(pages=2)
    model.right = right
    done = engine.generate(ask(prompt, max_tokens=max_tokens))
    assert done.ids == answer(prompt, max_tokens)
    assert done.finish.reason is FinishReason.LENGTH
    assert model.drafted[:1] == ([[128]] if max_tokens > 2 else [])


def test_every_stop_token_ends_where_it_would(seed: int) -> None:
    prompt = text(seed, 250)
    for stop in random.Random(seed).sample(range(VOCABULARY), 15):
        request = ask(prompt, max_tokens=30, stop_ids=(stop,), seed=1, temperature=1.0)
        engine, model = make(snapshot_bytes=0)
        model.right = random.Random(stop).choice([0.0, 0.5, 1.0])
        assert_same(
            make(speculate="off", snapshot_bytes=0)[0].generate(request), engine.generate(request)
        )
        assert_empty(engine)


def test_an_error_comes_after_the_tokens_before_it(seed: int) -> None:
    prompt = text(seed, 40)
    for broken in answer(prompt, 12)[3:]:
        ends = []
        for mode in ("off", "on"):
            engine, model = make(speculate=mode)
            model.broken = {broken}
            model.right = 1.0
            ends.append(serve(engine, [ask(prompt, max_tokens=12, seed=1)])[0])
            assert_empty(engine)
        assert_same(*ends)
        assert ends[0].finish.reason is FinishReason.ERROR or broken not in answer(prompt, 11)


def test_a_broken_draft_block_costs_nothing_but_time(seed: int) -> None:
    prompt = text(seed, 100)
    wanted = answer(prompt, 40)
    engine, model = make()
    model.draft_broken = True
    assert engine.generate(ask(prompt, max_tokens=40)).ids == wanted
    (checked,), (accepted,) = (
        engine.stats().speculation.checked,
        engine.stats().speculation.accepted,
    )
    assert accepted <= wanted.count(0), "it proposes 0, which is right where 0 comes"
    assert 39 - accepted - 4 <= checked <= 39 - accepted


def test_a_failing_draft_block_ends_the_requests_in_it(seed: int) -> None:
    engine, model = make()
    finished = engine.submit(ask(text(seed, 20), max_tokens=1))
    others = [engine.submit(ask(text(seed + n, 20), max_tokens=9)) for n in (1, 2)]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more memory")

    model.draft = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="no more memory"):
        engine.step()
    assert finished.finish is not None and finished.finish.reason is FinishReason.LENGTH
    for handle in others:
        assert handle.finish is not None and isinstance(handle.finish.error, BackendError)
    assert_empty(engine)


# -- prefixes


@pytest.mark.parametrize("answered", [100, 101, 102, 229])
def test_what_a_conversation_leaves_behind(answered: int, seed: int) -> None:
    """The next turn finds as many tokens as it would without speculation, at any length."""
    for prompt_tokens in (27, 28, 156):
        prompt = text(seed, prompt_tokens)
        found = []
        for mode in ("off", "on"):
            engine, _ = make(speculate=mode)
            first = engine.generate(ask(prompt, max_tokens=answered))
            turn = prompt + first.ids + text(seed + 1, 20)
            second = engine.generate(ask(turn, max_tokens=9))
            assert second.ids == answer(turn, 9)
            found.append(second.finish.usage.cached_tokens)
        whole = (prompt_tokens + answered - 1) // PAGE_TOKENS * PAGE_TOKENS
        assert found == [whole, whole]


# -- no bias


def test_sampling_is_unbiased(seed: int) -> None:
    """Three tokens of an answer, 2000 times, against their exact probabilities.

    Four ids can be drawn each time, so there are 64 answers. Most proposals are drawn from three
    of them, the likeliest left out, and are wrong or right by chance: a rule that took wrong
    ones, or drew again after them, would shift the counts.
    """
    sampling = Sampling(temperature=1.3, top_k=4, stop_ids=(), max_tokens=4)
    count, number = 2000, random.Random(seed)

    def chances(ids: list[int]) -> list[tuple[int, float]]:
        mass, found = candidates(next_logits(ids), choice_of(sampling, 0.0))
        return list(zip(found.tolist(), (mass / mass.sum()).tolist(), strict=True))

    while True:  # a prompt with an answer that is not as good as certain
        prompt = [number.randrange(VOCABULARY) for _ in range(6)]
        expected = {
            (a, b, c): p * q * r
            for a, p in chances(prompt)
            for b, q in chances([*prompt, a])
            for c, r in chances([*prompt, a, b])
        }
        if max(expected.values()) < 0.7:
            break
    engine, model = make(slots=50, pages=50, snapshot_bytes=0)
    model.right = 0.2
    requests = [
        ask(prompt, temperature=1.3, top_k=4, max_tokens=4, seed=seed + n) for n in range(count)
    ]
    seen = Counter(tuple(done.ids[:3]) for done in serve(engine, requests))
    assert set(seen) <= set(expected)
    off = deviations([seen[ids] for ids in expected], list(expected.values()))
    print(f"{off:+.1f} deviations")
    assert off < RARE
    spoken = engine.stats().speculation
    assert 0.1 < spoken.accepted[0] / spoken.checked[0] < 0.9


def test_a_hot_proposal_is_drawn_with_the_number_of_its_token(seed: int) -> None:
    """Where the draft's logits are the model's, the proposal is right at any temperature."""
    engine, model = make(snapshot_bytes=0)
    model.right = 1.0
    engine.generate(ask(text(seed, 10), temperature=2.0, seed=seed, max_tokens=100))
    assert engine.stats().speculation.accepted == engine.stats().speculation.checked == (49,)


# -- choosing


def test_choose_stops_at_the_first_proposal_that_is_wrong() -> None:
    def draw(logits_V: Tensor, index: int) -> Token:
        if logits_V.isnan().any():
            raise BackendError("not numbers")
        return Token(int(logits_V.argmax()) + 10 * index)

    def rows(*ids: int) -> list[Tensor]:
        return [
            torch.eye(10)[token] if token >= 0 else torch.full((10,), torch.nan) for token in ids
        ]

    def ids(drafts: list[int], *of_rows: int, stop: int = -1) -> tuple[list[int], bool]:
        tokens, error = choose(rows(*of_rows), drafts, draw, frozenset([stop]))
        return [token.id for token in tokens], error is not None

    assert ids([], 3) == ([3], False)
    assert ids([3], 3, 4) == ([3, 14], False)
    assert ids([2], 3, 4) == ([3], False)
    assert ids([3, 14, 25], 3, 4, 5, 6) == ([3, 14, 25, 36], False)
    assert ids([3, 15, 25], 3, 4, 5, 6) == ([3, 14], False)
    assert ids([3, 14], 3, 4, 5, stop=3) == ([3], False)
    assert ids([3, 14], 3, 4, 5, stop=14) == ([3, 14], False)
    assert ids([3, 14], 3, -1, 5) == ([3], True)
    assert ids([2, 14], 3, -1, 5) == ([3], False)
    assert choose([], [], draw, frozenset()) == ([], None)


def test_proposals_fit_into_the_step(seed: int) -> None:
    number = random.Random(seed)
    for _ in range(200):
        slots = number.randint(1, 6)
        scheduler = Scheduler(pages=1000, slots=slots, chunk_tokens=slots + number.randint(0, 9))
        for n in range(slots):
            job = Job(str(n), number.randint(1, 30), 20, drafted=number.randint(0, 3))
            job.done, job.generated = number.choice([(0, 0), (job.prompt_tokens, 1)])
            scheduler.submit(job)
        scheduler.admit(lambda job: Place.TAKEN)
        parts = scheduler.plan()
        assert sum(part.count for part in parts) <= scheduler.chunk_tokens
        assert all(part.count - part.drafted >= 1 for part in parts) and len(parts) == slots
        answers = [part for part in parts if part.start]
        for part in answers:
            assert part.count == part.rows == 1 + part.drafted <= 1 + part.job.drafted
        wanted = sum(part.job.drafted for part in answers)
        spare = scheduler.chunk_tokens - slots
        assert sum(part.drafted for part in answers) == min(wanted, spare)
        for part in parts:
            refused = number.randint(0, part.drafted)
            scheduler.commit(part, refused)
            assert part.job.done == part.start + part.count - refused


# -- whether it is done


def test_models_without_a_draft_block() -> None:
    config = tiny_config(1, num_nextn_predict_layers=0)
    model = build(config, random_tensors(config, 1))
    engine = Engine(model, pages=4, slots=1)
    assert len(engine.generate(ask([1, 2, 3], max_tokens=5)).ids) == 5
    assert engine.stats().speculation.state == "none"
    with pytest.raises(ConfigError, match="no MTP block"):
        Engine(model, pages=4, slots=1, speculate="on")
    with pytest.raises(ConfigError, match="'maybe'"):
        Engine(model, pages=4, slots=1, speculate="maybe")  # type: ignore[arg-type]


def costs(engine: Engine, monkeypatch: pytest.MonkeyPatch, checked: float) -> None:
    """Let the gate see made-up seconds: 1 for a plain step."""
    gate = engine._speculator._gate

    def told(requests: int, what: bool | None, step_s: float, draft_s: float) -> None:
        assert step_s > 0 and draft_s >= 0
        Gate.measure(gate, requests, what, checked if what else 1.0, 0.0)

    monkeypatch.setattr(gate, "measure", told)


def test_it_turns_itself_off_and_tries_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text(seed, 130)
    engine, model = make(speculate="auto", pages=50)
    costs(engine, monkeypatch, 2.5)
    done = engine.generate(ask(prompt, max_tokens=200))
    spoken = engine.stats().speculation
    assert spoken.state == "paused" and spoken.gain is not None and spoken.gain < 1
    assert 24 <= spoken.checked[0] < 40
    # It pays now, and is found to when the pause is over; the draft's window begins anew.
    costs(engine, monkeypatch, 1.1)
    model.right = 1.0
    more = engine.generate(ask(prompt + done.ids, max_tokens=400))
    assert done.ids + more.ids == answer(prompt, 600)
    spoken = engine.stats().speculation
    assert spoken.state == "on" and spoken.gain is not None and spoken.gain > 1.5
    assert spoken.checked[0] > 80
    assert_empty(engine)


def test_it_stays_on_where_it_pays(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text(seed, 130)
    engine, _ = make(speculate="auto", pages=50)
    costs(engine, monkeypatch, 1.1)
    assert engine.generate(ask(prompt, max_tokens=400)).ids == answer(prompt, 400)
    assert engine.stats().speculation.state == "on"


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_arbitrary_gates_give_the_same_answers(
    mode: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that throws dice for every step: windows with holes, proposals that get lost."""
    number = random.Random(seed)
    requests = [
        ask(text(seed + n, number.choice(EDGES)), max_tokens=number.randint(1, 150))
        for n in range(8)
    ]
    engine, model = make(speculate=mode)
    if mode == "auto":
        decide = lambda requests: number.choice([*Step, Step.CHECK])  # noqa: E731
        monkeypatch.setattr(engine._speculator._gate, "decide", decide)
    for request, done in zip(requests, serve(engine, requests), strict=True):
        assert done.ids == answer(list(request.prompt), request.sampling.max_tokens)
    assert bool(model.drafted) == (mode == "auto")
    assert_empty(engine)


# -- the true architecture


def true_model(seed: int) -> Transformer:
    config = tiny_config(seed)
    return build(config, random_tensors(config, seed))


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_true_models_give_the_same_answers(
    cache_format: CacheFormat, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected and accepted proposals across pages and compressed blocks, beside others.

    The MTP block of a random model is never right, so its proposals are replaced by the plain
    answer's tokens, and one in three of those by another.
    """
    model, number = true_model(seed), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    requests = [
        ask(
            draw_ids(model.config, tokens, generator),
            temperature=number.choice([0, 1.0]),
            seed=number.randrange(2**31),
            logprobs=5,
            max_tokens=30,
        )
        for tokens in (1, 110, 127, 128, 238, 255)
    ]

    def answers(mode: str) -> tuple[list[Completion], Engine]:
        engine = Engine(
            model,
            pages=40,
            slots=3,
            format=cache_format,
            chunk_tokens=150,
            speculate=mode,  # type: ignore[arg-type]
        )
        fill_with_nan(engine._cache)
        return serve(engine, requests), engine

    with Steady():
        plain, _ = answers("off")
        ids = {request.id: done.ids for request, done in zip(requests, plain, strict=True)}

        def guess(run: Run, logits_V: Tensor, ops: Ops) -> int:
            assert logits_V.isfinite().all(), "the draft block read what nobody wrote"
            right = ids[run.handle.request.id][run.job.generated]
            return right if number.random() < 2 / 3 else number.randrange(len(logits_V))

        monkeypatch.setattr(room, "_guess", guess)
        checked, engine = answers("on")
    for request, one, other in zip(requests, plain, checked, strict=True):
        if request.sampling.greedy or cache_format is CacheFormat.WIDE:
            assert_close(one, other, cache_format)
    spoken = engine.stats().speculation
    assert 0 < spoken.accepted[0] < spoken.checked[0]
    assert_empty(engine)


@pytest.mark.parametrize("prompt_tokens", [3, 127, 128, 129, 300])
def test_proposals_are_those_of_the_block_over_the_whole_text(
    prompt_tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it sees a window only, and from its own position 0, changes no proposal."""
    model = true_model(seed)
    seen: dict[int, Tensor] = {}
    guess = room._guess

    def watch(run: Run, logits_V: Tensor, ops: Ops) -> int:
        seen[len(run.ids)] = logits_V
        return guess(run, logits_V, ops)

    monkeypatch.setattr(room, "_guess", watch)
    engine = Engine(
        model, pages=4, slots=1, format=CacheFormat.WIDE, chunk_tokens=100, speculate="on"
    )
    prompt = draw_ids(model.config, prompt_tokens, torch.Generator().manual_seed(seed))
    with Steady(), torch.no_grad():
        ids = prompt + engine.generate(ask(prompt, max_tokens=20)).ids
        cache = cache_room(model.config, len(ids), CacheFormat.WIDE, slots=1)
        batch = Batch.of([(start(cache, len(ids)), ids[:-1])], cache, "none")
        streams = model(batch, cache).streams
        expected, _ = model.draft(streams, torch.tensor(ids[1:]), cache, batch.spans)
    assert min(seen) == prompt_tokens + 1 and len(seen) > 8
    for length, logits_V in seen.items():
        assert distance(logits_V, expected[length - 2]) < 1e-4


def test_rows_of_a_batch(seed: int) -> None:
    """Several last rows of a sequence, none of another: those of all."""
    model = true_model(seed)
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = [draw_ids(config, n, generator) for n in (5, 3, 9)]

    def logits(wanted: Any) -> Tensor:
        cache = cache_room(config, 16, CacheFormat.WIDE, slots=3)
        parts = [(start(cache, 16), some) for some in ids]
        with torch.no_grad():
            return model(Batch.of(parts, cache, wanted), cache).logits

    every = logits("all")
    assert distance(logits([2, 0, 3]), every[[3, 4, 14, 15, 16]]) < 1e-5
    assert distance(logits([1, 1, 1]), logits("last")) < 1e-5


class Noted:
    """Stands where Choices does: tells the text whose last token a packed row is."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.rows: list[int] = []

    def expect(self, rows: list[int]) -> None:
        self.rows = rows

    def of(self, row: int, tokens: int) -> tuple[int, ...]:
        assert row in self.rows, "it was not told of this row before"
        text = tuple(self.model.texts[row])
        assert len(text) == tokens
        return text


def test_choices_are_those_of_the_last_token_that_counted(seed: int) -> None:
    """A refused proposal behind the last token leaves nothing, whatever ended the answer."""
    draw = random.Random(seed)
    for _ in range(30):
        engine, model = make()
        engine._choices = Noted(model)  # type: ignore[assignment]
        prompt = text(draw.randrange(10**9), draw.randrange(1, 40))
        stop = (draw.randrange(VOCABULARY),)
        asked = ask(prompt, max_tokens=draw.randrange(1, 30), stop_ids=stop)
        (done,) = serve(engine, [replace(asked, choices=True)])
        read = done.ids if done.finish.reason is FinishReason.STOP else done.ids[:-1]
        found: Any = done.finish.chosen
        assert found == (*prompt, *read), done.finish.reason
