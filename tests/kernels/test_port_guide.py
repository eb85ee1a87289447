"""docs/guides/port-a-chip.md, followed to the letter: files and commands, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "port-a-chip.md").read_text("utf-8")
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Of all blocks meant for a shell, in order."""
    return [line for block in COMMANDS.findall(GUIDE) for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The guide's files, and what `pip install -e .` leaves behind of them: the metadata, made
    here since an installation would change the environment of all other tests."""
    files = dict(FILE.findall(GUIDE))
    assert list(files) == ["pyproject.toml", "mychip/__init__.py", "mychip/kernels.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    group, entry = re.findall(r'entry-points\."(\S+)"\]\n(.*)\n', files["pyproject.toml"])[0]
    info = tmp_path / "mychip_kernels-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mychip-kernels\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return tmp_path


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    assert program == "overleap"
    return subprocess.run(
        [sys.executable, "-m", "overleap.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "160"},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_guide_has_the_commands_that_are_run_here() -> None:
    assert commands() == [
        "pip install -e .",
        "overleap kernels --backend mychip",
        "overleap conform --backend mychip --op hadamard",
        "overleap conform --backend mychip --timed",
        "overleap conform --backend mychip --timed --record results",
    ]


def test_the_first_op_is_served_and_proven(folder: Path) -> None:
    _, shown, proven, *_ = commands()
    done = run(folder, shown)
    assert done.returncode == 0, done.stderr
    assert re.search(r"hadamard\s+\S*\s*mychip", done.stdout), done.stdout
    done = run(folder, proven)
    assert done.returncode == 0, done.stdout + done.stderr
    (claimed,) = set(re.findall(r"`(\d+ of \d+ cases passed)`", GUIDE))
    assert claimed in done.stdout and "not served" not in done.stdout


def test_a_green_op_of_another_backend_is_called_that(folder: Path) -> None:
    done = run(folder, "overleap conform --backend mychip --op hc_post --op hadamard")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("not served by mychip: hc_post (torch)")


def test_a_wrong_op_is_red(folder: Path) -> None:
    kernels = folder / "mychip" / "kernels.py"
    kernels.write_text(kernels.read_text("utf-8").replace("width**-0.5", "width**-0.4"), "utf-8")
    done = run(folder, commands()[2])
    assert done.returncode == 1 and "FAILED" in done.stdout


def test_an_exception_is_told_once_with_how_many_cases_raised_it(folder: Path) -> None:
    kernels = folder / "mychip" / "kernels.py"
    kernels.write_text("def hadamard(x):\n    raise ValueError('no queue: try later')\n", "utf-8")
    done = run(folder, commands()[2])
    assert done.returncode == 1 and done.stdout.count("FAILED raised ValueError") == 9
    assert done.stdout.count("no queue") == 1
    assert "\n9 cases raised ValueError: no queue: try later\n" in done.stdout
    found = json.loads(run(folder, f"{commands()[2]} --json").stdout)["verdicts"]
    assert [v["reason"] for v in found] == ["raised ValueError: no queue: try later"] * 9


def test_another_device_is_refused_in_a_sentence(folder: Path) -> None:
    """Of a type that this machine need not have."""
    code = "from overleap.kernels import table; table('mychip', 'meta')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "mychip is no device of type meta" in done.stderr


def test_a_model_runs_with_the_backend(folder: Path) -> None:
    """The call of section 5, on the device that the page's chip pretends to be."""
    (call,) = re.findall(r'`(overleap\.load\(path, device="npu", backend="mychip"\))`', GUIDE)
    code = f"""
import sys, overleap
from overleap.engine.engine import Engine
path = "mini"
model = {call.replace("npu", "cpu")}
request = overleap.Request(prompt=[7, 11], sampling=overleap.Sampling(max_tokens=2, stop_ids=()))
print(len(Engine(model, memory_bytes=64 << 20).generate(request).tokens))
print("mychip.kernels" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["2", "True"], done.stderr


def test_auto_asks_the_backend_too(folder: Path) -> None:
    done = run(folder, "overleap kernels")
    assert done.returncode == 0, done.stderr
    assert "auto on cpu: asked in order, cpu, mychip, torch" in done.stdout


@pytest.mark.slow
def test_the_whole_port_is_green(folder: Path) -> None:
    *_, timed, whole = commands()
    for command in (whole, timed):
        done = run(folder, command)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.slow
def test_pip_takes_the_folder(folder: Path) -> None:
    """With the builder that is here; the entry point is what pip makes of it."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(folder / "target"), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (written,) = (folder / "target").glob("*.dist-info/entry_points.txt")
    assert written.read_text().split() == ["[overleap.kernels]", "mychip", "=", "mychip"]


@pytest.mark.slow
def test_state_is_equal_with_the_backend(folder: Path) -> None:
    """The command of section 5, for some of its ways; the chip's device is the CPU here."""
    (found,) = re.findall(r"^(OVERLEAP_TEST_DEVICE=npu .*)$", GUIDE, re.MULTILINE)
    *variables, python, _, module, tests = found.replace("npu", "cpu").split()
    assert (python, module) == ("python", "pytest")
    done = subprocess.run(
        [sys.executable, "-m", module, tests, "-v", "-k", "wide and (batched or snapshot)"],
        env=os.environ
        | dict(variable.split("=") for variable in variables)
        | {"PYTHONPATH": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:] + done.stderr
