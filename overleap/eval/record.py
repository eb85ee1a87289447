"""A measurement that can be trusted later: the numbers, the machine, the versions, the commit.

One JSON object a line in results/*.jsonl. Not here: measuring (speed.py, needle.py).
"""

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch

from overleap import __version__, devices
from overleap.errors import OverleapError
from overleap.machine import cores, cpu_info
from overleap.plan.calibrate import FORMAT, record_lines

Scalar = str | int | float | bool | None
# Instruction sets that decide which kernels can run, as Linux names them (x86, then Arm).
_TELLING = (
    "avx2 avx_vnni avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_int8 "
    "asimd asimddp i8mm bf16 sve sve2 sme"
).split()


@dataclass(frozen=True)
class Machine:
    """Where it was measured. Says nothing that names a host or a person.

    cores         logical cores this process may use
    memory_bytes  of the machine
    instructions  instruction sets that matter to kernels
    torch_level   what torch's own CPU kernels use
    device        where the model ran: `cpu`, or the accelerator's name
    """

    cpu: str
    cores: int
    memory_bytes: int
    instructions: tuple[str, ...]
    torch_level: str
    device: str
    system: str


@dataclass(frozen=True)
class Record:
    """One measurement.

    date      UTC, ISO 8601, seconds
    load      runnable processes, average of the last minute, this one included; None if unknown.
              Above `threads` of the settings, others had their share of the cores
    versions  of overleap, Python and torch
    commit    of the source tree, `+` at the end where tracked files differ from it; None outside
    weights   digest of the checkpoint's manifest, or how random weights were drawn; None: unknown
    subject   what was measured; names the file
    settings  how: everything one needs to measure it again
    numbers   rows of figures, units in their names (`_s`, `_bytes`, `_tokens`)
    """

    date: str
    machine: Machine
    load: float | None
    versions: dict[str, str]
    commit: str | None
    weights: str | None
    subject: str
    settings: dict[str, Scalar]
    numbers: tuple[dict[str, Scalar], ...]

    def to_json(self) -> str:
        """One line. ValueError for a NaN or an infinity: those are no measurements."""
        return json.dumps({"format": FORMAT} | asdict(self), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, source: str = "record") -> Self:
        """Strictly: unknown, missing or mistyped keys raise OverleapError naming `source`."""
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise OverleapError(f"{source} is not JSON: {error}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise OverleapError(f"{source} has format {found!r}, this version reads {FORMAT!r}")
        del raw["format"]
        _match(cls, raw, source)
        there: dict[str, Any] = raw["machine"]
        _match(Machine, there, f"{source}: machine")
        for row in (raw["settings"], *raw["numbers"]):
            if not isinstance(row, dict) or not all(_is_scalar(v) for v in row.values()):
                raise OverleapError(f"{source} has a row that is not names and plain values")
        machine = Machine(**(there | {"instructions": tuple(there["instructions"])}))
        return cls(**(raw | {"machine": machine, "numbers": tuple(raw["numbers"])}))


def take(
    subject: str,
    numbers: list[dict[str, Scalar]],
    settings: dict[str, Scalar],
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
) -> Record:
    """A record of what was just measured, here and now."""
    return Record(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(device),
        load=_load(),
        versions={
            "overleap": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        commit=commit(),
        weights=weights,
        subject=subject,
        settings=settings,
        numbers=tuple(numbers),
    )


def append(record: Record, folder: str | Path) -> Path:
    """Add the record to <folder>/<subject>.jsonl, made if need be. Returns the file."""
    path = Path(folder) / f"{record.subject}.jsonl"
    line = record.to_json() + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise OverleapError(f"{path} cannot be written: {error.strerror}") from None
    return path


def read(path: str | Path) -> list[Record]:
    """The records of a file, oldest first. OverleapError names the line that is damaged."""
    lines = record_lines(path)
    return [Record.from_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def machine(device: str | torch.device = "cpu") -> Machine:
    """This machine, as far as it tells."""
    info = cpu_info()
    # x86 calls them flags, Arm features.
    present = set((info.get("flags") or info.get("Features") or "").split())
    return Machine(
        cpu=devices.cpu_name(),
        cores=cores(),
        memory_bytes=_memory_bytes(),
        instructions=tuple(flag for flag in _TELLING if flag in present),
        torch_level=torch.backends.cpu.get_cpu_capability(),
        device=devices.title(torch.device(device)),
        system=f"{platform.system()} {platform.machine()}",
    )


def commit() -> str | None:
    """The commit this package's source stands on; None for an installed package or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        number = _git(root, "rev-parse", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return number + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # not a POSIX system
        return None


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return 0


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "cores": int,
    "memory_bytes": int,
    "instructions": list,
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "numbers": list,
    "load": (int, float, type(None)),
    "commit": (str, type(None)),
    "weights": (str, type(None)),
}


def _match(cls: type, raw: Any, source: str) -> None:
    """The keys of a dataclass, no more and no fewer, with values of the right type."""
    names = {field.name for field in fields(cls)}
    if not isinstance(raw, dict) or set(raw) != names:
        got = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise OverleapError(f"{source} has {got}, expected {sorted(names)}")
    for name, value in raw.items():
        if not isinstance(value, _JSON_TYPES.get(name, str)) or isinstance(value, bool):
            raise OverleapError(f"{source}: {name} is {value!r}")
