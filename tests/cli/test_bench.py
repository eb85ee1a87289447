"""`overleap bench`: the table, the record, the busy machine, and the released geometry."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from overleap.cli import app
from overleap.errors import CapacityError, ConfigError
from overleap.eval import record as records


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


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


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no preset is called 'v9'"):
        bench("--geometry", "v9")
    monkeypatch.setattr("overleap.eval.geometry.free_bytes", lambda: 10**9)
    with pytest.raises(CapacityError, match=r"takes 3\.4 GiB, 953\.7 MiB is free"):
        bench("--geometry", "v4-flash")
