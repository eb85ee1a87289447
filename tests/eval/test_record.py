"""Records survive the way to a file and back, and a damaged line is named, not guessed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overleap.errors import OverleapError
from overleap.eval.record import Record, append, commit, machine, read, take
from overleap.plan.calibrate import runs_of


def sample() -> Record:
    numbers: list[dict[str, Any]] = [{"depth_tokens": 1, "tokens_per_s": 2.5, "peak": None}]
    return take("speed", numbers, {"cache": "release", "fast": True}, weights="blake3:00ff")


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    first = sample()
    second = replace(first, weights=None, commit=None, numbers=())
    path = append(first, tmp_path / "new")
    assert append(second, tmp_path / "new") == path == tmp_path / "new" / "speed.jsonl"
    assert read(path) == [first, second]
    assert path.read_text("utf-8").count("\n") == 2


def test_a_record_says_where_it_was_taken() -> None:
    record = sample()
    assert record.machine.cores >= 1 and record.machine.memory_bytes > 2**28
    assert record.machine.cpu and record.machine.device == "cpu"
    assert set(record.versions) == {"overleap", "python", "torch"}
    assert record.date.endswith("+00:00")
    assert machine() == record.machine


def test_commit_is_a_number_with_a_mark_for_changes() -> None:
    found = commit()
    assert found is None or (len(found.rstrip("+")) == 40 and int(found.rstrip("+"), 16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_was_not_measured_is_not_recorded(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        append(replace(sample(), numbers=({"tokens_per_s": value},)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def damaged(change: dict[str, Any], drop: str | None = None) -> str:
    raw = json.loads(sample().to_json()) | change
    if drop:
        del raw[drop]
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "format 'list'"),
        (damaged({"format": "overleap.record/2"}), "'overleap.record/2'"),
        (damaged({"extra": 1}), "extra"),
        (damaged({}, drop="commit"), "expected"),
        (damaged({"date": 5}), "date is 5"),
        (damaged({"load": "high"}), "load is 'high'"),
        (damaged({"machine": None}), "machine is None"),
        (damaged({"machine": {"cpu": "x"}}), "machine has"),
        (damaged({"numbers": [[1]]}), "plain values"),
        (damaged({"numbers": [{"x": {"y": 1}}]}), "plain values"),
        (damaged({"numbers": [{"x": math.nan}]}), "plain values"),
    ],
)
def test_a_damaged_line_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = append(sample(), tmp_path)
    path.write_text(path.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(OverleapError) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value) and complaint in str(caught.value)


def test_files_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    with pytest.raises(OverleapError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    with pytest.raises(OverleapError, match="byte 0 is not UTF-8"):
        read(tmp_path / "file")
    with pytest.raises(OverleapError, match="cannot be written"):
        append(sample(), tmp_path / "file")


def test_whoever_reads_records_says_the_same_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "speed.jsonl").write_bytes(b"{}\n\xff")
    said = []
    for reader, what in ((read, tmp_path / "speed.jsonl"), (runs_of, tmp_path)):
        with pytest.raises(OverleapError, match="byte 3 is not UTF-8") as caught:
            reader(what)
        said.append(str(caught.value))
    assert said[0] == said[1]
    package = Path(__file__).parents[2] / "overleap"
    sources = [path.read_text("utf-8") for path in package.rglob("*.py")]
    assert sum(text.count("holds no records") for text in sources) == 1
    assert sum(text.count('"overleap.record/') for text in sources) == 1


def test_kept_records_are_readable() -> None:
    kept = sorted((Path(__file__).parents[2] / "results").glob("*.jsonl"))
    assert kept, "results/ holds the records the documents speak of"
    for path in kept:
        assert read(path), path
