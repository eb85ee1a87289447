"""Planted facts: sentences hidden in a long text, the questions about them, and the score.

Not a model runner: the caller asks the questions. The training room builds its rows from the same
sentences. Read next: tasks.py, train/data.py, bundled/mini/MODEL_CARD.md (what it can do).
"""

import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overleap.errors import RequestError

# Every word below is one token of the bundled tokenizer when a space stands before it.
_VALUES = {
    "color": "red blue green yellow purple orange brown black white silver crimson violet pink "
    "gray teal beige amber scarlet indigo turquoise",
    "animal": "horse tiger rabbit camel wolf otter badger donkey zebra panda monkey beaver "
    "leopard hamster goat squirrel giraffe elephant turtle dolphin",
    "city": "Paris London Berlin Madrid Lisbon Vienna Prague Dublin Oslo Athens Cairo Tokyo "
    "Beijing Moscow Sydney Toronto Chicago Boston Havana Lima",
    "metal": "gold copper iron zinc nickel lead platinum titanium mercury cobalt chrome bronze "
    "brass steel tungsten aluminum uranium lithium pewter tin",
    "fruit": "apple banana cherry mango lemon peach plum grape melon papaya apricot fig kiwi "
    "coconut pear lime guava quince raspberry pineapple",
    "tool": "hammer chisel saw wrench drill shovel pliers axe rake ladder anvil lathe spade "
    "trowel crowbar mallet tongs sickle plough pulley",
    "month": "January February March April June July August September October November December "
    "spring summer autumn winter Easter Christmas Ramadan Diwali midsummer",
    "number": "seven eight nine eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety",
    "drink": "coffee tea milk juice cider wine cocoa beer water lemonade whisky vodka rum soda "
    "brandy broth nectar espresso champagne punch",
    "instrument": "piano violin cello trumpet flute guitar harp drum banjo clarinet oboe tuba "
    "organ fiddle mandolin accordion bassoon lute zither saxophone",
    "tree": "oak maple birch cedar willow pine elm palm cypress beech poplar walnut chestnut "
    "larch spruce acacia baobab sequoia hazel alder",
    "flower": "rose tulip lily daisy orchid lotus iris dahlia peony poppy jasmine lavender "
    "marigold sunflower magnolia begonia carnation snowdrop daffodil thistle",
    "sport": "tennis rugby hockey cricket boxing rowing fencing cycling archery judo skiing golf "
    "polo swimming surfing wrestling karate climbing sailing chess",
    "trade": "baker tailor pilot farmer painter carpenter doctor sailor weaver miner butcher "
    "lawyer nurse poet singer plumber barber judge teacher dentist",
    "stone": "ruby diamond emerald sapphire topaz opal jade quartz granite marble slate pearl "
    "garnet onyx basalt flint agate obsidian sandstone limestone",
    "vehicle": "truck bicycle tram ferry canoe wagon sled tractor taxi train scooter balloon "
    "submarine yacht kayak helicopter motorcycle carriage barge rocket",
}
# Two attributes draw from each list of values.
_ATTRIBUTES = {
    "color": "color shade",
    "animal": "pet mascot",
    "city": "home birthplace",
    "metal": "metal coin",
    "fruit": "fruit dessert",
    "tool": "tool gift",
    "month": "season holiday",
    "number": "age score",
    "drink": "drink breakfast",
    "instrument": "instrument hobby",
    "tree": "tree garden",
    "flower": "flower emblem",
    "sport": "sport pastime",
    "trade": "trade job",
    "stone": "stone jewel",
    "vehicle": "vehicle ride",
}
ENTITIES: tuple[str, ...] = tuple(
    """
    Alice Bob Carol David Emma Frank Grace Henry Isabel Jack Karen Liam Maria Noah Olivia Peter
    Quentin Rachel Samuel Teresa Ulrich Victor Wendy Xavier Yvonne Zachary Aaron Abigail Adam
    Adele Agnes Albert Alexis Alfred Alma Amanda Amelia Amos Andrea Angela Anita Anton Ariel
    Arthur Astrid Audrey Barbara Basil Beatrice Benjamin Bernard Bertha Bianca Boris Brenda Brian
    Bridget Bruno Caleb Camilla Carlos Caroline Cecilia Cedric Charles Charlotte Chloe Clara
    Claude Clement Colin Conrad Cora Cynthia Cyrus Dagmar Daniel Daphne Deborah Dennis Diana Diego
    Dmitri Dolores Dominic Donald Doris Dorothy Douglas Edgar Edith Edmund Edward Edwin Eileen
    Elaine Eleanor Elias Elise Eliza Ellen Elmer Elsa Emil Enid Eric Ernest Esther Ethan Eugene
    Eva Evelyn Fabian Fatima Felix Fergus Fiona Flora Florence Floyd Frances Freda Frederick
    Gareth Gavin Geoffrey George Gerald Gilbert Gina Gladys Gloria Gordon Greta Gustav Gwen Hannah
    Harold Harriet Harvey Hazel Hector Heidi Helen Helga Herbert Herman Hilda Horace Howard Hubert
    Hugo Ian Ida Igor Ingrid Irene Iris Irma Isaac Ivan Ivy Jacob Jane Janet Jasper Jeremy Jerome
    Jessica Joan Joel Johanna Jonas Jordan Joseph Josephine Joshua Joyce Judith Julia Julian
    Juliet Justin Kai Karl Kate Keith Kenneth Kevin Klaus Kurt Kyle Lara Laura Laurence Leah Leila
    Lena Leo Leon Leonard Leroy Leslie Lewis Lillian Linda Lionel Lisa Lois Lorenzo Louis Louise
    Lucas Lucia Lucy Luis Luke Luther Lydia Mabel Magnus Malcolm Marcel Marcus Margaret Marina
    Mario Marion Mark Marta Martin Matilda Matthew Maud Maurice Maxwell Melissa Mercedes Michael
    Mildred Milton Mina Miranda Miriam Mohamed Molly Monica Morris Moses Muriel Myra Nadia Naomi
    Natalie Nathan Neil Nelson Nicholas Nigel Nina Nora Norman Octavia Olaf Olga Oliver Omar Oscar
    Oswald Otto Owen Pablo Pamela Patrick Paul Pauline Pearl Pedro Penelope Percy Philip Phoebe
    Pierre Priscilla Rafael Ralph Ramona Raymond Rebecca Regina Reuben Ricardo Richard Rita Robert
    Robin Roger Roland Rosa Rosalind Rowena Roy Rudolf Rufus Rupert Ruth Sabrina Sally Salma
    Sandra Sarah Saul Selma Sergei Sheila Sidney Sigrid Silas Simon Sofia Sonia Stanley Stella
    Stephen Stuart Susan Sven Sylvia Tabitha Tamara Theodore Thelma Thomas Tobias Trevor Tristan
    Ulysses Una Ursula Valentin Valerie Vera Vernon Veronica Vincent Viola Virginia Vivian
    Vladimir Wallace Walter Wanda Warren Wilfred Wilhelm William Willis Winston Yuri
    """.split()
)
VALUES: dict[str, tuple[str, ...]] = {
    attribute: tuple(_VALUES[kind].split())
    for kind, names in _ATTRIBUTES.items()
    for attribute in names.split()
}
ATTRIBUTES: tuple[str, ...] = tuple(VALUES)


