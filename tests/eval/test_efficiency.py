"""The picture of the three models says what the rows say; without matplotlib the bars do."""

import sys
from pathlib import Path

import pytest

from overleap.errors import OverleapError
from overleap.eval.efficiency import BAR, context_label, draw, figure_of, text_chart
from overleap.plan import compare


def test_every_point_and_part_is_drawn() -> None:
    rows = compare()
    flops, cache, parts = figure_of(rows).axes
    for axes, values in (
        (flops, [row.counted for row in rows]),
        (cache, [float(row.cache_bytes) for row in rows]),
    ):
        drawn = {
            (str(line.get_label()), int(x)): y
            for line in axes.get_lines()
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        known = {(r.model, r.context): v for r, v in zip(rows, values, strict=True)}
        assert drawn == known
    assert [text.get_text() for text in flops.texts] == ["27.0%", "10.2%"]
    assert [text.get_text() for text in cache.texts] == ["10.5%", "7.3%"]
    heights = [sum(bar[model].get_height() for bar in parts.containers) for model in range(3)]
    assert heights == pytest.approx([row.counted / 1e9 for row in rows[-3:]])


def test_the_files_are_pictures_and_repeat(tmp_path: Path) -> None:
    paths = draw(compare(), tmp_path / "a")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text("utf-8") and "V4-Flash" in paths[1].read_text("utf-8")
    assert paths[1].read_bytes() == draw(compare(), tmp_path / "b")[1].read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(OverleapError, match="cannot be written"):
        draw(compare(), tmp_path / "file")


def test_bars_where_there_is_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (path,) = draw(compare(), tmp_path)
    assert path.name == "efficiency.txt"
    assert path.read_text("utf-8") == text_chart(compare())


def test_bars_are_as_long_as_their_values() -> None:
    lines = text_chart(compare([10**6])).splitlines()
    bars = {line.split()[-3 if "%" in line else -2]: line for line in lines if "█" in line}
    lengths = [line.count("█") for line in bars.values()]
    assert max(lengths) == BAR
    flops = lines[1:4]
    assert [line.count("█") for line in flops] == [BAR, int(BAR * 0.2703), int(BAR * 0.1016)]
    assert flops[1].endswith("310.3  27.0%")


@pytest.mark.parametrize(
    ("tokens", "label"), [(10**6, "1M"), (4096, "4K"), (2**20, "1024K"), (4097, "4,097")]
)
def test_contexts_are_short(tokens: int, label: str) -> None:
    assert context_label(tokens) == label
