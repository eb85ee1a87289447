"""`overleap bench`: table, record and picture, several backends, and the released geometry."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from overleap import kernels
from overleap.cli import app
from overleap.errors import BackendError, CapacityError, ConfigError, OverleapError, RequestError
from overleap.eval import record as records
from overleap.eval import speed
from overleap.kernels.spec import COARSE, OP_NAMES


def bench(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "160"}).invoke(
        app, ["bench", *map(str, arguments)], catch_exceptions=False
    )


def test_it_prints_and_records(tmp_path: Path, seed: int) -> None:
    common = ["random", "--depth", 130, "--depth", 7, "--decode", 1, "--seed", seed]
    shown = bench(*common, "--results", tmp_path, "--json")
    [record] = records.read(tmp_path / "speed.jsonl")
    assert shown.stdout == record.to_json() + "\n"
    assert "recorded in" in shown.stderr
    assert [row["depth_tokens"] for row in record.numbers] == [7, 130]
    assert record.weights == f"normal, seed {seed}"
    assert record.settings["threads"] == torch.get_num_threads()
    shown = bench(*common, "--results", tmp_path, "--no-save")
    assert "decode" in shown.stdout
    assert "recorded" not in shown.stderr
    assert len(records.read(tmp_path / "speed.jsonl")) == 1


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second backend: the definition under another name."""
    monkeypatch.setitem(kernels.OWN, "twin", "overleap.kernels.torch")
    return "twin"


def test_backends_are_compared_in_one_record(tmp_path: Path, twin: str, seed: int) -> None:
    named = ["--backend", "torch", "--backend", twin, "--seed", seed]
    shown = bench("random", "--depth", 9, "--depth", 140, "--decode", 2, *named,
                  "--results", tmp_path)  # fmt: skip
    [record] = records.read(tmp_path / "speed.jsonl")
    assert [(row["backend"], row["depth_tokens"]) for row in record.numbers] == [
        ("torch", 9),
        ("torch", 140),
        (twin, 9),
        (twin, 140),
    ]
    for base, row in zip(record.numbers[:2], record.numbers[2:], strict=True):
        assert row["prefill_ratio"] == base["prefill_s"] / row["prefill_s"]
        assert row["decode_ratio"] == pytest.approx(
            row["decode_tokens_per_s"] / base["decode_tokens_per_s"]
        )
        assert row["cache_bytes"] == base["cache_bytes"]
    assert record.settings["backend"] == f"torch, {twin}"
    fine, coarse = (" ".join(n for n in OP_NAMES if (n in COARSE) is c) for c in (False, True))
    assert record.settings["ops_of_torch"] == f"torch: {fine}; fine ops: {coarse}"
    assert record.settings["ops_of_twin"] == f"twin: {fine}; fine ops: {coarse}"
    assert "backend" in shown.stdout and twin in shown.stdout


def test_the_depths_end_where_asked(tmp_path: Path) -> None:
    bench("random", "--to", 1030, "--decode", 1, "--backend", "torch", "--results", tmp_path)
    [record] = records.read(tmp_path / "speed.jsonl")
    assert [row["depth_tokens"] for row in record.numbers] == [1024, 1030]
    assert [row["interval_tokens"] for row in record.numbers] == [1024, 6]


def test_the_run_just_made_is_drawn_beside_its_record(tmp_path: Path) -> None:
    shown = bench("random", "--depth", 3, "--depth", 5, "--decode", 1, "--backend", "torch",
                  "--results", tmp_path, "--plot")  # fmt: skip
    picture = tmp_path / "speed.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"drawn in {picture}" in shown.stderr
    picture.unlink()
    shown = bench("--plot-of", tmp_path / "speed.jsonl")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(records.read(tmp_path / "speed.jsonl")) == 1


def test_without_matplotlib_the_record_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OverleapError, match="needs matplotlib") as caught:
        bench("random", "--depth", 3, "--decode", 1, "--backend", "torch",
              "--results", tmp_path, "--plot")  # fmt: skip
    assert caught.value.hint == "pip install overleap[plots]"
    assert len(records.read(tmp_path / "speed.jsonl")) == 1
    assert not (tmp_path / "speed.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--depth", 5, "--to", 9], "both say how deep"),
        (["--plot", "--no-save"], "--plot draws the saved record"),
        (["--plot", "--geometry", "v4-flash"], "--plot draws the saved record"),
        (["--backend", "torch", "--backend", "torch"], "names one twice"),
        (["--plot-of", "no/such.jsonl"], "no/such.jsonl cannot be read"),
        (["--plot-of", os.devnull], "holds no record"),
        (["--geometry", "v4-flash"], "MODEL would do nothing in --geometry"),
        (["--context", 256], "--context would do nothing in a run by depth"),
        (["--rounds", 2], "--rounds would do nothing"),
        (["--versus", "transformers", "--cache", "wide", "--to", 9], "--to, --cache would do"),
        (["--versus", "transformers", "--geometry", "v4-flash"], "--versus, MODEL would do"),
        (["--versus", "v3.2"], "MODEL would do nothing in --versus v3.2"),
        (["--versus", "transformers"], "`random` is in memory only"),
    ],
)
def test_contradictions_are_refused(arguments: list[object], complaint: str) -> None:
    with pytest.raises(OverleapError, match=complaint):
        bench("random", *arguments)


@pytest.mark.parametrize("patience", ["-1", "0", "nan", "inf"])
def test_patience_is_a_number_above_0(patience: str) -> None:
    with pytest.raises(RequestError, match=f"--patience is {float(patience)}") as caught:
        bench("mini", "--versus", "transformers", f"--patience={patience}")
    assert "above 0" in str(caught.value.hint)