@dataclass(frozen=True)
class Fact:
    """One planted fact; `depth` is where it stands in the text, from 0.0 to 1.0."""

    attribute: str
    entity: str
    value: str
    depth: float = 0.0

    @property
    def sentence(self) -> str:
        """What is planted."""
        return f"The {self.attribute} of {self.entity} is {self.value}."

    @property
    def question(self) -> str:
        """What is asked about it."""
        return f"What is the {self.attribute} of {self.entity}?"

    def is_answered_by(self, reply: str) -> bool:
        """True when the reply is the value, alone or as its first word."""
        words = re.findall(r"\w+", reply)
        return bool(words) and words[0] == self.value


@dataclass(frozen=True)
class Planted:
    """A text with facts in it, in the order in which they stand there."""

    text: str
    facts: tuple[Fact, ...]


def draw_facts(count: int, rng: random.Random, *, share: float = 0.5) -> list[Fact]:
    """Draw facts with different (attribute, entity) pairs.

    With probability `share` a fact repeats the attribute (two times in three) or the entity of an
    earlier one, so that neither word alone finds the answer.
    Raises RequestError when there are fewer than `count` pairs.
    """
    pairs = len(ATTRIBUTES) * len(ENTITIES)
    if not 0 <= count <= pairs // 2:
        raise RequestError(f"{count} facts were asked for, {pairs // 2} are the most")
    facts: list[Fact] = []
    taken: set[tuple[str, str]] = set()
    while len(facts) < count:
        attribute, entity = rng.choice(ATTRIBUTES), rng.choice(ENTITIES)
        if facts and rng.random() < share:
            earlier = rng.choice(facts)
            if rng.random() < 2 / 3:
                attribute = earlier.attribute
            else:
                entity = earlier.entity
        if (attribute, entity) not in taken:
            taken.add((attribute, entity))
            facts.append(Fact(attribute, entity, rng.choice(VALUES[attribute])))
    return facts


