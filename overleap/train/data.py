"""Text, tokenizer and samples for the bundled model: standard library sources with planted facts.

Not a general data loader: one corpus that every Python installation carries. Read next:
eval/needle.py (the facts), train/mini.py (how long and how dense the samples are).
"""

import json
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from overleap.chat.tokenizer import ASSISTANT, BOS, END_THINK, EOS, PAD, SPECIAL_TOKENS, USER
from overleap.errors import TrainingError
from overleap.eval.needle import ATTRIBUTES, ENTITIES, VALUES, Fact, draw_facts, stdlib_sources

VOCABULARY = 4096
HELD_OUT_EVERY = 16  # one source file in sixteen is never trained on


def corpus() -> tuple[list[str], list[str]]:
    """Source files of the standard library: (for training, held out), both in path order."""
    texts = list(stdlib_sources().values())
    held_out = texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    if not training or not held_out:
        raise TrainingError(f"the standard library holds {len(texts)} source files, too few")
    return training, held_out


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """Train the byte-level BPE tokenizer of 4096 tokens and write tokenizer.json.

    The merges come from the texts; the last thousand make every word of the facts one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    raw = json.loads(tokenizer.to_str())
    learned = [tuple(pair) for pair in raw["model"]["merges"]]
    fixed = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    # Fewer learned merges leave room for the words: bisect for the most that fit.
    low, high = 0, len(learned)
    while low < high:
        middle = (low + high + 1) // 2
        if fixed + len(_with_words(learned[:middle])) <= VOCABULARY:
            low = middle
        else:
            high = middle - 1
    merges = _with_words(learned[:low])
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += ["".join(pair) for pair in merges]
    names += [f"<｜place▁holder▁no▁{i}｜>" for i in range(VOCABULARY - len(names))]
    if len(set(names)) != VOCABULARY:
        raise TrainingError(f"{len(set(names))} different tokens were made, {VOCABULARY} expected")
    raw["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    raw["model"]["merges"] = [list(pair) for pair in merges]
    for token in raw["added_tokens"]:  # as released: only these three vanish from decoded text
        token["special"] = token["content"] in (BOS, EOS, PAD)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return Tokenizer.from_file(str(path))


def fact_words() -> list[str]:
    """Every word of the facts and questions, with the space that stands before it."""
    values = sorted({value for row in VALUES.values() for value in row})
    return ["What", "The", *(f" {word}" for word in (*ATTRIBUTES, *ENTITIES, *values))]


def _with_words(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges, then those that join the pieces of each fact word from left to right."""
    out = list(merges)
    ranks = {pair: i for i, pair in enumerate(out)}
    for word in fact_words():
        pieces = list(word.replace(" ", "Ġ"))  # how byte-level BPE writes a space
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            pair = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                ranks[pair] = len(ranks)
                out.append(pair)
            at = pairs.index(pair)
            pieces[at : at + 2] = ["".join(pair)]
    return out


@dataclass(frozen=True)
class Sample:
    """One document with facts and the conversation about it, as token ids.

    ids      the whole conversation, BOS to the last EOS
    answers  positions whose next token is a value: the model is asked there
    gold     for each answer, the position of the same value in the document
    """

    ids: list[int]
    answers: list[int]
    gold: list[int]


class Sampler:
    """Draws samples. Everything follows from the seed and from the order of the calls."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], seed: int) -> None:
        self._tokenizer = tokenizer
        self._lines = [text.splitlines(keepends=True) for text in texts]
        self._weights = [sum(map(len, lines)) for lines in self._lines]
        self._rng = random.Random(seed)
        self._think_end = tokenizer.token_to_id(END_THINK)

    def reseed(self, seed: int) -> None:
        """Start another reproducible series."""
        self._rng = random.Random(seed)

    def draw(
        self, length: int, facts: int, turns: int, share: tuple[float, float] = (0.3, 1.0)
    ) -> Sample:
        """A sample of at most `length` tokens (nearly that): `facts` facts, `turns` questions.

        Raises TrainingError when the facts and questions alone do not fit.
        """
        turns = min(turns, facts)
        room = length - 9 * facts - 12 * turns - 4
        if room < 0:
            raise TrainingError(
                f"{facts} facts and {turns} questions need more than {length} tokens"
            )
        planted = draw_facts(facts, self._rng, share=self._rng.uniform(*share))
        characters = int(room * 3.1)
        for _ in range(8):
            sample = self._build(self._passage(characters), planted, turns)
            if len(sample.ids) <= length:
                return sample
            characters = int(characters * 0.9 * length / len(sample.ids))
        raise TrainingError(f"no passage fits in {length} tokens with {facts} facts")

    def _passage(self, characters: int) -> list[str]:
        """Consecutive lines of about this many characters, from as many files as needed."""
        out: list[str] = []
        while characters > 0:
            lines = self._rng.choices(self._lines, self._weights)[0]
            for line in lines[self._rng.randrange(len(lines)) :]:
                if len(line) > characters:
                    return out
                out.append(line)
                characters -= len(line)
        return out

    def _build(self, passage: list[str], planted: list[Fact], turns: int) -> Sample:
        rng = self._rng
        places = sorted(rng.randrange(len(passage) + 1) for _ in planted)
        pieces: list[str] = [BOS, USER]
        start = 0
        written = len(BOS) + len(USER)
        value_at: dict[Fact, int] = {}  # character where the value begins
        for place, fact in zip(places, planted, strict=True):
            pieces.extend(passage[start:place])
            written += sum(map(len, passage[start:place]))
            value_at[fact] = written + len(fact.sentence) - len(fact.value) - 2
            pieces.append(f"{fact.sentence}\n")
            written += len(fact.sentence) + 1
            start = place
        pieces.extend(passage[start:])
        text = "".join(pieces).rstrip() + "\n\n"
        asked = rng.sample(planted, turns)
        # The document is part of the first user message; each later question is its own.
        text += USER.join(
            f"{fact.question}{ASSISTANT}{END_THINK} {fact.value}{EOS}" for fact in asked
        )
        encoding = self._tokenizer.encode(text)
        token_at = {span[0]: i for i, span in enumerate(encoding.offsets)}
        answers = [i for i, token in enumerate(encoding.ids) if token == self._think_end]
        gold = [token_at[value_at[fact]] for fact in asked]
        return Sample(encoding.ids, answers, gold)
