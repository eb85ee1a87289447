"""Planted tasks: what is drawn, where it stands, what counts as right, and who asks."""

import random
from pathlib import Path

import pytest

from overleap.errors import OverleapError, RequestError
from overleap.eval.grid import BANDS, Asked, document, draw, grid
from overleap.eval.needle import VALUES, stdlib_text
from overleap.eval.reader import Reader
from overleap.eval.tasks import KINDS, Kind, draw_tasks


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.open("mini")


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_differ_and_hold_their_answers(kind: Kind, seed: int) -> None:
    tasks = draw_tasks(20, random.Random(seed), kind=kind, size=3)
    assert len({task.question for task in tasks}) == 20
    assert tasks == draw_tasks(20, random.Random(seed), kind=kind, size=3)
    for task in tasks:
        for word, number in zip(task.answer, task.holds, strict=True):
            assert task.sentences[number].endswith(f" {word}.")
        assert len(task.sentences) == {"fact": 1, "values": 3, "chain": 4}[kind]
        reply = " ".join(task.answer)
        assert task.is_answered_by(f" {reply}.") and task.is_answered_by(f"{reply} and more")
        assert not task.is_answered_by("") and not task.is_answered_by(f"no {reply}")


def test_a_chain_leads_from_the_asked_name_to_the_value(seed: int) -> None:
    for task in draw_tasks(10, random.Random(seed), kind="chain", size=4):
        said = {s.split(" of ")[1].split(" is ")[0]: s.split(" is ")[1] for s in task.sentences}
        name = task.question.split(" of ")[1].rstrip("?")
        for _ in range(4):
            name = said[name].removeprefix("that of ").rstrip(".")
        assert said[name].rstrip(".") == task.answer[0]
        attribute = task.question.split("the ")[1].split(" of")[0]
        assert task.answer[0] in VALUES[attribute]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(RequestError, match="no kind of task"):
        draw_tasks(1, random.Random(0), kind="other")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="300 tasks need 1200 names"):
        draw_tasks(300, random.Random(0), kind="chain", size=3)
    with pytest.raises(RequestError, match="of size 0"):
        draw_tasks(1, random.Random(0), kind="values", size=0)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_hold_every_sentence_in_its_order(reader: Reader, kind: Kind, seed: int) -> None:
    tasks = draw_tasks(6, random.Random(seed), kind=kind, size=2)
    ids, depth = document(reader, 2048, tasks, seed)
    assert 1900 <= len(ids) <= 2048
    text = reader.tokenizer.decode(ids)
    planted = {sentence for task in tasks for sentence in task.sentences}
    for task in tasks:
        at = [text.index(f"{sentence}\n") for sentence in task.sentences]
        assert at == sorted(at)
        before, whole = (
            len([line for line in part.splitlines() if line not in planted])
            for part in (text[: at[-1]], text)
        )
        assert abs(before / whole - depth[id(task)]) < 0.05  # of lines; some are joined or stripped
    with pytest.raises(RequestError, match="are needed"):
        document(reader, 2048, tasks, seed, text="short")


@pytest.mark.parametrize("kind", KINDS)
def test_no_depth_goes_unasked(reader: Reader, kind: Kind, seed: int) -> None:
    """One task ends in each band of the map, in an order that the seed draws."""
    tasks = draw_tasks(BANDS, random.Random(seed), kind=kind, size=2)
    orders, text = set(), stdlib_text(modules=["argparse.py", "datetime.py"])
    for number in range(seed, seed + 4):
        ids, depth = document(reader, 2048, tasks, number, text)
        assert (ids, depth) == document(reader, 2048, tasks, number, text)
        bands = [int(depth[id(task)] * BANDS) for task in tasks]
        assert sorted(bands) == list(range(BANDS))
        orders.add(tuple(bands))
    assert len(orders) > 1


def test_the_bundled_model_finds_facts(reader: Reader, seed: int) -> None:
    found = list(grid(reader, [1024], [seed, seed + 1]))
    assert len(found) == 16 and sum(one.right for one in found) >= 14
    assert {one.seed for one in found} == {seed, seed + 1}
    for one in found:
        assert one.right == one.reply.startswith(one.answer)


def test_the_map_is_drawn(tmp_path: Path) -> None:
    found = [
        Asked(n + i, 1, "fact", i / 8, "?", "a", "a", i % 2 == 0)
        for n in (1024, 4000)
        for i in range(8)
    ]
    path = draw(found, tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    with pytest.raises(OverleapError, match="nothing was asked"):
        draw([], tmp_path / "none.png")
