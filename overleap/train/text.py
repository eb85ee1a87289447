"""Documents out of folders, JSONL and Parquet: (name, text), in an order that repeats.

Not tokens (shards.py). HTML loses its tags, gzip is opened. What is not UTF-8 text is left out of
folders, and refused where it was named itself.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TextIO

from overleap.errors import TrainingError

PLAIN = (
    ".txt", ".rst", ".md", ".py", ".pod", ".yaml", ".toml", ".tex", ".org", ".adoc", ".csv", ".xml",
)  # fmt: skip
HTML = (".html", ".htm", ".xhtml")
PACKED = (".gz", ".dz")  # a dictd file is gzip with an index
STRAY = 1000  # a text may hold one byte in so many that is not UTF-8
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", ".git"}  # not of the folder itself
LEAST = 64  # characters: shorter texts are no documents
KINDS = f"texts end in {', '.join((*PLAIN, *HTML, '.jsonl'))}, all with .gz too, or in .parquet"


class _NoText(TrainingError):
    """Why a file is left out of a folder, and refused where it was named itself."""


def documents(paths: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Every document of every path, folders in path order: (name, text).

    A `.jsonl` line is an object with `text`; a `.parquet` row has a column of that name. In folders
    links and what is no text are left out. Raises TrainingError for a path that is not there, a
    named file that is no text, a bad line, a broken Parquet file, or when nothing is found at all.
    """
    found = 0
    for path in map(Path, paths):
        for name, text in _of_folder(path) if path.is_dir() else _of_file(path):
            if len(text) >= LEAST:
                found += 1
                yield name, text
    if not found:
        raise TrainingError("no document was found", KINDS)


def _of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        inside = {*file.relative_to(folder).parts}
        if file.is_file() and not file.is_symlink() and not _LEFT_OUT & inside:
            with suppress(_NoText):
                yield from _of_file(file)


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, or is no file")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    inner = path.with_suffix("").suffix.lower() if suffix in PACKED else suffix
    if inner not in (*PLAIN, *HTML, ".jsonl") and suffix != ".dz":
        raise _NoText(f"{path} is of no kind that is read", KINDS)
    try:
        if inner == ".jsonl":
            _refuse_strays(path, _pieces(path))
            with _opened(path) as file:
                yield from _lines(path, file)
            return
        with _opened(path) as file:
            text = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _NoText(f"{path} cannot be read: {error}") from None
    _refuse_strays(path, [text])
    yield str(path), text_of_html(text) if inner in HTML else text


def _opened(path: Path) -> TextIO:
    """The file as text, unpacked. A line ends at a line feed and nowhere else, as in JSONL."""
    if path.suffix.lower() in PACKED:
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="\n")
    return path.open("rt", encoding="utf-8", errors="replace", newline="\n")


def _pieces(path: Path) -> Iterator[str]:
    """All of the file, 65,536 characters at a time: it need not fit into memory."""
    with _opened(path) as file:
        while piece := file.read(1 << 16):
            yield piece


def _refuse_strays(path: Path, pieces: Iterable[str]) -> None:
    stray = size = 0
    for piece in pieces:
        stray += piece.count("\ufffd")
        size += len(piece)
    if stray * STRAY > size:
        raise _NoText(
            f"{path} is not UTF-8: {stray} of its {size} characters are undecodable",
            "iconv -f LATIN1 -t UTF-8 rewrites a Latin-1 file",
        )


def _lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line.removesuffix("\n"))
        except json.JSONDecodeError as error:
            raise TrainingError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise TrainingError(
                f"{path} line {number} has no string `text`",
                "conversations (`messages`) are a source of their own, not documents",
            )
        # JSON can spell halves of characters, which no UTF-8 can.
        whole = record["text"].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        yield f"{path}:{number}", whole


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise TrainingError(
            f"{path} needs pyarrow, which is not there ({error})", "pip install overleap[datasets]"
        ) from None
    number = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise TrainingError(f"{path} has columns {', '.join(names)}, no `text`")
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield f"{path}:{number}", text
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"{path} is no whole Parquet file: {error}", "write it again, or leave it out"
        ) from None


_BLOCKS = {
    "p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "br", "table",
    "section", "ul", "ol", "dl", "blockquote",
}  # fmt: skip
_SILENT = {"title", "script", "style", "nav", "footer"}


class _Stripper(HTMLParser):
    """`</head>` may be left out and end tags may be stray: no tag hides more than its own text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self.silent = self.pre = 0
        self.silent += tag in _SILENT
        self.pre += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent = max(self.silent - (tag in _SILENT), 0)
        self.pre = max(self.pre - (tag == "pre"), 0)
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def text_of_html(html: str) -> str:
    """The text of a page, blocks on lines of their own; `pre` keeps its spaces."""
    stripper = _Stripper()
    stripper.feed(html)
    stripper.close()
    lines = (line.rstrip() for line in "".join(stripper.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