@pytest.mark.parametrize("threads", [1025, 40_000])
def test_more_threads_than_a_system_has_room_for_are_refused(threads: int) -> None:
    shown = bench("random", "--depth", 1, "--no-save", "--threads", threads)
    assert shown.exit_code == 2
    assert "'--threads': Input should be less than or equal to 1024" in shown.stderr


@pytest.mark.parametrize("option", ["--depth", "--to", "--decode", "--chunk"])
def test_a_geometry_has_no_depths(option: str) -> None:
    with pytest.raises(RequestError, match=f"{option} would do nothing in --geometry"):
        bench("--geometry", "v4-flash", option, 16)


@pytest.mark.parametrize("context", [0, -128, 64, 129])
@pytest.mark.parametrize("way", [["--geometry", "v4-flash"], ["--versus", "v3.2"]])
def test_a_cache_is_of_whole_pages(way: list[str], context: int) -> None:
    with pytest.raises(RequestError, match=f"--context is {context}") as caught:
        bench(*way, "--context", context)
    assert "128 at least" in str(caught.value.hint)


@pytest.mark.parametrize("end", [KeyboardInterrupt, CapacityError("no memory is left")])
def test_depths_that_were_measured_are_kept(
    tmp_path: Path, end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second depth ends the run."""
    make_room = speed._Reading.make_room

    def ended(self: Any, tokens: int) -> None:
        if tokens > 100:
            raise end
        make_room(self, tokens)

    monkeypatch.setattr(speed._Reading, "make_room", ended)
    run = ["bench", "random", "--depth", "3", "--depth", "300", "--decode", "1"]
    shown = CliRunner().invoke(app, [*run, "--backend", "torch", "--results", str(tmp_path)])
    assert shown.exit_code != 0
    [record] = records.read(tmp_path / "speed.jsonl")
    assert [row["depth_tokens"] for row in record.numbers] == [3]
    assert "recorded in" in shown.stderr and "decode/s" in shown.stdout


def test_a_backend_that_cannot_serve_is_refused_before_any_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("overleap.eval.speed.open_model", None)
    with pytest.raises(BackendError, match="no kernel backend is called 'none'"):
        bench("random", "--backend", "torch", "--backend", "none")


@pytest.mark.parametrize(("load", "noted"), [(0.9, False), (999.0, True), (None, False)])
def test_a_busy_machine_is_noted(
    load: float | None, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_load", lambda: load)
    shown = bench("random", "--depth", 1, "--decode", 1, "--no-save")
    assert ("shared the" in shown.stderr) == noted


@pytest.mark.parametrize(("name", "per_token"), [("v4-flash", 3514.25), ("v4-pro", 5031.4375)])
def test_the_released_geometry(name: str, per_token: float, tmp_path: Path) -> None:
    shown = bench("--geometry", name, "--context", 1024, "--results", tmp_path, "--json")
    whole, *parts = json.loads(shown.stdout)["numbers"]
    assert whole["page_bytes"] / 1024 == whole["formula_bytes_per_token"] == per_token
    assert [part["layers"] for part in parts] == {
        "v4-flash": [21, 21, 20, 2],
        "v4-pro": [30, 30, 31],
    }[name]
    assert all(part["step_s"] > 0 for part in parts)
    assert parts[0]["read_bytes"] == parts[0]["layers"] * 256 * 68
    assert [part["unit"] for part in parts] == ["int8"] + ["bf16"] * (len(parts) - 1)
    limits = json.loads(shown.stdout)["settings"]
    for part in parts:
        assert part["moved_bytes"] > part["read_bytes"] and part["operations"] > 0
        ops = limits[f"ceiling_{part['unit']}_op_per_s"] or limits["ceiling_f32_op_per_s"]
        reading = part["moved_bytes"] / limits["ceiling_read_bytes_per_s"]
        least_s = max(reading, part["operations"] / ops)
        assert part["share"] == pytest.approx(least_s / part["step_s"])
        assert (part["ceiling"] == "read") == (least_s == reading)


def test_the_geometry_of_several_backends(tmp_path: Path, twin: str) -> None:
    shown = bench("--geometry", "v4-flash", "--context", 256, "--backend", "torch",
                  "--backend", twin, "--results", tmp_path, "--json")  # fmt: skip
    rows = json.loads(shown.stdout)["numbers"]
    assert [row["backend"] for row in rows] == ["torch"] * 5 + [twin] * 5
    assert [row.get("part") for row in rows[:5]] == [row.get("part") for row in rows[5:]]


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no preset is called 'v9'"):
        bench("--geometry", "v9")
    monkeypatch.setattr("overleap.eval.geometry.free_bytes", lambda device: 10**9)
    with pytest.raises(CapacityError, match=r"takes 3\.4 GiB, 953\.7 MiB is free"):
        bench("--geometry", "v4-flash")


def test_both_generations_are_measured(tmp_path: Path) -> None:
    both = ("--backend", "torch", "--backend", "cpu")
    shown = bench("--versus", "v3.2", "--geometry", "v4-flash", "--context", 4096, *both,
                  "--results", tmp_path, "--json")  # fmt: skip
    record = json.loads(shown.stdout)
    assert record["subject"] == "generations" and record["settings"]["geometry"] == "v4-flash"
    rows = record["numbers"]
    assert [row["backend"] for row in rows] == ["torch", "cpu"]
    for row in rows:
        assert row["cache_ratio"] == row["cache_ratio_computed"]
        assert row["time_ratio"] == row["v32_step_s"] / row["step_s"]
    assert (tmp_path / "generations.jsonl").exists()
    with pytest.raises(RequestError, match="--context is 1000"):
        bench("--versus", "v3.2", "--context", 1000)
    with pytest.raises(RequestError, match=r"v3\.2, transformers"):
        bench("--versus", "v3.2", "--versus", "transformers")
