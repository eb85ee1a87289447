"""Who is read, kept and let go, on a file of small experts; what fits is never exceeded."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from overleap.checkpoint.files import Shard, Writer, read_header
from overleap.checkpoint.pages import PAGE, Extent, Pages
from overleap.checkpoint.table import Damaged, Problem
from overleap.engine.shelf import GONE, Counts, Shelf

LAYERS, EXPERTS = 3, 8


class Watched(Pages):
    """Pages that note what is in memory, and the most there ever was."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        self.there: set[int] = set()
        self.most, self.broken = 0, False

    def read(self, start: int, end: int, room: bytearray) -> None:
        if self.broken:
            raise Damaged([Problem("x.safetensors", None, "broken")])
        assert start // PAGE not in self.there, "read twice"
        self.there.add(start // PAGE)
        self.most = max(self.most, len(self.there))
        super().read(start, end, room)

    def drop(self, start: int, end: int) -> None:
        self.there.remove(start // PAGE)
        super().drop(start, end)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    count = PAGE * (LAYERS * EXPERTS + 1)
    with Writer(tmp_path / "x.safetensors", {"x": ("U8", (count,))}) as writer:
        writer.put("x", torch.zeros(count, dtype=torch.uint8))
    return Watched(Shard(read_header(tmp_path / "x.safetensors")))


@pytest.fixture
def made(watched: Watched) -> Iterator[Callable[[int], Shelf]]:
    """A shelf with room for so many experts of a page each; expert n of layer l is page 8 l + n."""
    shelves = []

    def make(room: int) -> Shelf:
        extents = [
            [(Extent(watched, PAGE * n, PAGE * (n + 1)),) for n in range(8 * k, 8 * k + 8)]
            for k in range(LAYERS)
        ]
        shelves.append(Shelf(extents, room * PAGE))
        return shelves[-1]

    yield make
    for shelf in shelves:
        shelf.close()


def run(shelf: Shelf, layer: int, chosen: list[list[int]]) -> None:
    """A layer's turn, as resident.py leads it."""
    chosen_TX = torch.tensor(chosen)
    shelf.use(layer, chosen_TX)
    for _, needed in shelf.cut(chosen_TX):
        shelf.hold(layer, needed)
    shelf.release(layer)


def settled(shelf: Shelf, done: Callable[[Counts], bool]) -> Counts:
    """The counts once the readers have come so far."""
    for _ in range(500):
        if done(shelf.counts()[0]):
            break
        time.sleep(0.01)
    return shelf.counts()[0]


def test_most_used_stay(made: Callable[[int], Shelf], watched: Watched) -> None:
    shelf = made(4)
    for _ in range(5):
        shelf.age(1)
        run(shelf, 0, [[0, 1]])
    for n in range(2, 8):  # each once: they push each other out, not those that are used often
        shelf.age(1)
        run(shelf, 0, [[n]])
    assert watched.there == {0, 1, 6, 7} and watched.most == 4
    counts, held = shelf.counts()
    assert held == 4 * PAGE
    assert (counts.kept, counts.missed, counts.ahead) == (8, 2 + 6, 0)
    assert counts.read_bytes == 8 * PAGE


def test_use_fades(made: Callable[[int], Shelf], watched: Watched) -> None:
    shelf = made(2)
    for _ in range(5):
        shelf.age(1)
        run(shelf, 0, [[0]])
    shelf.age(1000)
    run(shelf, 0, [[1]])
    shelf.age(1)
    run(shelf, 0, [[2]])
    assert watched.there == {1, 2}, "what was used often long ago makes room"


def test_of_equals_the_layer_that_comes_last_goes(
    made: Callable[[int], Shelf], watched: Watched
) -> None:
    shelf = made(3)
    shelf.age(1)
    for layer in range(LAYERS):
        run(shelf, layer, [[0]])
    shelf.age(1)
    shelf.use(0, torch.tensor([[1]]))
    shelf.hold(0, [1])
    assert watched.there == {1, 8, 16}, "layer 0 has had its turn, 1 and 2 come next"


def test_expected_are_read_and_counted(made: Callable[[int], Shelf], watched: Watched) -> None:
    shelf = made(6)
    shelf.age(1)
    shelf.expect(1, [3, 4, 5])
    assert settled(shelf, lambda c: c.read_ahead == 3).read_ahead == 3
    run(shelf, 0, [[0, 1]])
    run(shelf, 1, [[3, 4, 7]])
    counts, _ = shelf.counts()
    assert (counts.ahead, counts.right, counts.missed, counts.kept) == (2, 2, 3, 0)
    run(shelf, 1, [[3, 4]])
    counts, _ = shelf.counts()
    assert (counts.ahead, counts.kept) == (2, 2), "read ahead counts once"


def test_expected_never_push_out_what_is_needed_or_expected(
    made: Callable[[int], Shelf], watched: Watched
) -> None:
    shelf = made(4)
    shelf.age(1)
    shelf.use(0, torch.tensor([[0, 1]]))
    shelf.hold(0, [0, 1])
    shelf.expect(1, list(range(8)))
    settled(shelf, lambda c: c.read_ahead == 2)
    time.sleep(0.05)
    assert {0, 1} < watched.there and len(watched.there) == 4 == watched.most
    assert shelf.counts()[0].read_ahead == 2
    shelf.release(0)
    run(shelf, 1, [[6, 7, 5, 4]])
    assert watched.there == {12, 13, 14, 15} and watched.most == 4


def test_pieces_fit_the_room(made: Callable[[int], Shelf], watched: Watched, seed: int) -> None:
    draw, shelf = random.Random(seed), made(3)
    chosen = torch.tensor([draw.sample(range(8), 2) for _ in range(40)])
    pieces = list(shelf.cut(chosen))
    assert [p.start for p, _ in pieces] == [0, *(p.stop for p, _ in pieces[:-1])]
    assert pieces[-1][0].stop == 40 and len(pieces) > 1
    for tokens, needed in pieces:
        assert set(needed) == set(chosen[tokens].flatten().tolist()) and len(needed) <= 3
    run(shelf, 2, chosen.tolist())
    assert watched.most <= 3
    assert len(list(made(8).cut(chosen))) == 1


def test_room_is_never_exceeded(made: Callable[[int], Shelf], watched: Watched, seed: int) -> None:
    draw = random.Random(seed)
    room = draw.randint(4, 12)
    shelf = made(room)
    for _ in range(60):
        tokens = draw.choice([1, 1, 2, 9])
        shelf.age(tokens)
        for layer in range(LAYERS):
            if draw.random() < 0.7:
                shelf.expect((layer + 1) % LAYERS, draw.sample(range(8), draw.randint(1, 6)))
            run(shelf, layer, [draw.sample(range(8), 2) for _ in range(tokens)])
    counts, held = shelf.counts()
    assert watched.most <= room and held <= room * PAGE
    assert counts.right == counts.ahead <= counts.read_ahead


def test_a_file_that_fails_is_told(made: Callable[[int], Shelf], watched: Watched) -> None:
    shelf = made(4)
    watched.broken = True
    with pytest.raises(Damaged):
        run(shelf, 0, [[0, 1]])
    watched.broken = False
    shelf.age(1)
    run(shelf, 0, [[0, 1]])
    assert watched.there == {0, 1}


def test_a_guess_that_cannot_be_read_fails_nothing(
    made: Callable[[int], Shelf], watched: Watched
) -> None:
    shelf = made(4)
    run(shelf, 0, [[0, 1]])
    watched.broken = True
    shelf.expect(1, [5])
    for _ in range(500):
        if shelf._state[EXPERTS + 5] == GONE and not shelf._later:
            break
        time.sleep(0.01)
    shelf.age(1)
    run(shelf, 0, [[0, 1]])  # both are there
    with pytest.raises(Damaged):
        run(shelf, 1, [[5]])
