"""How much of a conversation is read once only: turn by turn, to the token, and in all.

Over a model that reads nothing: only who computes what counts. That the answers are right is
shown by test_engine.py and ../test_state_engine.py. Read next: tests/cache/test_prefix.py.
"""

import random
from dataclasses import replace
from typing import Any

import torch

from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.state import Cache
from overleap.engine.engine import Engine
from overleap.kernels import select
from overleap.model.transformer import Batch, Output
from tests.engine.fake import CONFIG, VOCABULARY, answer
from tests.engine.test_engine import assert_empty, greedy, make, text

TURNS = 20
PAGES = 110


class Skimmer:
    """Advances sequences and chooses tokens by their number."""

    config = replace(CONFIG, max_position_embeddings=PAGES * PAGE_TOKENS)
    device, dtype = torch.device("cpu"), torch.float32
    ops = select()
    watchers = ("the test",)
    every = torch.eye(VOCABULARY)

    def __call__(self, batch: Batch, cache: Cache) -> Output:
        for sequence, count in zip(batch.sequences, batch.spans.count, strict=True):
            sequence.length += count
        assert batch.rows is not None
        chosen = batch.spans.position_T[batch.rows] * 7 % VOCABULARY
        return Output(self.every[chosen], torch.empty(0), torch.empty(len(batch.ids_T), 1, 1))


SHORT, ANY, LONG = (20, 60), (20, 300), (250, 350)  # tokens of a turn or an answer


def converse(
    engine: Engine, number: random.Random, says: tuple[int, int], hears: tuple[int, int]
) -> tuple[int, int, int]:
    """Prompt tokens in all, those that an earlier turn had, and those found.

    The last token of an answer is chosen and never read.
    """
    past: list[int] = []
    total = before = found = 0
    for _ in range(TURNS):
        known = max(0, len(past) - 1)
        prompt = past + text(number.randrange(2**31), number.randint(*says))
        done = engine.generate(greedy(prompt, number.randint(*hears)))
        cached = done.finish.usage.cached_tokens
        assert cached == known // PAGE_TOKENS * PAGE_TOKENS
        total, before, found = total + len(prompt), before + known, found + cached
        past = prompt + done.ids
    return total, before, found


def test_a_conversation_is_read_once(seed: int) -> None:
    """All full pages are found at every turn, so at most 127 tokens a turn are read twice.

    That is 95 % of what can be found, unless all turns are short. It is less of all prompt
    tokens, 92 to 94 %, since what is new at a turn is 4 to 6 % of them.
    """
    number, model = random.Random(seed), Skimmer()
    while True:
        skimmer: Any = model
        engine = Engine(skimmer, pages=PAGES, chunk_tokens=200, speculate="off")
        total, before, found = converse(engine, number, ANY, ANY)
        print(
            f"{total} prompt tokens: found {found / total:.1%}, {found / before:.1%} of those known"
        )
        assert_empty(engine)
        if before >= 20 * TURNS * PAGE_TOKENS:
            break
    assert found >= 0.95 * before


def test_questions_and_answers_are_found_again(seed: int) -> None:
    """Short questions, long answers: of all prompt tokens 97 % on average, deviation 0.3 %."""
    skimmer: Any = Skimmer()
    engine = Engine(skimmer, pages=PAGES, chunk_tokens=200, speculate="off")
    total, before, found = converse(engine, random.Random(seed), SHORT, LONG)
    print(f"{total} prompt tokens: found {found / total:.1%}, {found / before:.1%} of those known")
    assert found >= 0.95 * total


def test_a_prompt_sent_again(seed: int) -> None:
    engine, _ = make()
    prompt = text(seed, 300)
    for cached in (0, 256, 256):
        done = engine.generate(greedy(prompt))
        assert done.ids == answer(prompt, 6) and done.finish.usage.cached_tokens == cached
