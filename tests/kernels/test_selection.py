"""Who serves each op: other packages' backends, what is left to torch, no compiler at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overleap import kernels
from overleap.errors import BackendError
from overleap.kernels import backends, native, select, shortfall, table
from overleap.kernels.conformance import conform
from overleap.kernels.spec import LEFT_TO_TORCH, OP_NAMES
from overleap.kernels.torch.linear import hadamard

ROOT = Path(__file__).resolve().parents[2]
CHIP = '''
"""Kernels for a chip that is not in the house: one op of its own."""

import torch


def hadamard(x):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < x.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (x.double() @ matrix * len(matrix) ** -0.5).to(x.dtype)


def ops(device):
    return {"hadamard": hadamard}


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


def test_an_install_without_a_compiler_says_so_in_one_sentence(tmp_path: Path) -> None:
    """CMake as pip runs it, on a machine whose PATH has no compiler."""
    pytest.importorskip("cmake")
    tools = [
        shutil.which(name, path=str(Path(sys.executable).parent)) for name in ("cmake", "ninja")
    ]
    if None in tools:
        pytest.skip("cmake and ninja are not beside this Python")
    empty = tmp_path / "bin"
    empty.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC", "CXXFLAGS", "CFLAGS")}
    command = [
        *(str(tools[0]), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={tools[1]}", f"-DPython_EXECUTABLE={sys.executable}"),
    ]
    done = subprocess.run(
        command,
        env=kept | {"PATH": str(empty)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("the torch backend will serve every op") == 1
    assert "no C++ compiler" in said
    build = subprocess.run([str(tools[1]), "-C", str(tmp_path / "build"), "-t", "targets", "all"],
                           capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    assert "_native" not in build.stdout
