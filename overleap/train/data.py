"""Rows of tokens for a step: text from shards, planted tasks in text, conversations.

Everything follows from the recipe's seed and from the number of the row, so that a run resumes in
the middle of anything without keeping more than its step. Read next: shards.py, eval/tasks.py.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from overleap.chat.profiles import Profile
from overleap.chat.tokenizer import ASSISTANT, END_THINK, USER, Tokenizer
from overleap.errors import TrainingError
from overleap.eval.needle import ATTRIBUTES, ENTITIES, VALUES
from overleap.eval.tasks import Kind, Task, draw_tasks
from overleap.train.conversations import conversations, spoken
from overleap.train.shards import BOS_ID, EOS_ID, PAD_ID, PAGE, Shard

TRIES = 8  # passages that come out too long, before a row is given up


@dataclass(frozen=True)
class Row:
    """One row of a step: documents in whole pages, one after another.

    ids      token ids, as many as the stage's length
    counts   lengths of the documents, multiples of 128
    learn    for every position, whether its next token is learned
    answers  positions whose next token is a word of an answer
    gold     for each of them, where the same word stands in the document, or -1
    """

    ids: list[int]
    counts: list[int]
    learn: list[bool]
    answers: list[int]
    gold: list[int]


def fact_words() -> list[str]:
    """Every word of the facts and questions, with the space that stands before it."""
    values = sorted({value for row in VALUES.values() for value in row})
    return ["What", "The", "One", *(f" {word}" for word in (*ATTRIBUTES, *ENTITIES, *values))]


@dataclass(frozen=True)
class Text:
    """A window of a shard, each of them once an epoch, in an order drawn by the seed."""

    share: float = 1.0

    def row(self, shard: Shard, number: int, length: int, seed: str) -> Row:
        """The `number`-th window of `length` tokens."""
        windows = len(shard.tokens) // length
        if not windows:
            raise TrainingError(
                f"{shard.folder} has {len(shard.tokens)} tokens, a row takes {length}",
                "more text, or shorter stages",
            )
        epoch, place = divmod(number, windows)
        at = int(_order(f"{seed}/{length}/{epoch}", windows)[place]) * length
        ids, counts = shard.window(at, length)
        return Row(ids, counts, _learnable(ids, counts), [], [])


@dataclass(frozen=True)
class Tasks:
    """Planted tasks in text of a shard, and one question turn for each that is asked.

    planted, asked  tasks in a row; share, size as for draw_tasks (share: drawn from the range)
    """

    share: float = 1.0
    kind: Kind = "fact"
    planted: int = 12
    asked: int = 12
    alike: tuple[float, float] = (0.3, 1.0)
    size: int = 2


@dataclass(frozen=True)
class Chat:
    """Conversations of a JSONL file (`messages`, `tools`), loss on what the assistant says.

    Each of them once an epoch; one that is longer than a row is cut.
    """

    path: str = ""
    share: float = 1.0


Source = Text | Tasks | Chat


class Rows:
    """Draws rows of a mixture.

    shard  text for rows and passages; profile says how conversations are written
    """

    def __init__(
        self, tokenizer: Tokenizer, shard: Shard | None, seed: int, profile: Profile
    ) -> None:
        self.tokenizer, self.shard, self.seed, self.profile = tokenizer, shard, seed, profile
        self._sizes: dict[str, list[tuple[int, int]]] = {}
        self._packings: dict[tuple[str, int, str], list[list[int]]] = {}
        self._user, self._assistant, self._said = (
            tokenizer.id_of(token) for token in (USER, ASSISTANT, END_THINK)
        )

    def row(self, mixture: tuple[Source, ...], stage: int, number: int, length: int) -> Row:
        """Row `number` of a stage: each source has its share of the rows, evenly spread.

        Raises TrainingError where a row cannot be made.
        """
        source, turn = _turn(mixture, number)
        seed = f"{self.seed}/{stage}/{mixture.index(source)}"
        if isinstance(source, Text):
            return source.row(self._text(), turn, length, seed)
        if isinstance(source, Chat):
            return self._chat(source, turn, length, seed)
        return self._tasks(source, random.Random(f"{seed}/{turn}"), length)

    def _text(self) -> Shard:
        if self.shard is None:
            raise TrainingError("this mixture takes text, the run has no token folder")
        return self.shard

    def _tasks(self, source: Tasks, rng: random.Random, length: int) -> Row:
        tasks = draw_tasks(
            source.planted,
            rng,
            kind=source.kind,
            share=rng.uniform(*source.alike),
            size=source.size,
        )
        asked = rng.sample(tasks, min(source.asked, len(tasks)))
        room = length - 4 - 14 * sum(len(task.sentences) for task in tasks) - 14 * len(asked)
        if room < 0:
            raise TrainingError(
                f"{len(tasks)} tasks and {len(asked)} questions need more than {length} tokens"
            )
        for _ in range(TRIES):
            ids, answers, gold = self._woven(self._passage(rng, room), tasks, asked, rng)
            if len(ids) <= length:
                learn = _learnable(ids, [len(ids)])
                for at in answers:
                    learn[at] = False
                return _padded(ids, learn, answers, gold, length)
            room -= len(ids) - length + 8
        raise TrainingError(f"no passage fits in {length} tokens with {len(tasks)} tasks")

    def _passage(self, rng: random.Random, tokens: int) -> list[str]:
        """Lines of about this many tokens, from one place of the shard."""
        shard = self._text()
        if tokens <= 0 or len(shard.tokens) <= tokens:
            at, tokens = 0, max(min(tokens, len(shard.tokens)), 0)
        else:
            at = rng.randrange(len(shard.tokens) - tokens)
        text = self.tokenizer.decode(shard.tokens[at : at + tokens].tolist())
        return text.splitlines(keepends=True)

    def _woven(
        self, lines: list[str], tasks: list[Task], asked: list[Task], rng: random.Random
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids, positions asked, positions of their words in the text."""
        sentences = [(t, i) for t in tasks for i in range(len(t.sentences))]
        places = sorted(rng.randrange(len(lines) + 1) for _ in sentences)
        # Sentences of one task keep their order, wherever they come to stand.
        order = list(range(len(sentences)))
        rng.shuffle(order)
        waiting = {id(t): iter(range(len(t.sentences))) for t in tasks}
        ids, held = [BOS_ID, self._user], dict[tuple[int, int], int]()
        text, start = "", 0
        for place, pick in zip(places, order, strict=True):
            task = sentences[pick][0]
            number = next(waiting[id(task)])
            sentence = task.sentences[number]
            cut = sentence.rindex(" ")
            text += "".join(lines[start:place])
            if text and not text.endswith("\n"):
                text += "\n"
            # Cut before a space: a boundary that every tokenizer of this family keeps.
            ids += self.tokenizer.encode(text + sentence[:cut])
            held[id(task), number] = len(ids)
            ids += self.tokenizer.encode(sentence[cut:-1])
            text, start = ".\n", place
        text += "".join(lines[start:])
        ids += self.tokenizer.encode(text.rstrip() + "\n\n")
        answers, gold = [], []
        for turn, task in enumerate(asked):
            ids += [self._user] * (turn > 0) + self.tokenizer.encode(task.question)
            ids += [self._assistant, self._said]
            for word, sentence_number in zip(task.answer, task.holds, strict=True):
                pieces = self.tokenizer.encode(f" {word}")
                at = held.get((id(task), sentence_number), -1)
                for place in range(len(pieces)):
                    answers.append(len(ids) - 1 + place)
                    gold.append(at + place if at >= 0 else -1)
                ids += pieces
            ids.append(EOS_ID)
        return ids, answers, gold

    def _chat(self, source: Chat, number: int, length: int, seed: str) -> Row:
        """Conversations in whole pages; an epoch's rows hold each of them once."""
        talks, rows = conversations(source.path), self._packing(source.path, length, seed)
        epoch, place = divmod(number, len(rows))
        ids: list[int] = []
        learn: list[bool] = []
        counts: list[int] = []
        for pick in rows[int(_order(f"{seed}/{length}/{epoch}", len(rows))[place])]:
            said, wanted = spoken(talks[pick][1], self.tokenizer, self.profile)
            if len(said) > length:  # what follows the cut is not known
                said, wanted = said[:length], [*wanted[: length - 1], False]
            short = -len(said) % PAGE
            ids += said + [PAD_ID] * short
            learn += wanted + [False] * short
            counts.append(len(said) + short)
        if short := length - len(ids):
            counts.append(short)
            learn += [False] * short
            ids += [PAD_ID] * short
        return Row(ids, counts, learn, [], [])

    def _packing(self, path: str, length: int, seed: str) -> list[list[int]]:
        """Which conversations stand in which row: in an order drawn once, as many as fit.

        Raises TrainingError where the cut at `length` leaves nothing of one to learn.
        """
        if (path, length, seed) not in self._packings:
            sizes = self._measured(path)
            for (line, _), (_, before) in zip(conversations(path), sizes, strict=True):
                if before >= length:
                    cut = sum(size > length for size, _ in sizes)
                    raise TrainingError(
                        f"{path} line {line} has {before} tokens before the assistant speaks, "
                        f"a row takes {length}, so nothing of it is learned",
                        f"longer rows; {cut} of {len(sizes)} conversations are cut",
                    )
            rows, room = list[list[int]](), 0
            for pick in _order(f"{seed}/{length}", len(sizes)).tolist():
                size = min(-(-sizes[pick][0] // PAGE) * PAGE, length)
                if size > room:
                    rows.append([])
                    room = length
                rows[-1].append(pick)
                room -= size
            self._packings[path, length, seed] = rows
        return self._packings[path, length, seed]

    def _measured(self, path: str) -> list[tuple[int, int]]:
        """Tokens of every conversation, and how many stand before the first that is learned.

        Raises TrainingError for one that cannot be written.
        """
        if path not in self._sizes:
            sizes = []
            for line, talk in conversations(path):
                try:
                    ids, learn = spoken(talk, self.tokenizer, self.profile)
                except TrainingError as error:
                    raise TrainingError(f"{path} line {line}: {error.message}") from None
                sizes.append((len(ids), learn.index(True) + 1))
            self._sizes[path] = sizes
        return self._sizes[path]


def _turn(mixture: tuple[Source, ...], number: int) -> tuple[Source, int]:
    """Whose row this is, and how many it had before: the one that is furthest behind its share."""
    total = sum(source.share for source in mixture)
    counts = [0] * len(mixture)
    # Shares repeat after a while: a schedule of 1,000 rows stands for all of them.
    schedule = _schedule(tuple(source.share / total for source in mixture))
    cycles, place = divmod(number, len(schedule))
    whole = [schedule.count(i) * cycles for i in range(len(mixture))]
    counts = [whole[i] + schedule[:place].count(i) for i in range(len(mixture))]
    chosen = schedule[place]
    return mixture[chosen], counts[chosen]


@lru_cache
def _schedule(shares: tuple[float, ...]) -> tuple[int, ...]:
    counts = [0] * len(shares)
    out = []
    for row in range(1000):
        behind = [share * (row + 1) - count for share, count in zip(shares, counts, strict=True)]
        chosen = behind.index(max(behind))
        counts[chosen] += 1
        out.append(chosen)
    return tuple(out)


@lru_cache(maxsize=16)
def _order(seed: str, count: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.random.default_rng(list(seed.encode())).permutation(count)


def _learnable(ids: list[int], counts: Iterable[int]) -> list[bool]:
    """True where the next token is of the same document and no padding."""
    learn = [after != PAD_ID for after in ids[1:]] + [False]
    end = 0
    for count in counts:
        end += count
        learn[end - 1] = False
    return learn


def _padded(
    ids: list[int], learn: list[bool], answers: list[int], gold: list[int], length: int
) -> Row:
    short = length - len(ids)
    return Row(ids + [PAD_ID] * short, [length], learn + [False] * short, answers, gold)
