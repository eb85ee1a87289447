"""Documents out of folders, JSONL and Parquet: (name, text), in an order that repeats.

Not tokens (shards.py). HTML loses its tags, gzip is opened, what is not UTF-8 text is left out.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from overleap.errors import TrainingError

PLAIN = (
    ".txt", ".rst", ".md", ".py", ".pod", ".yaml", ".toml", ".tex", ".org", ".adoc", ".csv", ".xml",
)  # fmt: skip
HTML = (".html", ".htm", ".xhtml")
PACKED = (".gz", ".dz")  # a dictd file is gzip with an index
STRAY = 1000  # a text may hold one byte in so many that is not UTF-8
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", ".git"}  # not of the folder itself
LEAST = 64  # characters: shorter texts are no documents


def documents(paths: Iterable[str | Path]) -> Iterator[tuple[str, str]]:
    """Every document of every path, folders in path order: (name, text).

    A `.jsonl` line is an object with `text`; a `.parquet` row has a column of that name.
    Raises TrainingError for a path that is not there, a bad line, or when nothing is found at all.
    """
    found = 0
    for path in map(Path, paths):
        if not path.exists():
            raise TrainingError(f"{path} does not exist")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            inside = {*file.relative_to(path).parts}
            if not file.is_file() or file.is_symlink() or _LEFT_OUT & inside:
                continue
            for name, text in _of_file(file):
                if len(text) >= LEAST:
                    found += 1
                    yield name, text
    if not found:
        raise TrainingError(
            "no document was found",
            f"texts end in {', '.join((*PLAIN, *HTML, '.jsonl', '.parquet'))}, or those with .gz",
        )


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    inner = path.with_suffix("") if path.suffix in PACKED else path
    if inner.suffix not in (*PLAIN, *HTML, ".jsonl") and path.suffix != ".dz":
        return
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix in PACKED else raw
    except (OSError, EOFError, zlib.error):
        return
    text = raw.decode("utf-8", "replace")
    if text.count("\ufffd") * STRAY > len(text):
        return
    if inner.suffix == ".jsonl":
        yield from _lines(path, text)
    elif inner.suffix in HTML:
        yield str(path), text_of_html(text)
    else:
        yield str(path), text


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise TrainingError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise TrainingError(
                f"{path} line {number} has no string `text`",
                "conversations (`messages`) are a source of their own, not documents",
            )
        yield f"{path}:{number}", record["text"]


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise TrainingError(
            f"{path} needs pyarrow, which is not there ({error})", "pip install overleap[datasets]"
        ) from None
    file = parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        raise TrainingError(f"{path} has columns {', '.join(file.schema_arrow.names)}, no `text`")
    number = 0
    for batch in file.iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            number += 1
            if isinstance(text, str):
                yield f"{path}:{number}", text


_BLOCKS = {
    "p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "br", "table",
    "section", "ul", "ol", "dl", "blockquote",
}  # fmt: skip
_SILENT = {"script", "style", "head", "nav", "footer"}


class _Stripper(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in _SILENT
        self.pre += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in _SILENT
        self.pre -= tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.silent <= 0:
            self.parts.append(data if self.pre > 0 else re.sub(r"\s+", " ", data))


def text_of_html(html: str) -> str:
    """The text of a page, blocks on lines of their own; `pre` keeps its spaces."""
    stripper = _Stripper()
    stripper.feed(html)
    stripper.close()
    lines = (line.rstrip() for line in "".join(stripper.parts).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
