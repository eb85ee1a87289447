"""The kinds of device that torch drives: how to find one, ask for its memory, wait for it.

One table, and functions that read it. A vendor's package is imported only when its kind is asked
for. Not here: kernels (kernels/__init__.py says who serves a device). Read next: machine.py.
"""

import importlib
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overleap.errors import BackendError
from overleap.machine import cpu_info
from overleap.machine import free_bytes as host_free_bytes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """A kind of device.

    name       what people write: `cpu`, `cuda`, `cuda:1`, ...
    type       torch's word for it
    what       what it is, in words
    group      name of the backend of torch.distributed
    kernels    backend of overleap.kernels that is made for it, or None
    package    what has to be imported before torch knows the type; None for torch itself
    node       device file that is there when a chip is plugged in, or None
    hint       what makes torch drive it
    graph      torch's class for work that is captured and launched as one, "" for none
    packed     whether it holds weights in FP8 and FP4
    float64    whether it has the type; `sample` runs on the host where not
    """

    name: str
    type: str
    what: str
    group: str
    kernels: str | None = None
    package: str | None = None
    node: str | None = None
    hint: str = "install a build of torch for it"
    graph: str = ""
    packed: bool = True
    float64: bool = True


KINDS = (
    Kind("cuda", "cuda", "an NVIDIA GPU", "nccl", "triton", node="/dev/nvidiactl",
         hint="install a CUDA build of torch", graph="CUDAGraph"),
    # A ROCm build of torch calls its devices cuda, and its RCCL nccl.
    Kind("rocm", "cuda", "an AMD GPU", "nccl", "triton", node="/dev/kfd",
         hint="install a ROCm build of torch", graph="CUDAGraph"),
    Kind("xpu", "xpu", "an Intel GPU", "xccl", "triton", hint="install an XPU build of torch",
         graph="XPUGraph"),
    Kind("npu", "npu", "an Ascend NPU", "hccl", None, "torch_npu", "/dev/davinci0",
         "install torch_npu"),
    Kind("mlu", "mlu", "a Cambricon MLU", "cncl", None, "torch_mlu", "/dev/cambricon_dev0",
         "install torch_mlu"),
    Kind("mps", "mps", "an Apple GPU", "gloo", hint="install torch for macOS on Apple silicon",
         packed=False, float64=False),
    Kind("cpu", "cpu", "the CPU", "gloo", "cpu"),
)  # fmt: skip
CPU = KINDS[-1]


def find(name: str = "auto", packed: bool = False) -> "torch.device":
    """The device of this name: a kind, perhaps with a number (`npu:1`), or another type that torch
    knows. `auto` takes the first kind that is there, the CPU last.

    packed  weights in FP8 and FP4 go there, which not every kind holds
    Raises BackendError where it is not there, with what would bring it, or holds no such weights.
    """
    import torch

    if name == "auto":
        kinds = (kind for kind in KINDS if kind.packed or not packed)
        return torch.device(next(kind for kind in kinds if present(kind)).type)
    word, _, number = name.partition(":")
    kind = next((kind for kind in KINDS if kind.name == word), None)
    if kind is None:
        return _unlisted(name)
    if packed and not kind.packed:
        raise BackendError(
            f"{kind.what} ({kind.name}) holds no weights in FP8 or FP4, and these are packed so",
            "use the CPU, or a copy by `overleap models convert MODEL FOLDER --form bf16`",
        )
    if not present(kind):
        raise BackendError(f"{kind.what} ({kind.name}) was not found by torch", kind.hint)
    if number and (not number.isdigit() or int(number) >= count(kind)):
        raise BackendError(f"{name} is not there: {kind.name} has {count(kind)}, the first is 0")
    return torch.device(f"{kind.type}:{number}" if number else kind.type)


def _unlisted(name: str) -> "torch.device":
    """The device of a type that is not in the table, where torch drives one."""
    import torch

    hint = f"devices are {', '.join(kind.name for kind in reversed(KINDS))}, or auto"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackendError(f"no device is called {name!r}", hint) from None
    try:
        there = bool(torch.get_device_module(device.type).is_available())
    except (RuntimeError, AttributeError):  # a name and nothing behind it, like `meta`
        there = False
    if not there:
        raise BackendError(f"torch knows the name {name!r}, but drives no such device here", hint)
    return device


