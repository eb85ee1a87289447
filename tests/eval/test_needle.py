"""Planted facts: they are in the text, where they say, and only the right word answers them."""

import random

import pytest

from overleap.errors import RequestError
from overleap.eval.needle import (
    ATTRIBUTES,
    ENTITIES,
    VALUES,
    Fact,
    draw_facts,
    plant,
    prompt,
    right,
    stdlib_sources,
    stdlib_text,
)


def test_every_fact_stands_in_the_text_once_and_nothing_else_changes(seed: int) -> None:
    lines = [f"line {i}\n" for i in range(random.Random(seed).randrange(20, 400))]
    planted = plant("".join(lines), 8, seed)
    for fact in planted.facts:
        assert planted.text.count(f"{fact.sentence}\n") == 1
    left = [
        line
        for line in planted.text.splitlines(keepends=True)
        if line.rstrip("\n") not in {fact.sentence for fact in planted.facts}
    ]
    assert left == lines


def test_depths_are_in_order_and_true(seed: int) -> None:
    text = "".join(f"line {i}\n" for i in range(500))
    planted = plant(text, 8, seed)
    depths = [fact.depth for fact in planted.facts]
    assert depths == sorted(depths)
    for fact in planted.facts:
        at = planted.text.index(fact.sentence)
        assert abs(at / len(planted.text) - fact.depth) < 0.1


def test_equal_seeds_give_equal_facts_and_others_differ(seed: int) -> None:
    text = stdlib_text(seed)[:20000]
    assert plant(text, 8, seed) == plant(text, 8, seed)
    assert plant(text, 8, seed).facts != plant(text, 8, seed + 1).facts


def test_pairs_are_distinct_and_words_are_shared(seed: int) -> None:
    facts = draw_facts(200, random.Random(seed), share=0.9)
    assert len({(fact.attribute, fact.entity) for fact in facts}) == 200
    assert len({fact.attribute for fact in facts}) < 33
    assert len({fact.entity for fact in facts}) < 150
    assert all(fact.value in VALUES[fact.attribute] for fact in facts)


def test_words_of_different_roles_do_not_collide() -> None:
    values = {value for row in VALUES.values() for value in row}
    assert len(ENTITIES) == len(set(ENTITIES))
    assert not set(ATTRIBUTES) & set(ENTITIES)
    assert not set(ENTITIES) - {"Hazel", "Iris", "Pearl", "Ruby"} & values


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" red", True),
        ("red", True),
        ("red.", True),
        ("red and more", True),
        ("Red", False),
        ("redder", False),
        ("blue red", False),
        ("", False),
    ],
)
def test_only_the_value_answers(reply: str, expected: bool) -> None:
    fact = Fact("color", "Alice", "red")
    assert fact.is_answered_by(reply) is expected
    assert right([fact], [reply]) == int(expected)


def test_the_prompt_ends_with_the_question() -> None:
    fact = Fact("color", "Alice", "red")
    assert prompt("text\n\n\n", fact) == "text\n\nWhat is the color of Alice?"


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(RequestError, match="8 facts need as many lines, the text has 2"):
        plant("a\nb\n", 8, 0)
    with pytest.raises(RequestError, match="100000 facts"):
        draw_facts(100000, random.Random(0))


def test_the_library_text_is_real_and_shuffled_by_seed(seed: int) -> None:
    sources = stdlib_sources()
    assert "ast.py" in sources and not any(name.startswith("test/") for name in sources)
    assert len(stdlib_text()) > 4_000_000
    assert stdlib_text(seed) == stdlib_text(seed)
    assert stdlib_text(seed) != stdlib_text(seed + 1)
    assert stdlib_text(modules=["ast.py"]).rstrip() == sources["ast.py"].rstrip()