def plant(text: str, count: int, seed: int) -> Planted:
    """Put `count` facts between the lines of `text`, at random depths.

    The sentence takes a line of its own. Depths are independent and uniform over the lines.
    Equal arguments give an equal result. Raises RequestError when the text has too few lines.
    """
    rng = random.Random(seed)
    lines = text.splitlines(keepends=True)
    if len(lines) < count:
        raise RequestError(f"{count} facts need as many lines, the text has {len(lines)}")
    facts = draw_facts(count, rng)
    before = sorted(rng.sample(range(len(lines)), count))
    length = max(sum(map(len, lines)), 1)
    out: list[str] = []
    placed: list[Fact] = []
    written = start = 0
    for index, fact in zip(before, facts, strict=True):
        out.extend(lines[start:index])
        written += sum(map(len, lines[start:index]))
        out.append(f"{fact.sentence}\n")
        placed.append(Fact(fact.attribute, fact.entity, fact.value, round(written / length, 4)))
        start = index
    out.extend(lines[start:])
    return Planted("".join(out), tuple(placed))


def prompt(document: str, fact: Fact) -> str:
    """The user's message: the document, an empty line, the question."""
    return f"{document.rstrip()}\n\n{fact.question}"


def right(facts: Sequence[Fact], replies: Sequence[str]) -> int:
    """How many replies answer their fact."""
    return sum(fact.is_answered_by(reply) for fact, reply in zip(facts, replies, strict=True))


def stdlib_sources() -> dict[str, str]:
    """Sources of the running Python's standard library: path inside it -> text, sorted by path.

    Test suites, bundled applications and files that are mostly tables of numbers are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT & set(relative.parts[:-1]) or relative.stem.startswith("_sysconfigdata"):
            continue
        try:
            sources[relative.as_posix()] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return sources


_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3",
    "turtledemo", "encodings", "pydoc_data", "__pycache__", "_pyrepl", "_vendor",
}  # fmt: skip


def stdlib_text(seed: int | None = None, modules: Sequence[str] | None = None) -> str:
    """The sources one after another: in path order, or shuffled by `seed`; all, or `modules`."""
    sources = stdlib_sources()
    names = list(sources) if modules is None else [name for name in modules if name in sources]
    if seed is not None:
        random.Random(seed).shuffle(names)
    return "\n".join(sources[name].rstrip() + "\n" for name in names)
