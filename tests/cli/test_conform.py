"""`overleap conform`: table, one JSON, figures against the machine; what is red is not measured."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from overleap import kernels
from overleap.cli import app
from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.conformance import ceilings as measured
from overleap.kernels.conformance import gate


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*map(str, arguments)], catch_exceptions=False
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings from small products: the figures are not looked at."""
    monkeypatch.setattr(measured, "SIZE", {"cpu": 96, "other": 96})
    monkeypatch.setattr(measured, "LARGE_BYTES", 1 << 22)
    monkeypatch.setattr(measured, "_measured", measured._measured.__wrapped__)


def test_timed_says_error_rates_and_share(quick: None, seed: int) -> None:
    command = ("conform", "--op", "hc_post", "--op", "sample", "--seed", seed, "--timed")
    said = json.loads(run(*command, "--json").stdout)
    assert said["threads"] == torch.get_num_threads() and said["seed"] == seed
    for name in ("read", "f32", "bf16", "int8"):
        assert said["ceilings"][name]["per_s"] > 0 and said["ceilings"][name]["how"]
    timed = [v for v in said["verdicts"] if v["seconds"] is not None]
    assert {v["op"] for v in timed} == {"hc_post", "sample"}
    for v in timed:
        assert v["gigabytes_per_s"] == pytest.approx(v["bytes"] / v["seconds"] / 1e9)
        assert v["gigaops_per_s"] == pytest.approx(v["operations"] / v["seconds"] / 1e9)
        assert v["ceiling"] in ("read", "f32") and v["share"] > 0
    shown = run(*command).stdout
    assert "of the ceiling" in shown and "ceilings of cpu" in shown
    assert f"{len(said['verdicts'])} of {len(said['verdicts'])} cases passed" in shown


def test_without_timed_there_are_no_rates() -> None:
    said = json.loads(run("conform", "--op", "hadamard", "--json").stdout)
    assert said["ceilings"] is None
    assert {v["seconds"] for v in said["verdicts"]} == {None}
    assert "GB/s" not in run("conform", "--op", "hadamard").stdout


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend whose Hadamard transform is wrong in its last column."""
    good = select("torch")

    def hadamard(x: Tensor) -> Tensor:
        out = good.hadamard(x)
        out[..., -1] = 0
        return out

    module: Any = ModuleType("red_backend")
    module.ops = lambda device: {**select_all(), "hadamard": hadamard}
    monkeypatch.setitem(kernels.OWN, "red", "red_backend")
    monkeypatch.setitem(__import__("sys").modules, "red_backend", module)
    gate._red.cache_clear()
    return "red"


def select_all() -> dict[str, Any]:
    return dict(kernels.import_module("overleap.kernels.torch").ops("cpu"))


def test_a_red_op_is_not_measured(red: str, tmp_path: Path) -> None:
    for what in (["random", "--depth", 7], ["--geometry", "v4-flash", "--context", 256]):
        with pytest.raises(BackendError, match="its op hadamard is wrong") as refused:
            run("bench", *what, "--backend", red, "--results", tmp_path)
        assert "\n" not in refused.value.message
        assert f"overleap conform --backend {red} --op hadamard" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []
    assert run("conform", "--backend", red, "--op", "hadamard").exit_code == 1


def test_a_green_backend_is_proven_once_in_a_process() -> None:
    gate._red.cache_clear()
    gate.refuse_red("torch")
    gate.refuse_red("torch")
    assert gate._red.cache_info().hits == 1


def test_a_run_of_some_ops_renews_their_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The support table of a run of two ops and a newer one of one of them, which fails."""
    page = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", page)
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    record = ["conform", "--backend", "torch", "--record", tmp_path]
    run(*record, "--op", "hadamard", "--op", "rotate", "--op", "hc_head")
    path = tmp_path / "conform.jsonl"
    monkeypatch.setattr(generate, "RECORDS", path)
    before = generate.support()
    run(*record, "--op", "hadamard")
    first, second = path.read_text("utf-8").splitlines()
    later = json.loads(second) | {"date": "2099-01-01T00:00:00+00:00"}
    later["numbers"][0]["passed"] -= 1
    path.write_text(f"{first}\n{json.dumps(later)}\n", "utf-8")
    after = generate.support()
    for op in ("rotate", "hc_head", "matmul"):
        (cell,) = (line for line in before.splitlines() if line.startswith(f"| `{op}` |"))
        assert cell in after.splitlines()
    assert "| `hadamard` | FAILED: torch" in after and "; `hadamard`: 2099-01-01" in after
