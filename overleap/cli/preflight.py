"""What a machine lacks, seen before anything runs: memory, disk, limits, versions. No torch.

`ask` and `serve` call `preflight`; `overleap doctor` shows the same checks and more (doctor.py).
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from overleap import machine
from overleap.cli import screen
from overleap.errors import CapacityError, OverleapError
from overleap.machine import size

LEAST_MEMORY = 384 * 2**20  # torch, the bundled model and a short text
FEW_MEMORY = 2 * 2**30
FEW_DISK = 4 * 2**30  # what is kept of texts may take so much
FEW_FILES = 1024  # files a process may open: shards, connections
PYTHON = (3, 11)
NEEDED = (
    "torch", "numpy", "safetensors", "huggingface-hub", "tokenizers", "typer", "rich",
    "deepseek-recipe", "blake3", "platformdirs", "llguidance", "pydantic", "fastapi", "uvicorn",
    "sqlalchemy", "alembic", "prometheus-client",
)  # fmt: skip
EXTRAS = {"matplotlib": "pip install overleap[plots]"}  # what is worth having, and how to get it


class Level(IntEnum):
    """How bad; the largest is the exit status of `overleap doctor`."""

    OK = 0
    WARNING = 1  # works, worse than it could
    ERROR = 2  # does not work


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. hint: what to do, where it is not well."""

    area: str
    name: str
    value: str
    level: Level = Level.OK
    hint: str | None = None

    @classmethod
    def least(
        cls, area: str, name: str, value: str, found: float, few: float, least: float, hint: str
    ) -> "Check":
        """An error below `least`, a warning below `few`."""
        level = Level.ERROR if found < least else Level.WARNING if found < few else Level.OK
        return cls(area, name, value, level, hint if level else None)


def preflight(folder: Path | None) -> None:
    """Raise for the first thing that cannot work, and note on stderr what works worse.

    folder  where read texts are to be kept, None for nowhere
    """
    for check in checks(folder):
        if check.level is Level.OK:
            continue
        said = f"{check.name}: {check.value}"
        if check.level is Level.ERROR:
            error = CapacityError if check.area in ("memory", "disk") else OverleapError
            raise error(said, check.hint)
        screen.note(said + (f"; {check.hint}" if check.hint else ""))


def checks(folder: Path | None) -> list[Check]:
    """All that can be seen without torch."""
    disk = [] if folder is None else _disk(folder)
    return [*_versions(), *_memory(), *disk, *_limits()]


def _versions() -> list[Check]:
    now = platform.python_version()
    wanted = ".".join(map(str, PYTHON))
    old = sys.version_info[:2] < PYTHON
    found = [
        Check(
            "versions", "python", now, Level.ERROR if old else Level.OK,
            f"{wanted} or newer is needed" if old else None,
        ),
    ]  # fmt: skip
    for name in NEEDED:
        try:
            found.append(Check("versions", name, version(name)))
        except PackageNotFoundError:
            hint = f"pip install {name}"
            found.append(Check("versions", name, "is not installed", Level.ERROR, hint))
    return found


def _memory(proc: Path = Path("/proc")) -> list[Check]:
    free, whole = machine.free_bytes(), total_bytes(proc)
    found = []
    if whole is not None:
        found.append(Check("memory", "memory of the machine", size(whole)))
    if free is None:
        hint = "give --memory, since nothing can be refused in time without it"
        found.append(Check("memory", "free memory", "this system does not tell", Level.OK, hint))
        return found
    available = available_bytes(proc)
    bound = available is not None and free < 0.95 * available
    value = size(free) + (f", by the control group ({size(available or 0)} else)" * bound)
    hint = "close other programs" + (" or raise the control group's limit" * bound)
    found.append(Check.least("memory", "free memory", value, free, FEW_MEMORY, LEAST_MEMORY, hint))
    return found


def total_bytes(proc: Path = Path("/proc")) -> int | None:
    """Of the machine, whatever a control group allows."""
    return _meminfo(proc, "MemTotal:")


def available_bytes(proc: Path = Path("/proc")) -> int | None:
    """Free on the machine, whatever a control group allows."""
    return _meminfo(proc, "MemAvailable:")


def _meminfo(proc: Path, key: str) -> int | None:
    try:
        lines = (proc / "meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(key)]
    return found[0] if found else None


def _disk(folder: Path) -> list[Check]:
    """The folder for what is kept, or the nearest one above that is there."""
    place = folder
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
    except OSError as error:
        hint = "give --cache-dir, or --no-keep"
        return [Check("disk", str(folder), f"cannot be seen: {error}", Level.WARNING, hint)]
    if not os.access(place, os.W_OK):
        hint = "give --cache-dir, or --no-keep"
        value = "cannot be written: nothing is kept of what is read"
        return [Check("disk", str(folder), value, Level.WARNING, hint)]
    hint = "make room, give --cache-dir elsewhere, or --no-keep"
    # Full disks stop what is kept, not what is asked: a warning at most.
    few = Check.least("disk", str(folder), f"{size(free)} free", free, FEW_DISK, 0, hint)
    return [few]


def _limits() -> list[Check]:
    """Limits that the shell or the service manager set."""
    if sys.platform == "win32":
        return []
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    few = not unlimited and files < FEW_FILES
    found = [
        Check(
            "limits", "open files (ulimit -n)", "unlimited" if unlimited else f"{files}",
            Level.WARNING if few else Level.OK,
            f"ulimit -n {FEW_FILES}; a checkpoint's shards and connections need them"
            if few else None,
        )
    ]  # fmt: skip
    for name, flag, which in (
        ("address space", "-v", resource.RLIMIT_AS),
        ("private memory", "-d", resource.RLIMIT_DATA),
    ):
        limit, label = resource.getrlimit(which)[0], f"{name} (ulimit {flag})"
        if limit == resource.RLIM_INFINITY:
            found.append(Check("limits", label, "unlimited"))
            continue
        hint = f"ulimit {flag} unlimited; loading fails at this limit, however much is free"
        found.append(
            Check.least("limits", label, size(limit), limit, FEW_MEMORY, LEAST_MEMORY, hint)
        )
    return found


def worst(found: Sequence[Check]) -> Level:
    """The level of all of them together."""
    return max((check.level for check in found), default=Level.OK)
