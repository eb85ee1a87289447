"""The engine over a model that notices every mix-up: answers, endings, sharing, errors, leaks."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overleap.cache.layout import CacheFormat
from overleap.engine import engine as room
from overleap.engine.engine import Engine
from overleap.engine.request import (
    Completion,
    Event,
    Finish,
    FinishReason,
    Handle,
    Progress,
    Request,
    Sampling,
    Token,
)
from overleap.errors import BackendError, CapacityError, ConfigError, RequestError
from tests.engine.fake import CONFIG, FakeModel, answer, poison

SNAPSHOT = room.layout.snapshot_bytes(CONFIG, CacheFormat.WIDE)
GREEDY = Sampling(temperature=0, max_tokens=6, stop_ids=())


def make(pages: int = 24, **options: Any) -> tuple[Engine, FakeModel]:
    model = FakeModel()
    options = {"slots": 4, "chunk_tokens": 200, "speculate": "off"} | options
    engine = Engine(model, pages=pages, format=CacheFormat.WIDE, **options)  # type: ignore[arg-type]
    poison(engine._cache)
    return engine, model


def text(seed: int, tokens: int) -> list[int]:
    number = random.Random(seed)
    return [number.randrange(CONFIG.vocab_size) for _ in range(tokens)]


def greedy(prompt: list[int], count: int = 6, **options: Any) -> Request:
    return Request(
        prompt=prompt,
        sampling=Sampling(temperature=0, max_tokens=count, stop_ids=(), **options),
    )


def drain(engine: Engine) -> None:
    while engine.step():
        pass


def tokens_of(handle: Handle) -> list[int]:
    return [event.id for event in handle.events if isinstance(event, Token)]


def assert_empty(engine: Engine) -> None:
    """Nothing is held once the prefixes are let go of."""
    engine._prefix.clear()
    stats = engine.stats()
    assert stats.pages_free == stats.pages and stats.running == stats.waiting == 0
    assert engine._cache.slots_free == engine._cache.slots
    assert stats.cache_bytes == 0 and not engine._runs


# -- answers


@pytest.mark.parametrize("chunk_tokens", [4, 127, 128, 1000])
@pytest.mark.parametrize("prompt_tokens", [1, 127, 128, 129, 700])
def test_an_answer_follows_from_its_prompt(
    prompt_tokens: int, chunk_tokens: int, seed: int
) -> None:
    engine, _ = make(chunk_tokens=chunk_tokens)
    prompt = text(seed, prompt_tokens)
    done = engine.generate(greedy(prompt, 140))
    assert done.ids == answer(prompt, 140)
    assert done.finish.reason is FinishReason.LENGTH
    assert done.finish.usage.prompt_tokens == prompt_tokens
    assert done.finish.usage.generated_tokens == 140
    assert_empty(engine)


def test_events_come_in_order(seed: int) -> None:
    engine, _ = make(chunk_tokens=100, snapshot_bytes=0)
    handle = engine.submit(greedy(text(seed, 250), 3))
    events: list[Event] = list(engine.stream(handle))
    assert events[:4] == [Progress(done, 250, 0) for done in (0, 100, 200, 250)]
    assert [type(event) for event in events[4:]] == [Token, Token, Token, Finish]
    assert handle.finish is events[-1]
    assert list(engine.stream(handle)) == [], "all events were taken"


def test_batched_is_alone(seed: int) -> None:
    prompts = [text(seed + n, 40 + 97 * n) for n in range(7)]
    engine, model = make(pages=60, slots=5)
    handles = [engine.submit(greedy(prompt, 20)) for prompt in prompts]
    drain(engine)
    assert max(map(len, model.steps)) == 5
    for handle, prompt in zip(handles, prompts, strict=True):
        assert tokens_of(handle) == answer(prompt, 20)
    stats = engine.stats()
    assert stats.finished == 7 and stats.generated_tokens == 140
    assert stats.read_tokens == sum(map(len, prompts)) and stats.hit_tokens == 0
    assert stats.prefill_s > 0 and stats.decode_s > 0
    assert_empty(engine)


def test_the_peak_is_what_was_held_while_it_ran(seed: int) -> None:
    engine, _ = make(snapshot_bytes=0)
    done = engine.generate(greedy(text(seed, 500), 1))
    stats = engine.stats()
    assert stats.cache_bytes == 0
    assert stats.peak_cache_bytes == done.finish.usage.cache_bytes
    assert stats.peak_cache_bytes == room.layout.cache_bytes(CONFIG, 501, CacheFormat.WIDE).total
    assert stats.peak_process_bytes is None or stats.peak_process_bytes > 2**20


def test_seeds_repeat_and_batches_do_not_matter(seed: int) -> None:
    hot = Sampling(temperature=1.5, seed=seed, max_tokens=30, stop_ids=(), logprobs=2)
    prompt = text(seed, 50)
    alone = make()[0].generate(Request(prompt=prompt, sampling=hot))
    engine, _ = make(chunk_tokens=7, slots=7)
    for n in range(5):
        engine.submit(Request(prompt=text(n, 30 + n), sampling=Sampling(max_tokens=9 + n)))
    busy = engine.generate(Request(prompt=prompt, sampling=hot))
    assert busy.tokens == alone.tokens and alone.finish.seed == seed
    assert all(len(token.top_logprobs) == 2 for token in alone.tokens)


def test_a_drawn_seed_is_told_and_repeats(seed: int) -> None:
    engine, _ = make()
    hot = Sampling(temperature=1.5, max_tokens=30, stop_ids=())
    first, second = (engine.generate(Request(prompt=text(seed, 9), sampling=hot)) for _ in "ab")
    assert first.ids != second.ids and first.finish.seed != second.finish.seed
    again = Sampling(temperature=1.5, max_tokens=30, stop_ids=(), seed=first.finish.seed)
    assert engine.generate(Request(prompt=text(seed, 9), sampling=again)).ids == first.ids


# -- endings


def test_stop_ids_end_an_answer_and_are_not_part_of_it(seed: int) -> None:
    prompt = text(seed, 10)
    wanted = answer(prompt, 12)
    stop = wanted[5]
    first = wanted.index(stop)
    engine, _ = make()
    sampling = Sampling(temperature=0, max_tokens=12, stop_ids=(stop, CONFIG.vocab_size - 1))
    done = engine.generate(Request(prompt=prompt, sampling=sampling))
    if (last := CONFIG.vocab_size - 1) in wanted[:first]:
        stop, first = last, wanted.index(last)
    assert done.ids == wanted[:first]
    assert (done.finish.reason, done.finish.stop_id) == (FinishReason.STOP, stop)
    assert done.finish.usage.generated_tokens == first + 1
    assert_empty(engine)


def test_the_models_end_of_sequence_stops_unless_told_otherwise(seed: int) -> None:
    number = random.Random(seed)
    while True:  # a prompt whose answer holds the end of sequence within a few tokens
        prompt = [number.randrange(CONFIG.vocab_size) for _ in range(5)]
        wanted = answer(prompt, 8)
        if CONFIG.eos_token_id in wanted:
            break
    engine, _ = make()
    done = engine.generate(Request(prompt=prompt, sampling=Sampling(temperature=0, max_tokens=8)))
    assert done.ids == wanted[: wanted.index(CONFIG.eos_token_id)]
    assert done.finish.stop_id == CONFIG.eos_token_id
    assert engine.generate(greedy(prompt, 8)).ids == wanted


def test_abort_frees_everything_at_any_moment(seed: int) -> None:
    """Waiting, reading, answering, finished: one Finish each, and the others do not notice."""
    for steps in range(12):
        engine, _ = make(pages=12, slots=2, chunk_tokens=90)
        prompts = [text(seed + n, 300) for n in range(3)]
        handles = [engine.submit(greedy(prompt)) for prompt in prompts]
        for _ in range(steps):
            engine.step()
        victim = handles[steps % 3]
        engine.abort(victim)
        engine.abort(victim)
        drain(engine)
        for handle, prompt in zip(handles, prompts, strict=True):
            assert sum(isinstance(event, Finish) for event in handle.events) == 1
            assert handle.finish is handle.events[-1]
            if handle is victim and handle.finish.reason is FinishReason.ABORT:
                assert tokens_of(handle) == answer(prompt, 6)[: len(tokens_of(handle))]
            else:
                assert tokens_of(handle) == answer(prompt, 6)
        assert_empty(engine)


def test_leaving_a_stream_aborts_the_request(seed: int) -> None:
    engine, _ = make()
    handle = engine.submit(greedy(text(seed, 300), 50))
    for event in engine.stream(handle):
        if isinstance(event, Token):
            break
    # The generator is closed when the loop drops it.
    assert handle.finish is not None and handle.finish.reason is FinishReason.ABORT
    assert_empty(engine)


# -- sharing


def test_a_second_question_reads_its_tail_only(seed: int) -> None:
    engine, model = make(pages=60, chunk_tokens=300)
    document, one, two = text(seed, 1500), text(seed + 1, 20), text(seed + 2, 30)
    first = engine.generate(greedy(document + one))
    assert first.finish.usage.cached_tokens == 0
    model.steps.clear()
    second = engine.generate(greedy(document + two))
    assert second.ids == answer(document + two, 6)
    assert second.finish.usage.cached_tokens == 1500 // 128 * 128
    assert sum(map(sum, model.steps)) == 1530 - 1408 + 5
    assert engine.stats().hit_tokens == 1408
    assert_empty(engine)


def test_the_same_prompt_again_computes_at_least_its_last_token(seed: int) -> None:
    for tokens, cached in ((1, 0), (128, 0), (129, 128), (256, 128), (300, 256)):
        engine, _ = make()
        prompt = text(seed, tokens)
        for expected in (0, cached):
            done = engine.generate(greedy(prompt, 2))
            assert done.ids == answer(prompt, 2)
            assert done.finish.usage.cached_tokens == expected
        assert_empty(engine)


def test_a_prompt_goes_on_from_where_an_answer_ended(seed: int) -> None:
    engine, _ = make()
    prompt = text(seed, 100)
    reply = engine.generate(greedy(prompt, 200)).ids
    turn = prompt + reply + text(seed + 1, 20)
    done = engine.generate(greedy(turn))
    assert done.ids == answer(turn, 6)
    assert done.finish.usage.cached_tokens == 256
    assert_empty(engine)


def test_prompts_that_part_early_leave_a_snapshot_there(seed: int) -> None:
    """The first reads all, the second finds nothing usable but sees where they part."""
    engine, _ = make(pages=60)
    shared = text(seed, 700)
    prompts = [shared + text(seed + n, 400) for n in (1, 2, 3)]
    cached = [engine.generate(greedy(p)).finish.usage.cached_tokens for p in prompts]
    assert cached == [0, 0, 640]
    assert_empty(engine)


def test_questions_asked_at_once_read_the_document_once(seed: int) -> None:
    engine, _ = make(pages=60, slots=4, chunk_tokens=100)
    document = text(seed, 1300)
    prompts = [document + text(seed + n, 200) for n in range(1, 5)]
    stranger = text(seed + 9, 50)
    handles = [engine.submit(greedy(p)) for p in (*prompts, stranger)]
    for _ in range(3):
        engine.step()
    assert handles[-1].finish is None and len(handles[-1].events) > 1, "a stranger passes"
    drain(engine)
    for handle, prompt in zip(handles, (*prompts, stranger), strict=True):
        assert tokens_of(handle) == answer(prompt, 6)
    cached = [handle.finish.usage.cached_tokens for handle in handles if handle.finish]
    assert cached == [0, 1280, 1280, 1280, 0]
    assert_empty(engine)


def test_nobody_waits_for_a_reader_who_has_passed(seed: int) -> None:
    """Once the shared part is read without a snapshot at its end, waiting would win nothing."""
    engine, _ = make(pages=60, chunk_tokens=100)
    document = text(seed, 1300)
    engine.submit(greedy(document))
    for _ in range(5):
        engine.step()
    late = engine.submit(greedy(document[:300] + text(seed + 1, 50)))
    engine.step()
    assert late.events, "it was admitted"
    drain(engine)
    assert tokens_of(late) == answer(list(late.request.prompt), 6)


def test_a_reader_that_is_aborted_does_not_hold_up_those_behind(seed: int) -> None:
    engine, _ = make(pages=60, chunk_tokens=100)
    document = text(seed, 1300)
    first, second = (engine.submit(greedy(document + text(seed + n, 9))) for n in (1, 2))
    for _ in range(5):
        engine.step()
    engine.abort(first)
    drain(engine)
    assert tokens_of(second) == answer(list(second.request.prompt), 6)
    assert_empty(engine)


def test_sharing_can_be_switched_off_and_kept_apart(seed: int) -> None:
    prompt = text(seed, 300)
    off, _ = make(snapshot_bytes=0)
    salted, _ = make()
    for engine, salts in ((off, ("", "")), (salted, ("a", "b"))):
        for salt in salts:
            done = engine.generate(Request(prompt=prompt, sampling=GREEDY, salt=salt))
            assert done.finish.usage.cached_tokens == 0 and done.ids == answer(prompt, 6)
    assert off.stats().pages_free == off.stats().pages


def test_a_chunk_that_ends_on_a_page_is_no_reason_for_a_snapshot(seed: int) -> None:
    engine, _ = make(chunk_tokens=128)
    engine.generate(greedy(text(seed, 1000)))
    assert engine._prefix.snapshot_bytes == SNAPSHOT


def test_snapshots_are_kept_now_and_then_while_reading(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.layout, "SNAPSHOT_TOKENS", 256)
    engine, _ = make(chunk_tokens=1000)
    prompt = text(seed, 1000)
    engine.generate(greedy(prompt))
    assert engine._prefix.snapshot_bytes == 4 * SNAPSHOT
    other = prompt[:600] + text(seed + 1, 100)
    done = engine.generate(greedy(other))
    assert done.ids == answer(other, 6) and done.finish.usage.cached_tokens == 512


def test_the_document_in_use_is_not_the_one_to_go(seed: int) -> None:
    engine, _ = make(snapshot_bytes=2 * SNAPSHOT)
    used, idle, new = (text(seed + n, 150) for n in range(3))
    for prompt in (used, idle, used, new):
        engine.generate(greedy(prompt))
    cached = [engine.generate(greedy(p)).finish.usage.cached_tokens for p in (used, idle)]
    assert cached == [128, 0]


def test_prefixes_make_room_for_requests(seed: int) -> None:
    """Ten documents through a cache that holds two, then the last one again."""
    engine, _ = make(pages=10)
    for n in range(10):
        assert engine.generate(greedy(text(seed + n, 550))).ids == answer(text(seed + n, 550), 6)
    done = engine.generate(greedy(text(seed + 9, 550)))
    assert done.ids == answer(text(seed + 9, 550), 6)
    assert done.finish.usage.cached_tokens == 512
    assert engine.generate(greedy(text(seed, 1200), 80)).ids == answer(text(seed, 1200), 80)
    assert_empty(engine)


# -- errors


def test_what_can_never_be_answered_is_refused_at_once(seed: int) -> None:
    engine, _ = make(pages=4)
    with pytest.raises(CapacityError, match="need 5 cache pages, the cache has 4"):
        engine.submit(greedy(text(seed, 510)))
    with pytest.raises(RequestError, match="the vocabulary has 40"):
        engine.submit(greedy([40]))
    with pytest.raises(RequestError, match="the model has 4096"):
        engine.submit(greedy([1] * 4096, 1))
    handle = engine.submit(greedy([1]))
    with pytest.raises(RequestError, match="is being served"):
        engine.submit(handle.request)
    drain(engine)
    engine.submit(handle.request)
    drain(engine)
    assert_empty(engine)


def test_broken_logits_end_one_request_only(seed: int) -> None:
    engine, model = make()
    prompts = [[5, 6, 7], [1, 2, 3], text(seed, 200)]
    prompts[2][-1] = 8
    model.broken = {3}
    handles = [engine.submit(greedy(prompt, 1)) for prompt in prompts]
    drain(engine)
    assert [h.finish.reason for h in handles if h.finish] == ["length", "error", "length"]
    assert handles[1].finish is not None
    assert isinstance(handles[1].finish.error, BackendError)
    with pytest.raises(BackendError, match="nan"):
        engine.generate(greedy([9, 3]))
    assert_empty(engine)


def test_a_broken_prompt_that_is_scored_ends_alone(seed: int) -> None:
    engine, model = make()
    model.broken = {3}
    other = engine.submit(greedy([5, 6, 7], 4))
    scored = engine.submit(greedy([1, 3, 2], 4, prompt_logprobs=0))
    drain(engine)
    assert other.finish is not None and other.finish.reason is FinishReason.LENGTH
    assert scored.finish is not None and isinstance(scored.finish.error, BackendError)
    assert_empty(engine)


def test_what_is_refused_while_it_is_submitted_leaves_nothing(seed: int) -> None:
    engine, _ = make()
    handle = engine.submit(greedy([5, 6, 7], 2))
    with pytest.raises(UnicodeEncodeError):
        engine.submit(Request(prompt=text(seed, 300), salt="\ud800", sampling=GREEDY))
    drain(engine)
    assert len(tokens_of(handle)) == 2
    assert_empty(engine)


@pytest.mark.parametrize("error", [CapacityError("no"), RuntimeError("out of memory")])
def test_a_failure_while_it_is_let_in_ends_it_alone(
    error: Exception, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make()
    running = engine.submit(greedy(text(seed, 10), 5))
    assert engine.step()
    engine.generate(greedy(prompt := text(seed + 1, 300), 1))
    free = engine.stats().pages_free

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine._cache, "restore", fail)
        broken = engine.submit(greedy(prompt, 1))
        if isinstance(error, CapacityError):
            engine.step()
        else:
            with pytest.raises(RuntimeError):
                engine.step()
    assert broken.finish is not None and broken.finish.reason is FinishReason.ERROR
    assert engine.stats().pages_free >= free - 1  # of the answer that goes on
    drain(engine)
    assert running.finish is not None and running.finish.reason is FinishReason.LENGTH
    assert_empty(engine)


def test_a_request_whose_pages_cannot_be_had_ends_alone(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make()
    reserve = engine._cache.reserve

    def refuse(sequence: Any, length: int) -> None:
        if length == 50:
            raise CapacityError("no")
        reserve(sequence, length)

    monkeypatch.setattr(engine._cache, "reserve", refuse)
    handles = [engine.submit(greedy(text(seed + n, 49 + n))) for n in range(3)]
    drain(engine)
    assert [h.finish.reason for h in handles if h.finish] == ["length", "error", "length"]
    assert_empty(engine)


@pytest.mark.parametrize(
    "error", [CapacityError("no memory"), ValueError("a bug"), KeyboardInterrupt()]
)
def test_a_failed_step_ends_its_requests_and_no_others(error: BaseException, seed: int) -> None:
    engine, model = make(slots=2, chunk_tokens=300)
    handles = [engine.submit(greedy(text(seed + n, 250))) for n in range(3)]
    engine.step()
    model.fail = error
    if isinstance(error, CapacityError):
        assert engine.step()
    else:
        with pytest.raises(type(error)):
            engine.step()
    model.fail = None
    for handle in handles[:2]:
        assert handle.finish is not None and handle.finish.reason is FinishReason.ERROR
        known = handle.finish.error
        assert known is error or (
            isinstance(known, BackendError) and type(error).__name__ in known.message
        )
    drain(engine)
    assert tokens_of(handles[2]) == answer(text(seed + 2, 250), 6)
    again = engine.generate(greedy(text(seed, 250)))
    assert again.ids == answer(text(seed, 250), 6), "nothing half-written is shared"
    assert_empty(engine)


def test_memory_becomes_pages() -> None:
    model: Any = FakeModel()
    page = room.layout.page_bytes(CONFIG, CacheFormat.WIDE)
    slots = 3 * room.layout.slot_bytes(CONFIG, CacheFormat.WIDE).total
    for spare, pages in ((0, 7), (page - 1, 7), (page, 8)):
        memory = slots + 7 * page + spare
        engine = Engine(model, memory_bytes=memory, slots=3, format=CacheFormat.WIDE)
        assert engine.stats().pages == pages
        assert memory - page < engine.stats().allocated_bytes <= memory
    with pytest.raises(CapacityError, match=f"needs {slots + page} bytes, {slots} are given"):
        Engine(model, memory_bytes=slots, slots=3, format=CacheFormat.WIDE)
    with pytest.raises(ConfigError, match="both given"):
        Engine(model, memory_bytes=2**20, pages=3)


# -- everything at once


@settings(max_examples=40)
@given(data=st.data())
def test_any_mix_of_requests(data: st.DataObject) -> None:
    """Texts that share beginnings, late arrivals, aborts, small caches: every answer is right."""
    engine, _ = make(
        pages=data.draw(st.integers(6, 16)),
        slots=data.draw(st.integers(1, 4)),
        chunk_tokens=data.draw(st.integers(4, 300)),
        snapshot_bytes=data.draw(st.sampled_from([0, 120_000, 10**9])),
    )
    handles: list[Handle] = []
    for _ in range(data.draw(st.integers(1, 8))):
        family, shared, own = (data.draw(st.integers(0, top)) for top in (1, 500, 150))
        prompt = text(family, shared) + text(len(handles) + 10, own + 1)
        handles.append(engine.submit(greedy(prompt, data.draw(st.integers(1, 8)))))
        for _ in range(data.draw(st.integers(0, 6))):
            engine.step()
        if data.draw(st.integers(0, 4)) == 0:
            engine.abort(handles[data.draw(st.integers(0, len(handles) - 1))])
    drain(engine)
    for handle in handles:
        assert handle.finish is not None
        ids = tokens_of(handle)
        if handle.finish.reason is FinishReason.ABORT:
            assert len(ids) < handle.request.sampling.max_tokens
        else:
            assert handle.finish.reason is FinishReason.LENGTH
            assert len(ids) == handle.request.sampling.max_tokens
        assert ids == answer(list(handle.request.prompt), len(ids))
    assert_empty(engine)


def test_a_short_answer_does_not_wait_for_one_that_may_get_long(seed: int) -> None:
    engine, _ = make(pages=8)
    long = engine.submit(greedy(text(seed, 200), 8 * 128 - 200))
    engine.step()
    short = engine.submit(greedy(text(seed + 1, 100)))
    while short.finish is None:
        engine.step()
    assert long.finish is None and len(tokens_of(long)) < 20
    assert tokens_of(short) == answer(text(seed + 1, 100), 6)
    drain(engine)
    assert tokens_of(long) == answer(text(seed, 200), 8 * 128 - 200)
    assert_empty(engine)


@pytest.mark.parametrize("snapshot_bytes", [0, 10**9])
def test_all_that_grow_get_their_pages_and_finish(snapshot_bytes: int, seed: int) -> None:
    """More is promised than the cache has, answers end where they like, some are aborted."""
    draw = random.Random(seed)
    pages = draw.randint(5, 8)
    engine, _ = make(pages, slots=5, snapshot_bytes=snapshot_bytes, speculate="on")
    # Both cannot have all that they may ask for, and neither ends before it asks for too much.
    handles = [engine.submit(greedy(text(seed, 200), pages * 128 - 200))]
    handles += [engine.submit(greedy(text(seed + 1, 20), (pages - 2) * 128 - 20))]
    coming, promised, held_up = 16, 0, 0
    while engine.step() or coming:
        running = engine._scheduler.running
        promised = max(promised, sum(job.pages for job in running))
        held_up += any(job.held_up for job in running)
        if coming and draw.random() < 0.05:
            coming -= 1
            shared = text(seed, draw.choice([0, 128, 200]))
            prompt = shared + text(seed + 9 + coming, draw.randint(1, 200))
            most = draw.choice([1, 40, pages * 128 - len(prompt)])
            stops = (draw.randrange(CONFIG.vocab_size),)
            sampling = Sampling(temperature=0, max_tokens=most, stop_ids=stops)
            handles.append(engine.submit(Request(prompt=prompt, sampling=sampling)))
        if len(handles) > 2 and draw.random() < 0.002:
            engine.abort(draw.choice(handles[2:]))
    assert promised > pages and held_up, "the cache was never short of pages"
    for handle in handles:
        assert handle.finish is not None and handle.finish.error is None
        ids = tokens_of(handle)
        assert ids == answer(list(handle.request.prompt), len(ids))
        if handle.finish.reason is FinishReason.LENGTH:
            assert len(ids) == handle.request.sampling.max_tokens
    assert_empty(engine)


def test_completion_is_the_events_put_together(seed: int) -> None:
    engine, _ = make()
    prompt = text(seed, 30)
    done = engine.generate(greedy(prompt, 4, logprobs=1))
    assert isinstance(done, Completion) and len(done.tokens) == 4
    for token in done.tokens:
        assert token.logprob is not None
        assert token.top_logprobs == ((token.id, token.logprob),)
    assert torch.is_grad_enabled()
