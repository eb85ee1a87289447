"""Free memory as the kernel tells it, with control groups of both versions made up in a folder."""

import mmap
from pathlib import Path

import pytest

from overleap import machine

MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, "ascii")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc", meminfo=f"MemTotal: 9999 kB\nMemAvailable: {800 * 1024} kB\n")
    return tmp_path / "proc"


def test_without_groups_the_system_decides(proc: Path, tmp_path: Path) -> None:
    assert machine.free_bytes(proc, tmp_path / "none") == 800 * MIB


def test_the_tightest_group_of_version_2_decides(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    write(proc / "self", cgroup="0::/outer/inner\n")
    write(groups, memory__stat="inactive_file 0\n")  # the root group has no limit file
    write(
        groups / "outer",
        memory__max=f"{300 * MIB}\n",
        memory__current=f"{100 * MIB}\n",
        memory__stat=f"anon 5\ninactive_file {20 * MIB}\n",
    )
    write(groups / "outer" / "inner", memory__max="max\n", memory__current="7\n", memory__stat="")
    assert machine.free_bytes(proc, groups) == 220 * MIB


def test_version_1(proc: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    write(proc / "self", cgroup="5:cpu,cpuacct:/job\n4:memory:/job\n")
    write(
        groups / "memory" / "job",
        memory__limit_in_bytes=f"{200 * MIB}\n",
        memory__usage_in_bytes=f"{150 * MIB}\n",
        memory__stat=f"total_inactive_file {30 * MIB}\n",
    )
    write(
        groups / "memory",
        memory__limit_in_bytes="9223372036854771712\n",
        memory__usage_in_bytes="1\n",
        memory__stat="",
    )
    assert machine.free_bytes(proc, groups) == 80 * MIB


def test_a_group_over_its_limit_has_no_room(proc: Path, tmp_path: Path) -> None:
    write(proc / "self", cgroup="0::/\n")
    write(tmp_path / "g", memory__max="10", memory__current="50", memory__stat="")
    assert machine.free_bytes(proc, tmp_path / "g") == 0


def test_silent_systems(tmp_path: Path) -> None:
    assert machine.free_bytes(tmp_path, tmp_path) is None
    assert machine.resident_bytes(tmp_path) == 0


def test_this_process_grows_by_what_it_takes() -> None:
    before, peak = machine.resident_bytes(), machine.peak_resident_bytes()
    held = mmap.mmap(-1, 64 * MIB)  # not of the heap, which may have as much to spare
    for page in range(0, 64 * MIB, 4096):
        held[page] = 1
    assert machine.resident_bytes() - before >= 60 * MIB
    assert peak is not None
    assert (machine.peak_resident_bytes() or 0) >= before + 60 * MIB
    free = machine.free_bytes()
    assert free is None or free > 0