def kind_of(device: "torch.device") -> Kind:
    """The row of the table for a device; one is made for a type that is not in it."""
    rows = [kind for kind in KINDS if kind.type == device.type]
    if len(rows) > 1:  # one type, two vendors: the build of torch tells
        return next(kind for kind in rows if present(kind))
    return rows[0] if rows else Kind(device.type, device.type, f"a {device.type} device", "gloo")


def present(kind: Kind) -> bool:
    """Whether torch can use one now. Imports the vendor's package where there is one."""
    import torch

    if kind is CPU:
        return True
    if kind.package is not None:
        if find_spec(kind.package) is None:
            return False
        try:
            importlib.import_module(kind.package)
        except (ImportError, OSError, RuntimeError):  # its driver is not there, or not set up
            return False
    if kind.type == "cuda" and (kind.name == "rocm") != (torch.version.hip is not None):
        return False
    module = torch.get_device_module(kind.type)
    return bool(module.is_available())


def count(kind: Kind) -> int:
    """How many there are."""
    import torch

    return 1 if kind is CPU else int(torch.get_device_module(kind.type).device_count())


def accelerators() -> list[Kind]:
    """Kinds beside the CPU that torch can use now."""
    return [kind for kind in KINDS if kind is not CPU and present(kind)]


def plugged_in(root: str | Path = "/") -> list[Kind]:
    """Kinds whose device file is there, whatever torch knows."""
    return [kind for kind in KINDS if kind.node and (Path(root) / kind.node.lstrip("/")).exists()]


def title(device: "torch.device") -> str:
    """The chip's own name where it tells, else that of its kind: `NVIDIA A100-SXM4-80GB`, `mps`."""
    import torch

    if device.type == "cpu":
        return CPU.name
    name_of: Callable[..., str] | None = getattr(
        torch.get_device_module(device), "get_device_name", None
    )
    return kind_of(device).name if name_of is None else str(name_of(device))


def cpu_name() -> str:
    """What this machine's processor is called; as well as the system tells it."""
    # Arm kernels do not name the model.
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def driver() -> str:
    """The driver that this torch was built for: `CUDA 12.8`, `ROCm 6.4`; empty for none."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else ""


def free_bytes(device: "torch.device") -> int | None:
    """Memory that can be taken on the device now; None where nothing tells."""
    import torch

    if device.type == "cpu":
        return host_free_bytes()
    if device.type == "mps":  # shares the system's memory, and is told how much of it is its own
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    asked: Callable[..., tuple[int, int]] | None = getattr(
        torch.get_device_module(device), "mem_get_info", None
    )
    return None if asked is None else int(asked(device)[0])


def multiplies_bf16(device: "torch.device") -> bool:
    """Whether products of bf16 matrices are the device's own; False where nothing tells."""
    import torch

    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    asked: Callable[[], bool] | None = getattr(
        torch.get_device_module(device), "is_bf16_supported", None
    )
    return asked is not None and bool(asked())


def has_float64(device: "torch.device") -> bool:
    """Whether it has the type, by the table: nothing is asked of torch, a token can afford it."""
    return all(kind.float64 for kind in KINDS if kind.type == device.type)


def current(device: "torch.device") -> AbstractContextManager[None]:
    """While it lasts, the device is this thread's own: Triton launches kernels there, wherever
    their tensors are."""
    import torch

    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def new_graph(device: "torch.device") -> Any:
    """Of the device's work, and empty; AttributeError where torch has none for it."""
    import torch

    return getattr(torch.get_device_module(device), kind_of(device).graph)()


def capturing(device: "torch.device", graph: Any, pool: Any, stream: Any) -> Any:
    """While it lasts, what this thread gives the device is not done but becomes the graph's.

    pool, stream  as `graph_room` made them; graphs with the same share memory
    """
    import torch

    return torch.get_device_module(device).graph(graph, pool=pool, stream=stream)


def graph_room(device: "torch.device") -> tuple[Any, Any]:
    """A pool of memory for graphs of the device, and a stream to capture on."""
    import torch

    module = torch.get_device_module(device)
    return module.graph_pool_handle(), module.Stream(device)


def synchronise(device: "torch.device") -> None:
    """Wait for all that was started on the device."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], object], device: "torch.device") -> float:
    """How long one call takes, up to the end of what it starts on the device.

    By the device's own events, so that waiting for the host is not counted; on a CPU by its clock.
    """
    import torch

    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
