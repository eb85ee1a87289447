"""What this machine really does, from records of `overleap bench`; predicted against measured.

A step's time is taken as a sum: so much a layer, a weight byte, an operation of the indexer and of
attention. The four rates come from the records of this processor by least squares. No torch: the
records are read as JSON; eval/record.py writes them, and checks all of what they say. Read next:
predict.py (bounds by makers' figures).
"""

import datetime
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from overleap import devices, machine
from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.config import ModelConfig
from overleap.errors import OverleapError
from overleap.plan.flops import read_flops, token_flops
from overleap.plan.weights import Part, Precision, matrices, weight_bytes

FORMAT = "overleap.record/1"
SPARE_PAGES, SLOTS = 2, 2  # of a run of `overleap bench`
Features = tuple[float, float, float, float]


@dataclass(frozen=True)
class Where:
    """What makes runs comparable. device: `cpu`, or the accelerator's name."""

    cpu: str
    cores: int
    threads: int
    backend: str
    device: str = "cpu"

    @classmethod
    def here(cls, runs: Sequence["Run"] = (), config: ModelConfig | None = None) -> "Where":
        """This machine's processor, as it is usually run.

        With as many threads as in its newest run of this model, or of any; without runs with one
        for each core.
        """
        cpu, cores = devices.cpu_name(), machine.cores()
        alike = [run for run in runs if run.where == cls(cpu, cores, run.where.threads, "auto")]
        own = [run for run in alike if run.config == config] or alike
        return cls(cpu, cores, own[-1].where.threads if own else cores, "auto")


@dataclass(frozen=True)
class Run:
    """One depth of one record. Seconds and bytes; None: not recorded.

    read_tokens  those since the depth before, which took read_s
    """

    date: str
    where: Where
    model: str
    config: ModelConfig
    form: CacheFormat
    chunk: int
    decode_steps: int
    depth: int
    read_tokens: int
    read_s: float
    step_s: float
    cache_bytes: int
    allocated_bytes: int | None
    base_bytes: int | None
    peak_bytes: int | None
    commit: str = ""

    @property
    def step(self) -> Features:
        """What a step that writes a token at this depth takes."""
        return step_features(self.config, self.depth)

    @property
    def read(self) -> Features:
        """What reading those tokens takes."""
        return read_features(self.config, self.depth - self.read_tokens, self.depth, self.chunk)


@dataclass(frozen=True)
class Rates:
    """Seconds for each feature.

    runs   depths that they come from
    error  median of how far off they are there, as a share
    """

    each: Features
    runs: int
    error: float

    def seconds(self, features: Features) -> float:
        """Of something with these features."""
        return sum(rate * amount for rate, amount in zip(self.each, features, strict=True))


@dataclass(frozen=True)
class Checked:
    """A run and what the other records predict of it. Errors are shares; None: not known.

    own  the prediction rests on other runs of the same model
    """

    run: Run
    own: bool
    step_s: float | None
    read_s: float | None
    cache_bytes: int
    peak_bytes: int | None

    @property
    def decode_error(self) -> float | None:
        """Of tokens a second, predicted over measured."""
        return None if self.step_s is None else self.run.step_s / self.step_s - 1

    @property
    def read_error(self) -> float | None:
        """Of tokens a second while reading."""
        return None if self.read_s is None else self.run.read_s / self.read_s - 1

    @property
    def cache_error(self) -> float:
        """Of the sequence's cache."""
        return self.cache_bytes / self.run.cache_bytes - 1

    @property
    def peak_error(self) -> float | None:
        """Of peak memory."""
        if self.peak_bytes is None or self.run.peak_bytes is None:
            return None
        return self.peak_bytes / self.run.peak_bytes - 1


def step_features(config: ModelConfig, context: int) -> Features:
    """Layers, weight bytes, index operations, attention operations of one token."""
    flops = token_flops(config, context)
    return (float(config.num_hidden_layers), float(used_bytes(config)), flops.index, flops.core)


