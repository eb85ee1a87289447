"""How much memory this process has and may still take, the control group's limit included.

Also its processor and cores, as far as the system tells.

Not here: what a run needs (cache/layout.py, engine/budget.py). No torch.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 groups write a huge number for `no limit`


def size(count: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def resident_bytes(proc: Path = Path("/proc")) -> int:
    """Resident memory of this process now; 0 where the system does not tell."""
    try:
        fields = (proc / "self" / "statm").read_text("ascii").split()
    except OSError:
        return 0
    import resource

    return int(fields[1]) * resource.getpagesize()


def peak_resident_bytes() -> int | None:
    """The most memory this process ever had resident, where the system tells."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def trim() -> None:
    """Hand freed memory back to the system.

    glibc keeps freed blocks below 32 MiB for itself, and a small block that lives long, like a
    snapshot, makes it take new memory beside them. Other C libraries have no such call.
    """
    import ctypes

    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak(proc: Path = Path("/proc")) -> None:
    """Trim, and let the peak start again from what is resident now (Linux).

    Where the system cannot, the peak stays the most there ever was.
    """
    trim()
    with suppress(OSError):
        (proc / "self" / "clear_refs").write_text("5", "ascii")


def recent_peak_bytes(proc: Path = Path("/proc")) -> int | None:
    """Most memory resident since forget_peak (Linux), or ever; None if unknown.

    What getrusage tells is at least what the parent process held when it started this one.
    """
    try:
        lines = (proc / "self" / "status").read_text("ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 if found else peak_resident_bytes()


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that can be taken without swapping, the control group's limit included.

    The smaller of the system's MemAvailable and, for this process's group and every group around
    it, limit minus use (page cache that can be dropped does not count as use). None where the
    system does not tell.
    """
    found = [room for room in (_available(proc), *_group_rooms(proc, groups)) if room is not None]
    return max(0, min(found)) if found else None


def _available(proc: Path) -> int | None:
    try:
        for line in (proc / "meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _group_rooms(proc: Path, groups: Path) -> list[int]:
    """Room left in every memory group that holds this process, inner to outer."""
    try:
        lines = (proc / "self" / "cgroup").read_text("ascii").splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        while True:
            rooms.append(_room(folder, *names))
            if folder == base:
                break
            folder = folder.parent
    return [room for room in rooms if room is not None]


def _room(folder: Path, limit_name: str, use_name: str, droppable: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text("ascii").strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            return None
        used = int((folder / use_name).read_text("ascii"))
        stat = dict(
            line.split()[:2] for line in (folder / "memory.stat").read_text("ascii").splitlines()
        )
    except (OSError, ValueError):
        return None
    return int(limit) - used + int(stat.get(droppable, 0))


def cpu_info() -> dict[str, str]:
    """First value of every key in /proc/cpuinfo; empty where there is none."""
    info: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return info
    for line in text.splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    return info


def cores() -> int:
    """Logical cores that this process may use."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))
