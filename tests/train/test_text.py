"""Documents out of files: what is read, what is refused, and how much memory that takes."""

import gzip
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from overleap.errors import TrainingError
from overleap.train.text import documents, text_of_html

LONG = "a line of text that is long enough to be a document of its own, no doubt\n"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<html><head><title>t</title><body><p>Hello", "Hello\n"),
        ("<p>a</p></head><script>alert(1)</script><p>b</p>", "a\n\nb\n"),
        ("<p>a</p></nav></footer><style>p {}</style><p>b</p>", "a\n\nb\n"),
        ("<nav>menu<body><p>a</p></body>", "a\n"),
        ("</pre><pre>a\n  b</pre>", "a\n  b\n"),
        ("<title>t</title><nav>menu</nav><p>a</p><footer>end</footer>", "a\n"),
    ],
)
def test_left_out_and_stray_tags_hide_no_text_and_show_no_script(html: str, text: str) -> None:
    assert text_of_html(html) == text


NO_TEXTS = {
    "a.docx": (LONG.encode(), "of no kind that is read"),
    "a": (LONG.encode(), "of no kind that is read"),
    "a.parquet.gz": (gzip.compress(LONG.encode()), "of no kind that is read"),
    "a.txt": (f"{LONG}caf\xe9".encode("latin-1"), "not UTF-8: 1 of its 77 characters"),
    "a.jsonl": ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8: 1 of its"),
    "a.txt.gz": (gzip.compress(LONG.encode())[:-9], "cannot be read"),
    "a.jsonl.gz": (b"no gzip", "cannot be read"),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_a_named_file_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    """Even beside another that is; in a folder it is left out."""
    raw, said = NO_TEXTS[name]
    (tmp_path / "good.txt").write_text(LONG)
    (tmp_path / name).write_bytes(raw)
    assert [text for _, text in documents([tmp_path])] == [LONG]
    with pytest.raises(TrainingError, match=said):
        list(documents([tmp_path / "good.txt", tmp_path / name]))


def test_suffixes_are_of_any_case_and_a_named_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text(LONG)
    (tmp_path / "b.Html").write_text(f"<p>{LONG}")
    (tmp_path / "c.JSONL.GZ").write_bytes(gzip.compress(json.dumps({"text": LONG}).encode()))
    (tmp_path / "d.txt").symlink_to(tmp_path / "a.TXT")
    names = ["a.TXT", "b.Html", "c.JSONL.GZ"]
    whole = [LONG] * 3
    assert [text for _, text in documents([tmp_path])] == whole
    assert [text for _, text in documents([tmp_path / name for name in names])] == whole
    assert [text for _, text in documents([tmp_path / "d.txt"])] == [LONG]


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl_is_read_line_by_line(tmp_path: Path, seed: int, packed: bool) -> None:
    """The same documents as of the whole, in a fraction of its memory."""
    draw = random.Random(seed)
    texts = [
        "".join(draw.choices("abc é汉\u2028\n", k=draw.randrange(70, 9999))) for _ in range(99)
    ]
    raw = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts * 20)
    path = tmp_path / f"a.jsonl{'.gz' * packed}"
    path.write_bytes(gzip.compress(raw.encode(), 1) if packed else raw.encode())
    size = len(raw)
    del raw
    tracemalloc.start()
    try:
        for number, (name, text) in enumerate(documents([path])):
            assert name == f"{path}:{number + 1}" and text == texts[number % 99]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number == 99 * 20 - 1
    assert most < size / 4


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    """JSON can spell it, and UTF-8 cannot."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\ud83d two \\ud83d\\ude00 %s"}\n' % ("word " * 20))
    (found,) = (text for _, text in documents([path]))
    assert found.startswith("one \ufffd two \U0001f600 word")


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def torn(raw: bytes) -> bytes:
    """Its end, which says what is where, is whole."""
    return raw[:4] + bytes(len(raw) // 2) + raw[4 + len(raw) // 2 :]


@pytest.mark.parametrize("damage", [cut, torn])
def test_a_broken_parquet_file_is_refused(
    tmp_path: Path, seed: int, damage: Callable[[bytes], bytes]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path, draw = tmp_path / "a.parquet", random.Random(seed)
    texts = [f"document {draw.random()} " * 9 for _ in range(5000)]
    parquet.write_table(pyarrow.table({"text": texts}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainingError, match="no whole Parquet file"):
        list(documents([path]))
    parquet.write_table(pyarrow.table({"words": texts}), path)
    with pytest.raises(TrainingError, match="has columns words, no `text`"):
        list(documents([path]))
