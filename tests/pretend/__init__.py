"""A pretend accelerator: builds device.cpp once, and tells torch about the device `pretend`.

`register()` changes torch for the rest of the process, so tests call it in a process of its own.
Read next: device.cpp, ../test_pretend_device.py.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

NAME = "pretend"
SOURCE = Path(__file__).with_name("device.cpp")
BUILT = Path(__file__).parents[2] / "build"


def missing() -> str | None:
    """Why the device cannot be built here; None if it can."""
    return None if shutil.which("g++") else "a pretend device needs g++"


def library() -> Path:
    """The compiled device; compiled anew when its source or torch has changed."""
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    made = BUILT / f"pretend-{digest}.so"
    if made.exists():
        return made
    BUILT.mkdir(exist_ok=True)
    home = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    with tempfile.TemporaryDirectory(dir=BUILT) as folder:
        part = Path(folder) / "device.so"
        command = [
            "g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            f"-I{home / 'include'}", str(SOURCE), "-o", str(part),
            f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.replace(part, made)
    return made


class _Module:
    """What torch asks of the module of a device (torch.pretend)."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Nothing is drawn on the device."""

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        """Bytes free and in all."""
        held, whole = (torch.ops.pretend.counter(which) for which in (0, 3))
        return whole - held, whole


def register() -> torch.device:
    """Tell torch about the device."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library())
    torch._register_device_module(NAME, _Module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME)


def crossings() -> tuple[int, int]:
    """Bytes that came to the device from the host so far, and that went back."""
    return torch.ops.pretend.counter(1), torch.ops.pretend.counter(2)
