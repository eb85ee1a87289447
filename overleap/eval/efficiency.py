"""The three models against the context, as pictures: PNG and SVG, or plain text without matplotlib.

Not here: the figures (plan/compare.py). No torch. matplotlib, the extra `plots`, is imported when
a picture is asked for.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from overleap.errors import OverleapError
from overleap.plan.compare import BASELINE, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {BASELINE: "#8a8a8a", "V4-Pro": "#1f5fa8", "V4-Flash": "#d1661f"}
PART_COLORS = {
    "dense": "#2f7d4f", "experts": "#8fbf9f", "core attention": "#1f5fa8", "indexer": "#d1661f",
}  # fmt: skip
BAR = 44  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


def text_chart(rows: Sequence[Row]) -> str:
    """Two charts of bars, one bar for every model and context."""
    flops = _bars("GFLOP of a token (as FP8)", rows, [row.counted / 1e9 for row in rows], "{:,.1f}")
    cache = _bars("GB of cache", rows, [row.cache_bytes / 1e9 for row in rows], "{:,.3f}")
    return f"{flops}\n\n{cache}\n"


def _bars(title: str, rows: Sequence[Row], values: Sequence[float], form: str) -> str:
    longest = max(values)
    base = {
        row.context: v for row, v in zip(rows, values, strict=True) if row.model == BASELINE
    }  # fmt: skip
    lines, before = [title], None
    for row, value in zip(rows, values, strict=True):
        context = "" if row.context == before else context_label(row.context)
        before = row.context
        share = value / base[row.context]
        said = form.format(value) + (f"  {share:.1%}" if row.model != BASELINE else "")
        lines.append(f"{context:>6} {row.model:<9} {_bar(value / longest)} {said}")
    return "\n".join(lines)


def _bar(share: float) -> str:
    """A bar of so much of the longest one, to an eighth of a character."""
    whole, part = divmod(round(share * BAR * 8), 8)
    return "█" * whole + (EIGHTHS[part] if part else "" if whole else EIGHTHS[1])


def context_label(tokens: int) -> str:
    """1M, 64K, 4,097. A million is 1M here, as the report has it."""
    if tokens % 10**6 == 0:
        return f"{tokens // 10**6}M"
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """efficiency.png and efficiency.svg into a folder, replaced if there. Returns the files.

    Without matplotlib: efficiency.txt with the bars. Raises OverleapError for a folder that
    cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import matplotlib
        except ImportError:
            path = folder / "efficiency.txt"
            path.write_text(text_chart(rows), "utf-8")
            return [path]
        figure, paths = figure_of(rows), []
        with matplotlib.rc_context({"svg.hashsalt": "overleap", "svg.fonttype": "none"}):
            for kind, facts in (("png", {}), ("svg", {"Date": None})):
                path = folder / f"efficiency.{kind}"
                figure.savefig(path, format=kind, dpi=110, metadata=facts)
                paths.append(path)
    except OSError as error:
        raise OverleapError(f"{folder} cannot be written: {error.strerror}") from None
    return paths


def figure_of(rows: Sequence[Row]) -> "Figure":
    """Three panels: FLOPs against context, cache against context, parts at the deepest context."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    flops, cache, parts = figure.subplots(1, 3)
    _lines(flops, rows, [row.counted for row in rows], "single-token FLOPs, as FP8 operations")
    _lines(cache, rows, [row.cache_bytes for row in rows], "bytes of cache")
    for axes, unit in ((flops, "GFLOP"), (cache, "GB")):
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if unit == "GFLOP" else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(partial(_in_billions, unit)))
        axes.yaxis.set_minor_locator(NullLocator())
    _stack(parts, [row for row in rows if row.context == rows[-1].context])
    for axes in (flops, cache, parts):
        axes.grid(True, axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _in_billions(unit: str, value: float, _: object) -> str:
    return f"{value / 1e9:,g} {unit}"


def _lines(axes: "Axes", rows: Sequence[Row], values: Sequence[float], title: str) -> None:
    """One line a model, both axes in powers; the last point says its share of the baseline."""
    from matplotlib.ticker import NullLocator

    contexts = sorted({row.context for row in rows})
    base = {row.context: v for row, v in zip(rows, values, strict=True) if row.model == BASELINE}
    for model, color in COLORS.items():
        points = [
            (r.context, v) for r, v in zip(rows, values, strict=True) if r.model == model
        ]  # fmt: skip
        axes.plot(*zip(*points, strict=True), "-o", color=color, markersize=4, label=model)
        last, value = points[-1]
        if model != BASELINE:
            axes.annotate(
                f"{value / base[last]:.1%}", (last, value), (7, -3),
                textcoords="offset points", fontsize=9, color=color,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(contexts[0] / 1.5, contexts[-1] * 2.6)
    axes.set_xticks(contexts, [context_label(each) for each in contexts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("context, tokens")
    axes.set_title(title, loc="left", fontsize=11)


def _stack(axes: "Axes", rows: Sequence[Row]) -> None:
    """What each model spends its operations on."""
    bottom = [0.0] * len(rows)
    names = [row.model for row in rows]
    for part, color in PART_COLORS.items():
        heights = [row.parts[part] / 1e9 for row in rows]
        axes.bar(names, heights, 0.6, bottom=bottom, color=color, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    label = context_label(rows[0].context)
    axes.set_title(f"G operations of a token at {label}, by part", loc="left", fontsize=11)
