"""Who serves each op: other packages' backends, what is left to torch, no compiler at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from overleap import kernels
from overleap.cache.layout import CacheFormat
from overleap.checkpoint import load, locate
from overleap.cli import app
from overleap.errors import BackendError
from overleap.eval.logits import all_logits
from overleap.kernels import backends, identity, native, select, shortfall, table
from overleap.kernels.conformance import conform
from overleap.kernels.spec import LEFT_TO_TORCH, OP_NAMES
from overleap.kernels.torch.linear import hadamard

ROOT = Path(__file__).resolve().parents[2]
CHIP = '''
"""Kernels for a chip that is not in the house: one op of its own."""

import torch

from overleap.errors import BackendError


def hadamard(x):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (x.double() @ matrix * len(matrix) ** -0.5).to(x.dtype)


def ops(device):
    return {"hadamard": hadamard}


def refusing(device):
    raise BackendError(f"somechip is no device of type {device}")


def too_many(device):
    return {"hadamard": hadamard, "levitate": hadamard}
'''


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution as pip leaves it: a module, and a dist-info folder with an entry point."""
    (tmp_path / "some_chip.py").write_text(CHIP, "utf-8")
    info = tmp_path / "some_chip-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-chip\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[overleap.kernels]\nsomechip = some_chip\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_chip", raising=False)
    return "somechip"


def test_a_backend_of_another_package_is_found_and_served(chip: str, seed: int) -> None:
    assert chip in backends()
    ops = select(chip)
    assert ops.hadamard.__module__ == "some_chip"  # type: ignore[attr-defined]
    served = {row.op: row for row in table(chip)}
    assert served["hadamard"].backend == chip and served["hadamard"].reason == ""
    assert served["attend"].backend == "torch" and served["attend"].reason == f"{chip} has none"
    assert not native(chip)
    verdicts = conform(ops, seed=seed, only=["hadamard"])
    assert verdicts and all(v.passed for v in verdicts)


