"""What the commands put on a terminal: errors, bars, tables, sizes. Talk goes to stderr.

Not here: the commands (cli.py).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from overleap.errors import OverleapError
from overleap.machine import size

talk = Console(stderr=True, highlight=False, emoji=False)


def note(text: str) -> None:
    """A quiet line of talk on stderr."""
    talk.print(text, style="dim", soft_wrap=True, markup=False)


def show_error(error: OverleapError) -> None:
    """One sentence, and a hint where there is one."""
    talk.print(Text.assemble(("error:", "bold red"), f" {error.message}"), soft_wrap=True)
    if error.hint is not None:
        talk.print(Text.assemble(("hint:", "bold"), f" {error.hint}"), soft_wrap=True)


def put_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@dataclass(frozen=True)
class Shown:
    """What put_table shows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[object, ...]]


def put_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout. Nothing is cut off: what is too wide is folded, but for ids of keys.

    Where not even figures fit whole, a terminal gets a line for each cell, and a file
    or a pipe a wider table.
    """
    console = Console(highlight=False, emoji=False)
    cells = zip(columns, *(map(str, row) for row in rows), strict=True)
    widths = [_least(*cells_of) for cells_of in cells]
    least = 1 + sum(3 + width for width in widths)
    if least > console.width and console.is_terminal:
        _put_lines(console, title, columns, rows)
        return
    console.width = max(console.width, least)
    table = Table(title=Text(title), title_justify="left")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, overflow="fold", no_wrap=column == "key", min_width=width)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def _least(column: str, *cells: str) -> int:
    """Characters that a column needs: figures are not split, of a word a few stand in a line."""
    words = [word for cell in (column, *cells) for word in cell.split()]
    whole = [word for word in words if column == "key" or word.lstrip("+-<>")[:1].isdigit()]
    return max([len(word) for word in whole] + [min(len(word), 6) for word in words], default=0)


def _put_lines(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    console.print(Text(title))
    for row in rows:
        console.print()
        for column, cell in zip(columns, row, strict=True):
            console.print(Text(f"{column}: {cell}" if column else str(cell)), soft_wrap=True)


class _Rate(ProgressColumn):
    """Units per second of a task."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields["unit"]
        if unit == "B":
            return Text("" if speed is None else f"{size(speed)}/s")
        return Text("" if speed is None else f"{speed:,.0f} {unit}/s")


class Bar:
    """A running progress bar; call it with (done, total)."""

    def __init__(self, progress: Progress, label: str, unit: str) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=None, unit=unit)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def bar(label: str, unit: str) -> Iterator[Bar]:
    """A bar with rate and time left on stderr, gone when done. unit `B` shows bytes as sizes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        _Rate(),
        TimeRemainingColumn(),
    )
    quiet = not talk.is_terminal
    with Progress(*columns, console=talk, transient=True, disable=quiet) as progress:
        yield Bar(progress, label, unit)
