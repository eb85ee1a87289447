"""Planted tasks by depth and length: who asks, what was right, and the heat map of it.

The tasks are those of tasks.py, between the lines of a real text. Read next: reader.py.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from overleap.chat.tokenizer import ASSISTANT, END_THINK, USER
from overleap.errors import OverleapError, RequestError
from overleap.eval.needle import stdlib_text
from overleap.eval.reader import Progress, Reader
from overleap.eval.tasks import Kind, Task, draw_tasks

BANDS = 8  # of depth, in the heat map


@dataclass(frozen=True)
class Asked:
    """One question: `depth` of its last sentence in the text, from 0.0 to 1.0."""

    tokens: int
    seed: int
    kind: str
    depth: float
    question: str
    answer: str
    reply: str
    right: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def document(
    reader: Reader, tokens: int, tasks: Sequence[Task], seed: int, text: str | None = None
) -> tuple[list[int], dict[int, float]]:
    """Ids of about `tokens` tokens of text with the tasks in it; depth of every task by its id().

    The text is cut into as many bands as there are tasks. One task ends in each, in shuffled order,
    so that no depth goes unasked; its earlier sentences stand anywhere before.

    text  else the standard library's sources, shuffled by the seed
    Raises RequestError when the text is too short.
    """
    rng = random.Random(f"{seed}/{tokens}")
    planted = [sentence for task in tasks for sentence in task.sentences]
    room = tokens - 32 - sum(len(reader.tokenizer.encode(one)) + 2 for one in planted)
    text = stdlib_text(seed) if text is None else text
    start = rng.randrange(max(1, len(text) - 6 * tokens))
    ids = reader.tokenizer.encode(text[start : start + 6 * tokens])[: max(room, 0)]
    if room < 1:
        raise RequestError(
            f"{len(tasks)} tasks take {tokens - room} tokens, the text has {tokens} with them",
            "a longer text, or fewer tasks",
        )
    if len(ids) < room:
        raise RequestError(f"a text of {len(ids)} tokens was found, {room} are needed")
    lines = reader.tokenizer.decode(ids).splitlines(keepends=True)
    placed: list[tuple[int, str]] = []
    depth: dict[int, float] = {}
    for band, task in enumerate(rng.sample(tasks, len(tasks))):
        first, end = (-(-edge * len(lines) // len(tasks)) for edge in (band, band + 1))
        last = rng.randrange(first, max(end, first + 1))
        depth[id(task)] = round(last / max(len(lines), 1), 4)
        earlier = sorted(rng.randrange(last + 1) for _ in task.sentences[1:])
        placed += zip((*earlier, last), task.sentences, strict=True)
    out: list[str] = []
    start = 0
    for place, sentence in sorted(placed, key=itemgetter(0)):  # equal places keep a task's order
        out += lines[start:place]
        if out and not out[-1].endswith("\n"):
            out.append("\n")
        out.append(f"{sentence}\n")
        start = place
    whole = "".join([*out, *lines[start:]]).rstrip() + "\n\n"
    tokenizer = reader.tokenizer
    return [tokenizer.bos_id, tokenizer.id_of(USER), *tokenizer.encode(whole)], depth


def grid(
    reader: Reader,
    lengths: Sequence[int],
    seeds: Sequence[int],
    *,
    kind: Kind = "fact",
    tasks: int = 8,
    size: int = 2,
    text: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Asked]:
    """Every question of every document, one document a length and seed."""
    tokenizer = reader.tokenizer
    ending = [tokenizer.id_of(ASSISTANT), tokenizer.id_of(END_THINK)]
    for length in lengths:
        for seed in seeds:
            drawn = draw_tasks(tasks, random.Random(seed), kind=kind, size=size)
            ids, depth = document(reader, length, drawn, seed, text)
            most = 4 * max(len(task.answer) for task in drawn)
            cache, sequence = reader.read(ids, 64 + most, progress)
            for task in drawn:
                reply = reader.ask(cache, sequence, tokenizer.encode(task.question) + ending, most)
                said = tokenizer.decode(reply).strip()
                right = task.is_answered_by(said)
                yield Asked(
                    len(ids), seed, kind, depth[id(task)], task.question, " ".join(task.answer),
                    said, right,
                )  # fmt: skip


def refuse_plot(path: Path) -> None:
    """OverleapError where no picture can be drawn into this file: before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OverleapError(
            f"a picture needs matplotlib, which is not there ({error})",
            "pip install overleap[plots]",
        ) from None
    folder = path.absolute().parent
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise OverleapError(f"{path} cannot be written: no file can be there")


def draw(found: Sequence[Asked], path: Path) -> Path:
    """A PNG: share of right answers by depth (down) and length (across).

    Raises OverleapError where nothing was asked, and as refuse_plot does.
    """
    if not found:
        raise OverleapError("nothing was asked, so there is nothing to draw")
    refuse_plot(path)
    from matplotlib.figure import Figure

    # Documents of one length differ by a few tokens: two significant bits name a column.
    lengths = sorted({_column(one.tokens) for one in found})
    cells: list[list[list[bool]]] = [[[] for _ in lengths] for _ in range(BANDS)]
    for one in found:
        band = min(int(one.depth * BANDS), BANDS - 1)
        cells[band][lengths.index(_column(one.tokens))].append(one.right)
    shares = [[sum(c) / len(c) if c else float("nan") for c in row] for row in cells]
    figure = Figure(figsize=(1.6 + 1.1 * len(lengths), 4.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for band, row in enumerate(cells):
        for column, cell in enumerate(row):
            axes.text(
                column, band, f"{sum(cell)}/{len(cell)}" if cell else "", ha="center", va="center"
            )
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(BANDS), [f"{(band + 0.5) / BANDS:.0%}" for band in range(BANDS)])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(f"{found[0].kind}: share of right answers")
    figure.colorbar(image)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise OverleapError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _column(tokens: int) -> int:
    """A length as people name it: rounded up to a multiple of a quarter of its power of two."""
    unit = max(1 << max(tokens.bit_length() - 3, 0), 1)
    return -(-tokens // unit) * unit
