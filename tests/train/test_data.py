"""Tokenizer and samples: facts are single tokens, and samples point at the right places."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from overleap.chat.tokenizer import SPECIAL_TOKENS
from overleap.errors import TrainingError
from overleap.train.data import VOCABULARY, Sampler, corpus, fact_words, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer(corpus()[0][:60], path)


def test_special_tokens_come_first_and_facts_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    for word in fact_words():
        assert len(tokenizer.encode(word).ids) == 1, word


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = corpus()[1][0] + "\nnaïve ünïcode 汉字 🙂\t\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("length", "facts", "turns"), [(512, 12, 12), (1000, 20, 7), (4096, 48, 48)]
)
def test_answers_point_at_their_facts(
    tokenizer: Tokenizer, seed: int, length: int, facts: int, turns: int
) -> None:
    sample = Sampler(tokenizer, corpus()[0][:40], seed).draw(length, facts, turns)
    assert len(sample.ids) <= length
    assert len(sample.answers) == len(sample.gold) == turns
    for answer, gold in zip(sample.answers, sample.gold, strict=True):
        assert sample.ids[answer + 1] == sample.ids[gold]
        assert gold < answer
        asked = tokenizer.decode(sample.ids[answer - 7 : answer - 1]).split("the ")[-1]
        told = tokenizer.decode(sample.ids[gold - 4 : gold])
        assert told.strip() == asked.replace("?", " is").strip()


def test_series_repeat_by_seed(tokenizer: Tokenizer, seed: int) -> None:
    sampler = Sampler(tokenizer, corpus()[0][:40], seed)
    first = [sampler.draw(512, 8, 8), sampler.draw(512, 8, 8)]
    sampler.reseed(seed)
    assert [sampler.draw(512, 8, 8), sampler.draw(512, 8, 8)] == first
    assert first[0] != first[1]


def test_a_sample_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TrainingError, match="need more than 128 tokens"):
        Sampler(tokenizer, corpus()[0][:3], 0).draw(128, 12, 12)


def test_held_out_files_are_not_trained_on() -> None:
    training, held_out = corpus()
    assert len(held_out) > 10
    assert not set(training) & {text for text in held_out if len(text) > 200}