def test_its_command_says_so_too(chip: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "overleap.cli", "conform", "--backend", chip, "--op", "hadamard"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "somechip" in done.stdout


def test_an_op_that_the_contract_lacks_is_refused(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(chip)
    module = sys.modules["some_chip"]
    monkeypatch.setattr(module, "ops", module.too_many)
    with pytest.raises(BackendError, match="offers levitate"):
        select(chip)


def test_ops_that_are_no_function_or_return_no_mapping_are_refused(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(chip)
    module = sys.modules["some_chip"]
    monkeypatch.setattr(module, "ops", lambda device: [module.hadamard])
    with pytest.raises(BackendError, match="returned list"):
        select(chip)
    monkeypatch.delattr(module, "ops")
    with pytest.raises(BackendError, match="has no function `ops`"):
        select(chip)


def test_a_backend_that_does_not_exist_is_refused_with_those_that_do(chip: str) -> None:
    with pytest.raises(BackendError, match="no kernel backend is called 'rope'") as refused:
        select("rope")
    assert chip in str(refused.value.hint)


def test_an_import_error_inside_a_backend_is_shown(chip: str, tmp_path: Path) -> None:
    (tmp_path / "some_chip.py").write_text("import no_such_driver\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_driver"):
        select(chip)


def test_auto_asks_other_packages_after_what_is_made_for_the_device(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device whose row is empty it comes first; elsewhere it serves what ours lacks."""
    assert kernels.asked("auto", "npu") == (chip,)
    assert kernels.asked("auto", "cpu") == ("cpu", chip)
    assert kernels.asked("torch", "npu") == ("torch",)
    empty = {row.op: row for row in table("auto", "npu")}
    assert (empty["hadamard"].backend, empty["hadamard"].reason) == (chip, "")
    assert (empty["attend"].backend, empty["attend"].reason) == ("torch", f"{chip} has none")
    assert shortfall("npu") is None
    monkeypatch.setattr(sys.modules["some_chip"], "ops", sys.modules["some_chip"].refusing)
    assert shortfall("npu") == (
        f"the torch backend serves every op: {chip}: somechip is no device of type npu"
    )
    if _built():
        assert {row.backend for row in table("auto", "cpu")} == {"cpu", "torch"}


def test_auto_serves_an_op_that_ours_lacks_by_another_package(
    chip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _built():
        pytest.skip("the native kernels are not built")
    select(chip)
    mine = dict.fromkeys(("hadamard", "orthogonalise"), torch.clone)
    monkeypatch.setattr(sys.modules["some_chip"], "ops", lambda device: mine)
    served = {row.op: row.backend for row in table()}
    assert (served["hadamard"], served["orthogonalise"]) == ("cpu", chip)


def test_a_model_built_with_auto_runs_the_ops_of_another_package(
    chip: str, unbuilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(chip)
    module, calls = sys.modules["some_chip"], []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return hadamard(x)

    monkeypatch.setattr(module, "ops", lambda device: {"hadamard": counted})
    all_logits(load(locate("mini")), list(range(9)), CacheFormat.RELEASE, 9)
    assert calls


def test_a_broken_package_is_shown_and_leaves_auto_the_rest(chip: str, tmp_path: Path) -> None:
    (tmp_path / "some_chip.py").write_text("import no_such_driver\n")
    said = f"{chip}: ModuleNotFoundError: No module named 'no_such_driver'"
    assert {row.backend for row in table("auto", "npu")} == {"torch", kernels.COMPOSED}
    assert {row.reason for row in table("auto", "npu")} == {said}
    assert shortfall("npu") == f"the torch backend serves every op: {said}"
    rows = table("auto", "cpu")
    assert any(said in row.reason for row in rows)
    assert {row.backend for row in rows} == ({"cpu", "torch"} if _built() else {"torch"})
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["kernels"], catch_exceptions=False)
    assert f"auto on cpu: asked in order, cpu, {chip}, torch" in shown.stdout
    assert "ModuleNotFoundError" in shown.stdout


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had not been built."""
    for name in [name for name in sys.modules if name.startswith("overleap.kernels.cpu.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "overleap.kernels.cpu._native", None)


def test_without_the_extension_torch_serves_and_says_why(unbuilt: None, seed: int) -> None:
    said = shortfall()
    assert said is not None and said.startswith("the torch backend serves every op: cpu: ")
    assert "\n" not in said
    assert not native()
    assert {row.backend for row in table()} == {"torch", kernels.COMPOSED}
    assert all("native kernels are not there" in row.reason for row in table())
    x = torch.randn(3, 64)
    assert torch.equal(select().hadamard(x), hadamard(x))
    with pytest.raises(BackendError, match="native kernels are not there") as refused:
        select("cpu")
    assert "C++ compiler" in str(refused.value.hint)


def test_only_missing_native_code_means_that_no_step_is_recorded(
    unbuilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, device = select(), torch.device("cpu")
    assert kernels.recorder(ops, device) is None
    monkeypatch.setitem(sys.modules, "overleap.kernels.cpu._native", ModuleType("_native"))
    monkeypatch.setitem(sys.modules, "overleap.kernels.cpu.tape", None)
    with pytest.raises(ImportError, match="tape"):
        kernels.recorder(ops, device)


def test_what_computes_has_a_name(chip: str) -> None:
    """Kept rows are of those who computed them: another backend, device or dtype is another."""
    ours, torchs, theirs = select(), select("torch"), select(chip)
    names = {
        identity(ours, "cpu", "torch.bfloat16"), identity(ours, "cpu", "torch.float32"),
        identity(ours, "cuda", "torch.bfloat16"), identity(theirs, "cpu", "torch.bfloat16"),
    }  # fmt: skip
    assert len(names) == 4
    assert identity(select(), "cpu", "torch.bfloat16") in names
    assert (identity(torchs, "cpu", "torch.bfloat16") in names) is not native()


def test_what_is_left_to_torch_says_why() -> None:
    served = {row.op: row for row in table("cpu")} if _built() else {}
    for op in served and LEFT_TO_TORCH:
        assert served[op].backend == "torch" and served[op].reason == kernels.LEFT
    assert set(LEFT_TO_TORCH) < set(OP_NAMES)
    assert native("cpu") if _built() else True
    assert not native("torch")
    assert shortfall("meta") is None


def _built() -> bool:
    try:
        select("cpu")
    except BackendError:
        return False
    return True


OLD = """#!/bin/sh
exec {compiler} -U__GNUC__ -D__GNUC__=10 "$@"
"""


@pytest.mark.parametrize("compiler", ["none", "old"])
def test_an_install_without_a_compiler_says_so_in_one_sentence(
    compiler: str, tmp_path: Path
) -> None:
    """CMake as pip runs it, on a machine whose PATH has no compiler, or one that says it is old."""
    pytest.importorskip("cmake")
    tools = [
        shutil.which(name, path=str(Path(sys.executable).parent)) for name in ("cmake", "ninja")
    ]
    if None in tools:
        pytest.skip("cmake and ninja are not beside this Python")
    folder = tmp_path / "bin"
    folder.mkdir()
    path = str(folder)
    if compiler == "old":
        if (real := shutil.which("g++")) is None:
            pytest.skip("there is no g++ to pretend with")
        (folder / "c++").write_text(OLD.format(compiler=real))
        (folder / "c++").chmod(0o755)
        path += os.pathsep + os.environ["PATH"]
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CXXFLAGS", "CFLAGS")}
    command = [
        *(str(tools[0]), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={tools[1]}", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    done = subprocess.run(
        command,
        env=kept | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("the torch backend will serve every op") == 1
    assert ("no C++ compiler" if compiler == "none" else "the kernels need g++ 11, not 10.") in said
    build = subprocess.run([str(tools[1]), "-C", str(tmp_path / "build"), "-t", "targets", "all"],
                           capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert "_native" not in build.stdout
