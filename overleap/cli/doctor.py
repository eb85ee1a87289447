"""The command that examines the machine: device, instruction sets, memory, limits, who serves what.

Not here: the checks that need no torch (preflight.py).
"""

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from overleap import __version__, devices
from overleap.cli import screen
from overleap.cli.app import CacheDir, Json, app
from overleap.cli.kept import default_folder
from overleap.cli.preflight import EXTRAS, Check, Level, checks, worst
from overleap.errors import BackendError
from overleap.machine import size

FAST = ("avx512f", "avx2", "asimd")  # instruction sets with kernels of their own; else portable


@app.command()
def doctor(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Examine this machine: what serves, what is missing, how to get it.

    Ends with status 0 where all is well, 1 with warnings, 2 where something cannot work.

    Example: `overleap doctor --json`
    """
    light = checks(cache_dir or default_folder())
    found = [_own(), *light, *_extras()]
    if worst(light) is not Level.ERROR:  # else torch may not even import
        found += [*_processor(), *_accelerators(), *_kernels(), *_bundled()]
    level = worst(found)
    if as_json:
        rows = [
            {
                "area": check.area,
                "name": check.name,
                "value": check.value,
                "level": check.level.name.lower(),
                "hint": check.hint,
            }
            for check in found
        ]
        screen.put_json({"level": level.name.lower(), "checks": rows})
    else:
        cells = [
            (c.area, c.name, c.value, "" if c.level is Level.OK else c.level.name, c.hint or "")
            for c in found
        ]
        screen.put_table("overleap doctor", ("", "", "found", "", "what to do"), cells)
        counts = Counter(check.level for check in found)
        print(f"{counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings")
    if level:
        raise typer.Exit(int(level))


def _own() -> Check:
    return Check("versions", "overleap", __version__)


def _extras() -> list[Check]:
    """Packages without which all works, but for one thing."""
    found = []
    for name, hint in EXTRAS.items():
        try:
            found.append(Check("versions", name, version(name)))
        except PackageNotFoundError:
            found.append(Check("versions", name, "not installed: no pictures", Level.OK, hint))
    return found


def _processor() -> list[Check]:
    from overleap.eval.record import machine

    here = machine()
    fast = [name for name in FAST if name in here.instructions]
    found = [
        Check("processor", "model", f"{here.cpu}, {platform.machine()}"),
        Check(
            "processor", "instruction sets", " ".join(here.instructions) or "none that tell",
            Level.OK if fast else Level.WARNING,
            None if fast else "kernels run with portable vectors here, several times slower",
        ),
        Check("processor", "torch's own kernels", here.torch_level),
    ]  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", "")
    few = threads.isdigit() and int(threads) < here.cores
    value = f"{here.cores} may be used" + (f", OMP_NUM_THREADS is {threads}" * few)
    hint = f"unset OMP_NUM_THREADS to use all {here.cores}" if few else None
    found.append(Check("processor", "cores", value, Level.WARNING if few else Level.OK, hint))
    return found


def _accelerators(root: Path = Path("/")) -> list[Check]:
    """What torch drives, and what is plugged in without it."""
    found = [Check("device", "accelerator", _described(kind)) for kind in devices.accelerators()]
    driven = {kind.name for kind in devices.accelerators()}
    found += [
        Check("device", "accelerator", f"{kind.what} ({kind.node}), torch has no driver for it",
              Level.WARNING, kind.hint)
        for kind in devices.plugged_in(root) if kind.name not in driven
    ]  # fmt: skip
    return found or [Check("device", "accelerator", "none: the CPU does it all")]


def _described(kind: devices.Kind) -> str:
    """A kind that torch drives: the chip's name, driver and free memory."""
    device = devices.find(kind.name)
    parts = [devices.title(device), devices.driver()]
    free = devices.free_bytes(device)
    parts.append("" if free is None else f"{size(free)} free")
    return ", ".join(part for part in parts if part)


def _kernels() -> list[Check]:
    """Which backend serves which op, a line a backend; ops without native code are a warning."""
    from overleap.kernels import DEFINITION, table

    try:
        served = table("auto")
    except BackendError as error:
        return [Check("kernels", "auto", error.message, Level.ERROR, error.hint)]
    found = []
    for name in dict.fromkeys(row.backend for row in served):
        rows = [row for row in served if row.backend == name]
        slow = name == DEFINITION
        reasons = dict.fromkeys(row.reason for row in rows if row.reason)
        hint = f"{'; '.join(reasons)}. `make setup` builds the native kernels" if slow else None
        value = f"{len(rows)} ops: {' '.join(row.op for row in rows)}"
        level = Level.WARNING if slow else Level.OK
        found.append(Check("kernels", name, value, level, hint))
    return found


def _bundled() -> list[Check]:
    folder = Path(__file__).parents[1] / "bundled" / "mini"
    missing = [
        name
        for name in ("config.json", "tokenizer.json", "model.safetensors")
        if not (folder / name).exists()
    ]
    if missing:
        hint = "install the package again; other models work without it"
        value = f"{', '.join(missing)} missing"
        return [Check("model", "mini, bundled", value, Level.WARNING, hint)]
    return [Check("model", "mini, bundled", "is there")]
