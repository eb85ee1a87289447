"""Who serves each op on a device, decided once when a model is built.

A backend is a folder beside this file, or another package's module named by the entry point group
`overleap.kernels`; its function `ops(device)` returns the ops it has by name for a type of device,
or raises BackendError. `auto` asks what is made for the device in the table of devices.py, then
other packages' by name, then `torch`: the definition, which has every fine op on every torch
device; coarse ops that a backend lacks are composed of the fine ones (composed.py). So a package
comes first on a device whose row is empty, elsewhere it serves what ours lacks. Read next: spec.py.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Any

import torch

from overleap.devices import KINDS
from overleap.errors import BackendError
from overleap.kernels.composed import Assembled
from overleap.kernels.graph import Captures, capturable
from overleap.kernels.spans import Spans
from overleap.kernels.spec import COARSE, LEFT_TO_TORCH, OP_NAMES, Ops

OWN = {
    "cpu": "overleap.kernels.cpu",
    "torch": "overleap.kernels.torch",
    "triton": "overleap.kernels.triton",
}
# Takes the spans of a step, the ratios of its layers, and the most bytes that its record may hold.
Recorder = Callable[[Spans, tuple[int, ...], int], Any]
DEFINITION = "torch"
COMPOSED = "fine ops"  # serve a coarse op that no backend in line has
LEFT = "whole matrix products alone, torch's are as fast"


@dataclass(frozen=True)
class Served:
    """Which backend serves an op, and why not those before it in line ("" for the first)."""

    op: str
    backend: str
    reason: str


def backends() -> list[str]:
    """Names that select() takes: the project's own, then those of other packages."""
    return [*OWN, *sorted(entry.name for entry in entry_points(group="overleap.kernels"))]


def select(wanted: str = "auto", device: str = "cpu") -> Ops:
    """The ops of a backend by name, or the best there is for this type of device (`auto`).

    Raises BackendError when a backend asked for by name cannot serve at all. What it lacks, the
    definition serves; `table` says so.
    """
    found, _ = _decide(wanted, device)
    return Assembled(found)  # type: ignore[abstract]  # fine ops are attributes


def table(wanted: str = "auto", device: str = "cpu") -> list[Served]:
    """Who serves each op when select() is asked the same."""
    return _decide(wanted, device)[1]


def native(wanted: str = "auto", device: str = "cpu") -> bool:
    """Whether select() asked the same leaves nothing to the definition in torch but what is best
    there: a backend's memory and equivalence are then its own."""
    return all(
        row.backend != DEFINITION or row.op in LEFT_TO_TORCH for row in table(wanted, device)
    )


def identity(ops: Ops, device: str, dtype: str) -> str:
    """Names what computes, in 16 hex digits: where it differs, rows of equal texts may.

    device, dtype  the type of device, and of activations
    """
    parts = [version("overleap"), device, dtype]
    with suppress(ImportError):
        parts.append(import_module("overleap.kernels.cpu._native").isa())
    for name, op in sorted(vars(ops).items()):
        parts.append(f"{name} {getattr(op, '__module__', type(op).__module__)}")
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


def recorder(ops: Ops, device: torch.device) -> Recorder | None:
    """What records steps of these ops, for one cache: native calls, or what a device is given.

    None where they cannot be: on a CPU without native code, or with that of others, which would go
    unseen and be left out; on a device whose ops are not `capturable`.
    """
    if device.type != "cpu":
        return Captures(device).begin if capturable(ops) else None
    if not all(op.__module__.startswith("overleap.kernels.") for op in vars(ops).values()):
        return None
    try:
        import_module("overleap.kernels.cpu._native")
    except ImportError:  # `overleap kernels` says why
        return None
    record: Recorder = import_module("overleap.kernels.cpu.tape").Recording
    return record


def asked(wanted: str = "auto", device: str = "cpu") -> tuple[str, ...]:
    """Backends in the order in which they are asked; what none has, the definition serves."""
    if wanted != "auto":
        return (wanted,)
    made = [kind.kernels for kind in KINDS if kind.type == device and kind.kernels]
    return tuple(dict.fromkeys(made + [name for name in backends() if name not in OWN]))


def shortfall(device: str = "cpu") -> str | None:
    """Why no backend in line for this type of device serves, in one sentence; None if one does."""
    rows = [row for row in table("auto", device) if row.op not in LEFT_TO_TORCH]
    line = asked("auto", device)
    if not line or any(row.backend in line for row in rows):
        return None
    return f"the torch backend serves every op: {rows[0].reason}"


def _decide(wanted: str, device: str) -> tuple[dict[str, Any], list[Served]]:
    found: dict[str, Any] = {}
    why: dict[str, list[str]] = {op: [] for op in OP_NAMES}
    who = {op: COMPOSED if op in COARSE else DEFINITION for op in OP_NAMES}
    for name in asked(wanted, device):
        having, error = _asked_for(name, device, wanted == "auto")
        for op in OP_NAMES:
            if op in having and op not in found:
                found[op], who[op] = having[op], name
            elif op not in found:
                left = op in LEFT_TO_TORCH and name in OWN
                why[op].append(error or (LEFT if left else f"{name} has none"))
    for op, function in _ops_of(DEFINITION, device).items():
        found.setdefault(op, function)
    return found, [Served(op, who[op], "; ".join(why[op])) for op in OP_NAMES]


def _asked_for(
    name: str, device: str, lenient: bool
) -> tuple[Mapping[str, Callable[..., Any]], str]:
    """What a backend has, or why it has nothing.

    lenient  a refusal is a reason, and so is any error of another package: a broken one is shown
             and takes no model with it. What is broken in our own raises all the same.
    """
    try:
        return _ops_of(name, device), ""
    except BackendError as error:
        if not lenient:
            raise
        return {}, f"{name}: {error.message}"
    except Exception as error:
        if not lenient or name in OWN:
            raise
        return {}, f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _ops_of(name: str, device: str) -> Mapping[str, Callable[..., Any]]:
    if name in OWN:
        module = import_module(OWN[name])
    else:
        entries = {entry.name: entry for entry in entry_points(group="overleap.kernels")}
        if name not in entries:
            raise BackendError(
                f"no kernel backend is called {name!r}", f"backends are {', '.join(backends())}"
            )
        module = entries[name].load()
    if not callable(getattr(module, "ops", None)):
        raise BackendError(f"backend {name!r} has no function `ops`", "docs/guides/port-a-chip.md")
    ops: Any = module.ops(device)
    if not isinstance(ops, Mapping):
        kind = type(ops).__name__
        raise BackendError(f"`ops` of backend {name!r} returned {kind}, not functions by name")
    unknown = sorted(set(ops) - set(OP_NAMES))
    if unknown:
        raise BackendError(f"backend {name!r} offers {', '.join(unknown)}, which are no ops")
    return ops
