"""A record of speed as a picture: tokens a second and memory against depth, both axes in powers.

Not here: measuring (speed.py). matplotlib, the extra `plots`, is imported when a picture is asked
for. Read next: record.py.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from overleap.errors import OverleapError
from overleap.eval.record import Record, Scalar
from overleap.machine import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Scalar]
Points = list[tuple[int, float]]  # (depth, value), without what is unknown
# One line style a backend, in the order they were measured; more repeat them.
STYLES = ("-o", "--s", ":^", "-.D")
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1661f", "#2f7d4f", "#8a8a8a"


def plot(record: Record, path: str | Path) -> Path:
    """Draw a record of `overleap bench` into a PNG file, replaced if there. Returns the file.

    Raises OverleapError as figure_of does, and for a file that cannot be written.
    """
    figure = figure_of(record)
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise OverleapError(f"{path} cannot be written: {error.strerror}") from None
    return Path(path)


def figure_of(record: Record) -> "Figure":
    """Two panels: tokens a second on the left, memory on the right.

    Raises OverleapError where matplotlib is missing, and for a record of something else.
    """
    if record.subject != "speed" or not record.numbers:
        raise OverleapError(
            f"a record of {record.subject} with {len(record.numbers)} rows cannot be drawn",
            "speed by depth can: `overleap bench --plot`",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OverleapError(
            f"a picture needs matplotlib, which is not there ({error})",
            "pip install overleap[plots]",
        ) from None
    figure = Figure(figsize=(11, 5), layout="constrained")
    rates, memory = figure.subplots(1, 2)
    _draw_rates(rates, record)
    _draw_memory(memory, record)
    for axes in (rates, memory):
        _depth_axis(axes, [int(row["depth_tokens"] or 0) for row in record.numbers])
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
            columnspacing=1.2,
        )  # fmt: skip
    figure.suptitle(_title(record), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_source(record), x=0.01, ha="left", fontsize=8, color="#666666")
    return figure


def _series(record: Record) -> Iterator[tuple[str, str, Sequence[Row]]]:
    """What labels say of the backend, its line style, its rows by depth."""
    # Older records name the backend in their settings, not in every row.
    by_backend = groupby(record.numbers, lambda row: row.get("backend"))
    groups = [(name, list(rows)) for name, rows in by_backend]
    for number, (name, rows) in enumerate(groups):
        yield f" {name}" if len(groups) > 1 else "", STYLES[number % len(STYLES)], rows


def _points(rows: Sequence[Row], name: str) -> Points:
    """What is known of one figure, depth by depth."""
    return [
        (int(row["depth_tokens"] or 0), float(value))
        for row in rows
        if isinstance(value := row.get(name), int | float)
    ]


def _prefill(rows: Sequence[Row]) -> Points:
    """Tokens a second of the tokens since the depth before, which older records leave to us."""
    read = [(0, 0.0), *_points(rows, "prefill_s")]
    return [(deep, (deep - last) / (s - then)) for (last, then), (deep, s) in pairwise(read)]


def _draw_rates(axes: "Axes", record: Record) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    drawn: list[Points] = []
    for beside, style, rows in _series(record):
        prefill, decode = _prefill(rows), _points(rows, "decode_tokens_per_s")
        _line(axes, prefill, style, BLUE, f"prefill{beside}")
        _line(axes, decode, style, ORANGE, f"decode{beside}")
        drawn += [prefill, decode]
    axes.set_ylabel("tokens per second (prefill: since the depth before)")
    axes.set_yscale("log")
    low, high = _widen(axes, drawn, 1.6)
    fine = (1, 2, 5) if high / low < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=fine))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _draw_memory(axes: "Axes", record: Record) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    drawn: list[Points] = []
    for beside, style, rows in _series(record):
        peak, predicted = (_points(rows, f"{x}_bytes") for x in ("peak_process", "predicted_peak"))
        _line(axes, peak, style, BLUE, f"peak{beside}")
        _line(axes, predicted, style[:-1], GREY, f"predicted{beside}")
        drawn += [peak, predicted]
    _, _, rows = next(iter(_series(record)))  # the cache is the same with every backend
    cache = _points(rows, "cache_bytes")
    _line(axes, cache, "-o", GREEN, "cache")
    axes.set_ylabel("memory of the process, and of the sequence's cache")
    axes.set_yscale("log", base=2)
    _widen(axes, [*drawn, cache], 2)
    axes.yaxis.set_major_locator(LogLocator(2, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".0 ", " ")))


def _line(axes: "Axes", points: Points, style: str, color: str, label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), style, color=color, markersize=4.5, label=label)


def _widen(axes: "Axes", drawn: Sequence[Points], factor: float) -> tuple[float, float]:
    """Room above and below, so that a flat line looks flat. Returns the limits of y."""
    values = [value for points in drawn for _, value in points]
    low, high = min(values) / factor, max(values) * factor
    axes.set_ylim(low, high)
    return low, high


def _depth_axis(axes: "Axes", depths: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xlabel("depth, tokens")
    axes.set_xscale("log", base=2)
    ticks = sorted(set(depths))
    axes.set_xticks(ticks, [depth_label(depth) for depth in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9)
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)


def depth_label(tokens: int) -> str:
    """1M, 64K; digits where it is neither."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0 and tokens:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def _title(record: Record) -> str:
    """Model, machine and commit, short."""
    machine, settings, commit = record.machine, record.settings, record.commit
    where = machine.cpu if machine.device == "cpu" else machine.device
    number = "unknown" if commit is None else commit[:9] + "+" * commit.endswith("+")
    return (
        f"{settings.get('model')} on {where}: {settings.get('threads')} of {machine.cores} cores, "
        f"commit {number}"
    )


def _source(record: Record) -> str:
    """The rest of what one needs to know of the figures, in a line below them."""
    settings = record.settings
    weights = (record.weights or "unknown")[:23]
    parts = [
        record.date,
        f"backend {settings.get('backend')}",
        f"{settings.get('cache')} cache",
        f"steps of {settings.get('chunk_tokens')} tokens",
        f"load {record.load}",
        f"weights {weights}",
    ]
    return " · ".join(parts)
