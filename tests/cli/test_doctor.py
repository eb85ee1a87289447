"""What the doctor and the preflight see, on this machine and on machines that lack something."""

import json
import resource
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from overleap import devices
from overleap.cli import app, doctor, preflight
from overleap.cli.preflight import Check, Level, checks, worst
from overleap.errors import BackendError, CapacityError, OverleapError
from overleap.kernels import OWN, Served
from overleap.kernels.spec import OP_NAMES

GIB = 2**30


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], catch_exceptions=False)


def found(seen: list[Check], name: str) -> Check:
    return next(check for check in seen if name in check.name)


def test_one_json_and_a_status_by_severity(tmp_path: Path) -> None:
    result = run("--json", "--cache-dir", tmp_path)
    said = json.loads(result.stdout)
    levels = {"ok": 0, "warning": 1, "error": 2}
    assert result.exit_code == levels[said["level"]]
    assert levels[said["level"]] == max(levels[check["level"]] for check in said["checks"])
    areas = {check["area"] for check in said["checks"]}
    assert areas == {
        "versions", "memory", "disk", "limits", "processor", "device", "kernels", "model",
    }  # fmt: skip
    served = [c["value"] for c in said["checks"] if c["area"] == "kernels"]
    assert {op for text in served for op in text.split(": ")[1].split()} == set(OP_NAMES)
    for check in said["checks"]:
        assert check["level"] == "ok" or check["hint"], check


def test_for_people_it_counts(tmp_path: Path) -> None:
    shown = run("--cache-dir", tmp_path).stdout
    assert "errors, " in shown and "safetensors" in shown


@pytest.mark.parametrize(
    ("free", "level"), [(8 * GIB, Level.OK), (GIB, Level.WARNING), (GIB // 8, Level.ERROR)]
)
def test_little_memory(
    free: int, level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight.machine, "free_bytes", lambda: free)
    monkeypatch.setattr(preflight, "available_bytes", lambda proc: 16 * GIB)
    check = found(checks(tmp_path), "free memory")
    assert check.level is level
    assert "by the control group" in check.value and (level is Level.OK or check.hint)
    result = run("--json", "--cache-dir", tmp_path)
    assert result.exit_code >= int(level)
    if level is Level.ERROR:
        with pytest.raises(CapacityError, match=r"free memory: 128\.0 MiB"):
            preflight.preflight(tmp_path)
        assert "processor" not in result.stdout  # torch is not imported into so little


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight.machine, "free_bytes", lambda: None)
    assert found(checks(tmp_path), "free memory").level is Level.OK
    assert preflight.total_bytes(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 4 kB\n")
    assert preflight.total_bytes(tmp_path) == 8192
    assert preflight.available_bytes(tmp_path) == 4096


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        if name == "blake3":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(preflight, "version", version)
    check = found(checks(tmp_path), "blake3")
    assert (check.level, check.hint) == (Level.ERROR, "pip install blake3")
    with pytest.raises(OverleapError, match="blake3: is not installed"):
        preflight.preflight(tmp_path)
    monkeypatch.setattr(preflight, "PYTHON", (9, 9))
    assert found(checks(tmp_path), "python").level is Level.ERROR


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = tmp_path / "not" / "yet"
    usage = type(preflight.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: usage(9, 9, GIB))
    check = found(checks(where), str(where))
    assert (check.value, check.level) == ("1.0 GiB free", Level.WARNING)
    monkeypatch.setattr(preflight.os, "access", lambda place, mode: False)
    assert "cannot be written" in found(checks(where), str(where)).value
    assert not [check for check in checks(None) if check.area == "disk"]

    def unseen(place: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preflight.shutil, "disk_usage", unseen)
    assert "cannot be seen" in found(checks(where), str(where)).value
    monkeypatch.setattr(Path, "exists", unseen)  # as of folders in another user's home
    assert "cannot be seen" in found(preflight._disk(where), str(where)).value


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_AS: GIB, resource.RLIMIT_DATA: -1}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    seen = checks(tmp_path)
    assert found(seen, "open files").level is Level.WARNING
    assert found(seen, "address space").level is Level.WARNING
    assert found(seen, "private memory").value == "unlimited"
    assert worst(seen) is Level.WARNING


def test_warnings_are_noted_once_and_nothing_is_raised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = [
        Check("limits", "a", "fine"),
        Check("limits", "b", "tight", Level.WARNING, "loosen it"),
    ]
    monkeypatch.setattr(preflight, "checks", lambda folder: sample)
    preflight.preflight(tmp_path)
    assert capsys.readouterr().err.strip() == "b: tight; loosen it"


def test_a_device_that_torch_does_not_drive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "accelerators", list)
    assert doctor._accelerators(tmp_path)[0].level is Level.OK
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "davinci0").write_text("")
    (check,) = doctor._accelerators(tmp_path)
    assert (
        check.level is Level.WARNING and "Ascend" in check.value and "torch_npu" in str(check.hint)
    )


def test_ops_that_the_definition_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    served = [
        Served("matmul", "cpu", ""),
        Served("attend", "torch", "cpu has none"),
    ]
    monkeypatch.setattr("overleap.kernels.table", lambda wanted: served)
    fast, slow = doctor._kernels()
    assert (fast.level, slow.level) == (Level.OK, Level.WARNING)
    assert "cpu has none" in str(slow.hint) and "attend" in slow.value

    def broken(wanted: str) -> list[Served]:
        raise BackendError("no kernels", "build them")

    monkeypatch.setattr("overleap.kernels.table", broken)
    assert doctor._kernels()[0].level is Level.ERROR
    assert "cpu" in OWN


def test_fewer_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from overleap.eval import record

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(record, "cores", lambda: 8)
    check = found(doctor._processor(), "cores")
    assert check.level is Level.WARNING and "OMP_NUM_THREADS is 1" in check.value


def test_ask_runs_the_preflight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.setattr(preflight.machine, "free_bytes", lambda: 2**20)
    with pytest.raises(CapacityError, match=r"free memory: 1\.0 MiB"):
        CliRunner().invoke(app, ["ask", str(tmp_path / "a.txt"), "What?"], catch_exceptions=False)