def read_features(config: ModelConfig, begin: int, end: int, chunk: int) -> Features:
    """The same of reading begin .. end - 1; in place of weight bytes, operations of linears."""
    flops = read_flops(config, begin, end)
    steps = -(-(end - begin) // chunk)
    linear = flops.dense + flops.experts + flops.wide
    return (float(steps * config.num_hidden_layers), linear, flops.index, flops.core)


def used_bytes(config: ModelConfig) -> int:
    """Bytes of the weights that a token passes through."""
    return sum(
        each.used * each.nbytes(config, Precision.RELEASE)
        for each in matrices(config)
        if each.main and each.part is not Part.EMBEDDING
    )


def runs_of(folder: str | Path) -> list[Run]:
    """Every run by depth in <folder>/speed.jsonl whose model's config is known, oldest first.

    Raises OverleapError for a file that cannot be read, naming a line that is no record.
    """
    path = Path(folder) / "speed.jsonl"
    if not path.exists():
        return []
    found: list[Run] = []
    for number, line in enumerate(record_lines(path), 1):
        try:
            raw = json.loads(line)
            if raw["format"] != FORMAT:
                raise ValueError(f"format is {raw['format']!r}")
            found += _runs(raw)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise OverleapError(f"{path}:{number} is no record: {error!r}") from None
        except OverleapError as error:  # its config is none
            raise OverleapError(f"{path}:{number} is no record: {error.message}") from None
    return found


def record_lines(path: str | Path) -> list[str]:
    """The lines of a file of records, oldest first. OverleapError where it cannot be read."""
    try:
        return Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise OverleapError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OverleapError(f"{path} holds no records: byte {error.start} is not UTF-8") from None


def _runs(raw: dict[str, Any]) -> Iterator[Run]:
    settings, there = raw["settings"], raw["machine"]
    if "config" not in settings:
        return
    config = ModelConfig.from_dict(json.loads(settings["config"]), "record")
    before: dict[str, int] = {}
    for row in raw["numbers"]:
        backend, depth = row.get("backend") or settings["backend"], row["depth_tokens"]
        where = Where(
            there["cpu"], there["cores"], settings["threads"], backend, there.get("device", "cpu")
        )
        last = before.get(backend, 0)
        before[backend] = depth
        rate = row.get("interval_tokens_per_s")
        if rate is None:  # an older record
            continue
        if not min(depth - last, rate, row["decode_tokens_per_s"], row["cache_bytes"]) > 0:
            raise ValueError(f"nothing was measured at {depth} tokens")
        yield Run(
            raw["date"], where, settings["model"], config, CacheFormat(settings["cache"]),
            settings["chunk_tokens"], settings["decode_steps"], depth, depth - last,
            (depth - last) / rate, 1 / row["decode_tokens_per_s"], row["cache_bytes"],
            row.get("allocated_bytes"), row.get("base_bytes"), row.get("peak_process_bytes"),
            raw.get("commit") or "",
        )  # fmt: skip


def rates(runs: Sequence[Run], reading: bool = False) -> Rates | None:
    """Rates of steps (or of reading) that fit these runs best; None where there are none."""
    rows = [(run.read, run.read_s) if reading else (run.step, run.step_s) for run in runs]
    if not rows:
        return None
    each = _fit(rows)
    off = [
        abs(sum(r * x for r, x in zip(each, features, strict=True)) / seconds - 1)
        for features, seconds in rows
    ]
    return Rates(each, len(rows), statistics.median(off))


def relevant(
    config: ModelConfig, runs: Sequence[Run], where: Where, commit: str = ""
) -> tuple[list[Run], bool]:
    """The runs that say something of this model here: its own, or else everybody's; which.

    commit  of the code whose speed is asked for: where it has runs, those of other code do not
            count; "" is that of the newest run
    """
    near = [run for run in runs if run.where == where and run.form is CacheFormat.RELEASE]
    own = [run for run in near if run.config == config]
    found = own or near
    wanted = commit or (found[-1].commit if found else "")
    return [run for run in found if run.commit == wanted] or found, bool(own)


def reserve(runs: Sequence[Run]) -> int | None:
    """Resident memory of the process beside weights, cache and scratch; median of the runs."""
    found = [
        run.base_bytes - weight_bytes(run.config) for run in runs if run.base_bytes
    ]  # fmt: skip
    return round(statistics.median(found)) if found else None


@dataclass(frozen=True)
class Forecast:
    """What records of this machine say of a load; seconds for one user.

    own    they are records of this very model; else of others, and this is a rough guess
    runs   depths that it rests on; error: of the step, median where it is known
    """

    step_s: float
    first_token_s: float
    own: bool
    runs: int
    error: float


def forecast(
    config: ModelConfig, context: int, chunk: int, runs: Sequence[Run], where: Where
) -> Forecast | None:
    """Seconds of a step at the end of a context, and of reading it; None without records."""
    near, own = relevant(config, runs, where)
    step, read = rates(near), rates(near, reading=True)
    if step is None or read is None:
        return None
    return Forecast(
        step.seconds(step_features(config, context)),
        read.seconds(read_features(config, 0, context, chunk)),
        own,
        step.runs,
        step.error,
    )


def check(runs: Sequence[Run]) -> list[Checked]:
    """Every run against what the records of other dates predict of it."""
    found = []
    for run in runs:
        others = [other for other in runs if other.date != run.date]
        near, own = relevant(run.config, others, run.where, run.commit)
        step, read = rates(near), rates(near, reading=True)
        rest = reserve(_nearest(run, [one for one in others if one.where.cpu == run.where.cpu]))
        found.append(
            Checked(
                run,
                own and bool(near),
                step.seconds(run.step) if step else None,
                read.seconds(run.read) if read else None,
                layout.cache_bytes(run.config, run.depth, run.form).total,
                None if rest is None else rest + _taken(run),
            )
        )
    return found


def _nearest(run: Run, others: Sequence[Run]) -> list[Run]:
    """Those of the record that is nearest in time: what a process takes changes with the code."""

    def apart(other: Run) -> datetime.timedelta:
        return abs(datetime.datetime.fromisoformat(other.date) - when)

    when = datetime.datetime.fromisoformat(run.date)
    nearest = min(map(apart, others), default=None)
    return [other for other in others if apart(other) == nearest]


def _taken(run: Run) -> int:
    """Weights, cache and scratch of a run, by the formulas."""
    config, form = run.config, run.form
    pages = layout.pages_for(run.depth + run.decode_steps) + SPARE_PAGES
    cache = pages * layout.page_bytes(config, form) + SLOTS * layout.slot_bytes(config, form).total
    native = run.where.backend in ("auto", "cpu")
    return weight_bytes(config) + cache + layout.scratch_bytes(config, run.chunk, native)


def _fit(rows: Sequence[tuple[Features, float]]) -> Features:
    """Rates of at least 0 with the least sum of relative errors.

    Squares first; then runs that are far off, which something disturbed, count less, three times.
    """
    weights = [1.0] * len(rows)
    for _ in range(4):
        scaled = [
            [weight * x / seconds for x in features]
            for weight, (features, seconds) in zip(weights, rows, strict=True)
        ]
        found = _nonnegative(scaled, weights)
        off = [
            abs(sum(r * x for r, x in zip(found, features, strict=True)) / seconds - 1)
            for features, seconds in rows
        ]
        weights = [max(error, 0.02) ** -0.5 for error in off]
    return found


def _nonnegative(rows: list[list[float]], wanted: list[float]) -> Features:
    """Least squares of rows @ rates = wanted.

    Every choice of features is solved alone and the best without a negative rate is taken: four
    features have fifteen. Features that do not differ between runs share what they explain.
    """
    best, least = (0.0, 0.0, 0.0, 0.0), float("inf")
    for count in range(1, 5):
        for chosen in combinations(range(4), count):
            found = _solve([[row[i] for i in chosen] for row in rows], wanted)
            if found is None or min(found) < 0:
                continue
            full = [0.0] * 4
            for i, rate in zip(chosen, found, strict=True):
                full[i] = rate
            error = sum(
                (sum(r * x for r, x in zip(full, row, strict=True)) - want) ** 2
                for row, want in zip(rows, wanted, strict=True)
            )
            if error < least * (1 - 1e-9):
                best, least = (full[0], full[1], full[2], full[3]), error
    return best


def _solve(rows: list[list[float]], wanted: list[float]) -> list[float] | None:
    """Least squares of rows @ x = wanted by the normal equations; None where they are singular."""
    width = len(rows[0])
    top = [max(abs(row[i]) for row in rows) or 1.0 for i in range(width)]
    unit = [[x / t for x, t in zip(row, top, strict=True)] for row in rows]
    a = [[sum(row[i] * row[j] for row in unit) for j in range(width)] for i in range(width)]
    b = [sum(row[i] * want for row, want in zip(unit, wanted, strict=True)) for i in range(width)]
    for i in range(width):
        pivot = max(range(i, width), key=lambda r: abs(a[r][i]))
        if abs(a[pivot][i]) < 1e-9 * sum(want * want for want in wanted):
            return None
        a[i], a[pivot], b[i], b[pivot] = a[pivot], a[i], b[pivot], b[i]
        for r in range(i + 1, width):
            factor = a[r][i] / a[i][i]
            a[r] = [x - factor * y for x, y in zip(a[r], a[i], strict=True)]
            b[r] -= factor * b[i]
    x = [0.0] * width
    for i in reversed(range(width)):
        x[i] = (b[i] - sum(a[i][j] * x[j] for j in range(i + 1, width))) / a[i][i]
    return [value / t for value, t in zip(x, top, strict=True)]
