"""The picture says what the record says: every point, its units, where it was measured."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from overleap.errors import OverleapError
from overleap.eval.plot import depth_label, figure_of, plot
from overleap.eval.record import Record, take
from overleap.eval.speed import DEPTHS, Memory, Speed, rows_of

KIB, MIB = 2**10, 2**20


def measured(times: float) -> list[Speed]:
    """Every depth: each 1,024 tokens take a second, a step as long; `times` as slow."""
    found, before = [], 0
    for depth in DEPTHS:
        read, last = times * depth / 1024, times * (depth - before) / 1024
        memory = Memory(depth * 100, depth * 110, 200 * MIB, 300 * MIB, 400 * MIB)
        found.append(Speed(depth, read, depth - before, last, (times,), memory))
        before = depth
    return found


def record(*backends: str) -> Record:
    found = {name: measured(times) for times, name in enumerate(backends, 1)}
    settings: dict[str, Any] = {
        "backend": ", ".join(backends),
        "model": "mini",
        "threads": 2,
        "cache": "release",
        "chunk_tokens": 512,
    }
    return replace(
        take("speed", rows_of(found), settings, weights="blake3:" + "0123456789" * 6),
        commit="0123456789" * 4 + "+",
    )


def drawn(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> points."""
    return {
        str(line.get_label()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.get_lines()
    }


def test_every_point_is_drawn() -> None:
    rates, memory = figure_of(record("torch")).axes
    assert drawn(rates) == {
        "prefill": [(depth, 1024.0) for depth in DEPTHS],
        "decode": [(depth, 1.0) for depth in DEPTHS],
    }
    assert drawn(memory) == {
        "peak": [(depth, 300 * MIB) for depth in DEPTHS],
        "predicted": [(depth, 400 * MIB) for depth in DEPTHS],
        "cache": [(depth, depth * 100) for depth in DEPTHS],
    }


def test_backends_stand_beside_each_other() -> None:
    rates, memory = figure_of(record("torch", "cpu")).axes
    labels = {"prefill torch", "decode torch", "prefill cpu", "decode cpu"}
    assert set(drawn(rates)) == labels
    assert drawn(rates)["decode cpu"] == [(depth, 0.5) for depth in DEPTHS]
    styles = {line.get_label(): (line.get_linestyle(), line.get_color()) for line in rates.lines}
    assert len(set(styles.values())) == 4
    assert [label for label in drawn(memory) if "cache" in label] == ["cache"]


def test_axes_are_labelled_in_units_and_powers() -> None:
    figure = figure_of(record("torch"))
    figure.draw_without_rendering()
    for axes, unit in zip(figure.axes, ("tokens per second", "memory"), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "depth, tokens" and unit in axes.get_ylabel()
        marks = [text.get_text() for text in axes.get_xticklabels()]
        assert marks == ["1K", "4K", "16K", "64K", "128K", "256K", "1M"]
    rates, memory = ([text.get_text() for text in a.get_yticklabels()] for a in figure.axes)
    assert {"1", "10", "100", "1,000"} <= set(rates)
    assert "1 MiB" in memory or "2 MiB" in memory
    source = replace(record("torch"), commit=None, weights=None)
    assert "commit unknown" in figure_of(source).get_suptitle()


def test_it_says_where_it_was_measured() -> None:
    source = record("torch", "cpu")
    figure = figure_of(source)
    title = f"mini on {source.machine.cpu}: 2 of {source.machine.cores} cores, commit 012345678+"
    assert figure.get_suptitle() == title
    below = figure.get_supxlabel()
    for part in (source.date, "torch, cpu", "release", "512", "blake3:0123456789012345"):
        assert part in below


def test_older_records_are_drawn_too() -> None:
    rows = tuple(
        {"depth_tokens": depth, "prefill_s": seconds, "decode_tokens_per_s": 5.0, "cache_bytes": 9}
        for depth, seconds in ((1000, 1.0), (3000, 5.0))
    )
    rates, memory = figure_of(replace(record("auto"), numbers=rows)).axes
    assert drawn(rates)["prefill"] == [(1000, 1000), (3000, 500)]
    assert set(drawn(memory)) == {"cache"}


def test_the_file_is_a_picture(tmp_path: Path) -> None:
    path = plot(record("torch"), tmp_path / "speed.png")
    assert path == tmp_path / "speed.png"
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    wide, high = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    assert wide > 1000 and high > 500
    with pytest.raises(OverleapError, match="cannot be written: No such file"):
        plot(record("torch"), tmp_path / "none" / "speed.png")


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    source = record("torch")
    for other in (replace(source, subject="geometry"), replace(source, numbers=())):
        with pytest.raises(OverleapError, match="cannot be drawn"):
            figure_of(other)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OverleapError, match="needs matplotlib") as caught:
        figure_of(source)
    assert caught.value.hint == "pip install overleap[plots]"


def test_matplotlib_is_not_imported_before_it_is_asked_for() -> None:
    probe = "import sys, overleap.cli.bench, overleap.eval.plot, overleap.eval.speed\n"
    probe += "print([name for name in sys.modules if name.startswith('matplotlib')])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("tokens", "label"),
    [
        (7, "7"),
        (1000, "1,000"),
        (1024, "1K"),
        (131072, "128K"),
        (3 * MIB, "3M"),
        (1500 * KIB, "1500K"),
    ],
)
def test_depths_are_short(tokens: int, label: str) -> None:
    assert depth_label(tokens) == label
