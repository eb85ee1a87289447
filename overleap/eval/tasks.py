"""Tasks over long texts: one fact, several values of one thing, chains of references.

What is planted, what is asked, what is right; no text and no model. The words are those of
needle.py. Read next: needle.py, train/data.py (rows of them), eval/grid.py (who asks).
"""

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from overleap.errors import RequestError
from overleap.eval.needle import ATTRIBUTES, ENTITIES, VALUES, draw_facts

Kind = Literal["fact", "values", "chain"]
KINDS: tuple[Kind, ...] = ("fact", "values", "chain")


@dataclass(frozen=True)
class Task:
    """One question and the sentences that answer it, in the order in which they are planted.

    answer  the words of the right reply
    holds   for each of them, the number of the sentence that ends with it, -1 for none
    """

    sentences: tuple[str, ...]
    question: str
    answer: tuple[str, ...]
    holds: tuple[int, ...]

    def is_answered_by(self, reply: str) -> bool:
        """True when the reply begins with the words of the answer."""
        return tuple(re.findall(r"\w+", reply)[: len(self.answer)]) == self.answer


def draw_tasks(
    count: int, rng: random.Random, *, kind: Kind = "fact", share: float = 0.5, size: int = 2
) -> list[Task]:
    """`count` tasks of one kind over different (attribute, entity) pairs.

    share  for facts: how often one repeats a word of another (needle.draw_facts)
    size   values of one thing, or references in a chain
    """
    if kind not in KINDS:
        raise RequestError(f"no kind of task is called {kind!r}", f"kinds are {', '.join(KINDS)}")
    if size < 1:
        raise RequestError(f"a task of size {size} was asked for, 1 is the least")
    most = min(map(len, VALUES.values()))
    if kind == "values" and size > most:
        raise RequestError(f"{size} values of one thing were asked for, {most} are the most")
    if kind == "fact":
        facts = draw_facts(count, rng, share=share)
        return [Task((f.sentence,), f.question, (f.value,), (0,)) for f in facts]
    made = _values if kind == "values" else _chain
    names = list(ENTITIES)
    rng.shuffle(names)
    each = 1 if kind == "values" else size + 1
    if count * each > len(names):
        raise RequestError(f"{count} tasks need {count * each} names, there are {len(names)}")
    return [made(names[i * each : (i + 1) * each], rng, size) for i in range(count)]


def _values(names: list[str], rng: random.Random, size: int) -> Task:
    attribute = rng.choice(ATTRIBUTES)
    values = tuple(rng.sample(VALUES[attribute], size))
    sentences = tuple(f"One {attribute} of {names[0]} is {value}." for value in values)
    question = f"What is each {attribute} of {names[0]}?"
    return Task(sentences, question, values, tuple(range(size)))


def _chain(names: list[str], rng: random.Random, size: int) -> Task:
    attribute = rng.choice(ATTRIBUTES)
    value = rng.choice(VALUES[attribute])
    sentences = [f"The {attribute} of {names[0]} is {value}."]
    for before, name in pairwise(names):
        sentences.append(f"The {attribute} of {name} is that of {before}.")
    question = f"What is the {attribute} of {names[-1]}?"
    return Task(tuple(sentences), question, (value,), (0,))
