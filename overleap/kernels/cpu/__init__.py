"""Native kernels for plain CPUs: AVX-512, AVX2, or whatever vectors the compiler finds.

A row's result never depends on the other rows of the call nor on the number of threads, so a text
read whole, in chunks or token by token gives the same bits. Read next: linear.py, src/module.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any

from overleap.errors import BackendError


def ops(device: str) -> Mapping[str, Callable[..., Any]]:
    """The ops that have native code. BackendError for other devices, or where it was not built."""
    if device != "cpu":
        raise BackendError(f"the native kernels run on a CPU, not on a device of type {device}")
    try:
        import overleap.kernels.cpu._native  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"the native kernels are not there ({error})",
            "install a C++ compiler and Python's headers, then `pip install` overleap again",
        ) from None
    from overleap.kernels.cpu import attention, linear, rows, sampling, sequences, streams

    parts = (linear, attention, rows, streams, sequences, sampling)
    return {name: op for part in parts for name, op in part.OPS.items()}
