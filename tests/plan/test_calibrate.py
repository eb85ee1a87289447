"""Rates from records: recovered from made-up machines, and held against the project's own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overleap.cache.layout import CacheFormat, cache_bytes
from overleap.checkpoint import locate
from overleap.config import ModelConfig
from overleap.errors import OverleapError
from overleap.plan.calibrate import (
    Run,
    Where,
    check,
    forecast,
    rates,
    read_features,
    relevant,
    reserve,
    runs_of,
    step_features,
    used_bytes,
)
from overleap.plan.weights import weight_bytes

MINI = ModelConfig.from_checkpoint(locate("mini"))
FLASH, PRO = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")
HERE = Where("some processor", 2, 2, "auto")
RESULTS = Path(__file__).parents[2] / "results"
TRUE_STEP = (3e-4, 1e-10, 2e-12, 5e-11)
TRUE_READ = (1e-5, 3e-11, 2e-12, 1e-11)


def run_at(config: ModelConfig, depth: int, date: str, slow: float = 1.0) -> Run:
    """A run on day a, b, ... on a machine of which the true rates are known."""
    step = sum(r * x for r, x in zip(TRUE_STEP, step_features(config, depth), strict=True))
    read = sum(r * x for r, x in zip(TRUE_READ, read_features(config, 0, depth, 512), strict=True))
    cache = cache_bytes(config, depth, CacheFormat.RELEASE).total
    base = weight_bytes(config) + 250 * 2**20
    return Run(
        f"2026-01-0{ord(date) - 96}", HERE, "x", config, CacheFormat.RELEASE, 512, 16, depth, depth,
        read * slow, step * slow, cache, None, base, None,
    )  # fmt: skip


def test_the_true_rates_come_back() -> None:
    runs = [run_at(c, d, "a") for c in (MINI, FLASH, PRO) for d in (1000, 10**5, 10**6)]
    step, read = rates(runs), rates(runs, reading=True)
    assert step is not None and read is not None
    assert step.each == pytest.approx(TRUE_STEP, rel=1e-3)
    assert read.each == pytest.approx(TRUE_READ, rel=1e-3)
    assert step.error < 1e-3 and step.runs == 9


def test_a_disturbed_run_counts_little() -> None:
    runs = [run_at(MINI, d, "a") for d in (1024, 4096, 16384, 65536, 131072, 1048576)]
    runs[1] = replace(runs[1], step_s=2 * runs[1].step_s)
    step = rates(runs)
    assert step is not None
    for run in (runs[0], *runs[2:]):
        assert step.seconds(run.step) == pytest.approx(run.step_s, rel=0.05)


def test_no_rate_is_negative(seed: int) -> None:
    import random

    draw = random.Random(seed)
    runs = [
        run_at(MINI, draw.randrange(1, 10**6), "a", draw.uniform(0.5, 2)) for _ in range(8)
    ]  # fmt: skip
    for reading in (False, True):
        found = rates(runs, reading)
        assert found is not None and min(found.each) >= 0 and max(found.each) > 0
    assert rates([]) is None


def test_a_models_own_runs_come_first() -> None:
    runs = [run_at(MINI, 1000, "a"), run_at(FLASH, 1000, "b")]
    assert relevant(MINI, runs, HERE) == ([runs[0]], True)
    assert relevant(PRO, runs, HERE) == (runs, False)
    assert relevant(MINI, runs, replace(HERE, threads=1)) == ([], False)
    found = forecast(MINI, 1000, 512, runs, HERE)
    assert found is not None and found.own
    assert found.step_s == pytest.approx(runs[0].step_s)
    assert forecast(MINI, 1000, 512, [], HERE) is None


def test_records_of_the_same_code_come_before_those_of_other_code() -> None:
    """Code that decodes twice as fast is predicted by its own records once it has two."""
    old = [replace(run_at(MINI, 1000, d, 2.0), commit="old") for d in ("a", "b")]
    new = [replace(run_at(MINI, 1000, d), commit="new") for d in ("c", "d")]
    assert relevant(MINI, [*old, *new], HERE) == (new, True)
    assert relevant(MINI, [*old, *new], HERE, "old") == (old, True)
    assert relevant(MINI, old, HERE, "newer") == (old, True)
    assert all(one.decode_error == pytest.approx(0) for one in check([*old, *new]))
    (lone,) = check([*old, new[0]])[2:]
    assert lone.decode_error == pytest.approx(-0.5), "the first run of new code has none beside it"
    found = forecast(MINI, 1000, 512, [*old, *new], HERE)
    assert found is not None and found.step_s == pytest.approx(new[0].step_s)


def test_no_record_predicts_itself() -> None:
    runs = [run_at(MINI, 1000, "a", 1.0), run_at(MINI, 1000, "b", 2.0)]
    one, two = check(runs)
    assert one.decode_error == pytest.approx(-0.5) and two.decode_error == pytest.approx(1.0)
    assert one.cache_error == 0 and one.own
    assert one.peak_error is None  # not recorded
    (alone,) = check(runs[:1])
    assert alone.step_s is None and alone.decode_error is None and alone.peak_bytes is None


def test_memory_beside_the_weights() -> None:
    assert reserve([run_at(MINI, 1000, "a"), run_at(FLASH, 10, "a")]) == 250 * 2**20
    assert reserve([]) is None


def test_a_token_passes_through_the_active_weights() -> None:
    """Flash: 7,948,825,160 B beside experts and embedding, less MTP; 43 x 6 experts of 13.4 MB."""
    experts = 43 * 6 * 13_369_344
    assert experts < used_bytes(FLASH) < experts + 7_948_825_160


def test_the_projects_own_records_are_predicted() -> None:
    """Cache to the byte; peak memory within 5 % of what the record nearest in time says.

    Decode: the middle of the errors within 25 %.
    """
    found = check(runs_of(RESULTS))
    assert len(found) >= 14
    assert all(one.cache_error == 0 for one in found)
    peaks = [abs(one.peak_error) for one in found if one.peak_error is not None]
    assert len(peaks) >= 14 and max(peaks) < 0.05
    errors = sorted(abs(one.decode_error) for one in found if one.decode_error is not None)
    assert errors[len(errors) // 2] < 0.25


def record(**changes: Any) -> dict[str, Any]:
    row = {
        "backend": "auto", "depth_tokens": 100, "interval_tokens_per_s": 50.0,
        "decode_tokens_per_s": 10.0, "cache_bytes": 7,
    }  # fmt: skip
    settings = {"model": "mine", "backend": "auto", "threads": 2, "cache": "release"}
    settings |= {"chunk_tokens": 64, "decode_steps": 4, "config": json.dumps(FLASH.to_dict())}
    return {
        "format": "overleap.record/1", "date": "d", "machine": {"cpu": "c", "cores": 2},
        "settings": settings, "numbers": [row, row | {"depth_tokens": 300}],
    } | changes  # fmt: skip


def test_records_are_read_with_the_config_in_them(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    assert runs_of(tmp_path) == []
    unknown = record()
    del unknown["settings"]["config"]
    path.write_text(json.dumps(record()) + "\n" + json.dumps(unknown) + "\n")
    first, second = runs_of(tmp_path)  # whose config nobody knows is left out
    assert first.config == FLASH and (first.read_tokens, second.read_tokens) == (100, 200)
    assert (first.read_s, second.read_s, first.step_s) == (2.0, 4.0, 0.1)
    assert first.where == Where("c", 2, 2, "auto")


def test_the_newest_runs_of_a_model_say_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overleap.devices.cpu_name", lambda: HERE.cpu)
    monkeypatch.setattr("overleap.machine.cores", lambda: 2)
    runs = [
        replace(run_at(config, 1000, "a"), where=replace(HERE, threads=threads, device=device))
        for config, threads, device in ((MINI, 2, "cpu"), (FLASH, 1, "cpu"), (MINI, 3, "a GPU"))
    ]
    assert Where.here() == Where.here(runs, MINI) == HERE
    assert Where.here(runs, FLASH).threads == Where.here(runs, PRO).threads == 1


NOTHING = record()["numbers"][0]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        json.dumps(record(format="other/1")),
        json.dumps(record(machine={})),
        json.dumps(record(numbers=[7])),
        json.dumps(record(settings=record()["settings"] | {"config": "{}"})),
        *(
            json.dumps(record(numbers=[NOTHING | {name: 0}]))
            for name in ("decode_tokens_per_s", "interval_tokens_per_s", "cache_bytes")
        ),
    ],
)
def test_what_is_no_record_is_refused_by_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "speed.jsonl").write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(OverleapError, match=r"speed\.jsonl:2 is no record"):
        runs_of(tmp_path)
