"""What this machine can do at best, measured: the speed of light of every kernel.

Not here: what an op moves and counts (kernels/cost.py). Read next: run.py (shares of a ceiling).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from overleap import devices
from overleap.errors import BackendError

REPEATS, ENOUGH_S = 7, 0.4  # the best of up to 7 runs within 0.4 s, after one that does not count
LARGE_BYTES = 256 << 20  # at least, and four times what the last cache holds
SIZE = {"cpu": 1536, "other": 8192}  # rows and columns of the matrices multiplied


@dataclass(frozen=True)
class Rate:
    """A ceiling: bytes or operations a second, and which of the ways that were tried gave it."""

    per_s: float
    how: str


@dataclass(frozen=True)
class Ceilings:
    """Of one device, with so many threads (CPU). None: the device has no such product.

    read             bytes a second, from memory that no cache holds
    f32, bf16, int8  operations a second of a large matrix product, 2 for each multiply-add
    """

    device: str
    threads: int
    read: Rate
    f32: Rate
    bf16: Rate | None
    int8: Rate | None


def ceilings(device: str | torch.device = "cpu", threads: int | None = None) -> Ceilings:
    """Measure, once in a process for a device and a number of threads; takes 2 or 3 seconds.

    threads  of a CPU; as many as torch uses by default

    Nothing is kept between processes: another load, clock or container is another machine.
    """
    device = torch.device(device)
    if device.type != "cpu":
        return _measured(str(device), 1)
    return _measured(str(device), threads or torch.get_num_threads())


@cache
def _measured(name: str, threads: int) -> Ceilings:
    device, before = torch.device(name), torch.get_num_threads()
    torch.set_num_threads(threads if device.type == "cpu" else before)
    try:
        with torch.inference_mode():
            f32 = _product(device, torch.float32)
            if f32 is None:
                raise BackendError(f"{name} cannot multiply matrices of float32")
            return Ceilings(
                name,
                threads,
                _read(device),
                f32,
                _product(device, torch.bfloat16),
                _product(device, torch.int8),
            )
    finally:
        torch.set_num_threads(before)


def _product(device: torch.device, dtype: torch.dtype) -> Rate | None:
    """Operations a second of torch's own matrix product; None where it has none."""
    size = SIZE["cpu" if device.type == "cpu" else "other"]
    if dtype is torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in "ab")
        ways: dict[str, Callable[[], object]] = {
            "torch._int_mm": lambda: torch._int_mm(a, b),
            "torch._int_mm, transposed": lambda: torch._int_mm(a, b.t()),
        }
    else:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
        ways = {
            "torch.mm": lambda: torch.mm(a, b),
            "torch.mm, transposed": lambda: torch.mm(a, b.t()),
        }
    return _best(ways, 2.0 * size**3, device)


def _read(device: torch.device) -> Rate:
    """Bytes a second of the best of several ways to read a buffer larger than every cache."""
    count = max(LARGE_BYTES, 4 * last_cache_bytes(), (2 << 30) * (device.type != "cpu"))
    whole = torch.ones(count // 4, dtype=torch.int32, device=device)
    floats = whole.view(torch.float32)
    ways: dict[str, Callable[[], object]] = {
        "torch.sum of f32": floats.sum,
        "torch.max of f32": floats.max,
        "torch.max of i32": whole.max,
    }
    if device.type == "cpu" and (native := _native_read(whole)):
        ways["native, 4 streams a thread"] = native
    rate = _best(ways, float(whole.nbytes), device)
    if rate is None:
        raise BackendError(f"{device} can neither add up nor compare {whole.nbytes} bytes")
    return rate


def _native_read(whole: Tensor) -> Callable[[], object] | None:
    """Read by the loop of the CPU kernels, where they were built."""
    try:
        from overleap.kernels.cpu import _native
    except ImportError:
        return None
    out = torch.empty(whole.nbytes >> 20, dtype=torch.int32)
    return lambda: _native.read_all(
        whole.data_ptr(), whole.nbytes, out.data_ptr(), torch.get_num_threads()
    )


def last_cache_bytes(cpu: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache of the first core; 0 where the system does not tell."""
    sizes = [0]
    for path in cpu.glob("index*/size"):
        text = path.read_text("ascii").strip()
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        sizes.append(int(digits) * factor if digits.isdecimal() else 0)
    return max(sizes)


def _best(
    ways: dict[str, Callable[[], object]], amount: float, device: torch.device
) -> Rate | None:
    """The highest rate of all ways that the device has; None where it has none."""
    found: list[Rate] = []
    for how, run in ways.items():
        try:
            found.append(Rate(amount / _shortest(run, device), how))
        except (RuntimeError, NotImplementedError):  # torch's words for `not on this device`
            continue
    return max(found, key=lambda rate: rate.per_s, default=None)


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run: a ceiling is what can be had, so that the best counts."""
    best, spent, done = float("inf"), 0.0, -1
    while done < REPEATS and spent < ENOUGH_S:
        seconds = devices.seconds(run, device)
        if done >= 0:
            best, spent = min(best, seconds), spent + seconds
        done += 1
    return best
