"""Triton's interpreter at a bearable speed.

It puts its own functions in place of the language's before every call of a function of a kernel,
though they are in place since the kernel began: a third of its time. Those of the language's own
library are left in place for good, so once is enough for them too.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor


def quicken() -> None:
    """Call functions of kernels without that, from now on."""
    from triton.runtime import interpreter

    slow, placed = interpreter.InterpretedFunction.__call__, set[Any]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("triton.") and self.fn not in placed:
            placed.add(self.fn)
            return slow(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def lend() -> None:
    """Kernels work on the memory of the pretend device itself, which the host can reach."""
    from triton.runtime import interpreter

    run = interpreter.InterpretedFunction.run

    def lent(value: Any) -> Any:
        return on_host(value) if isinstance(value, Tensor) else value

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *map(lent, args), **{key: lent(value) for key, value in kwargs.items()})

    interpreter.InterpretedFunction.run = launch


def on_host(tensor: Tensor) -> Tensor:
    """A tensor of the host over the same memory; who has it keeps the other."""
    storage = tensor.untyped_storage()
    if tensor.device.type == "cpu" or not storage.nbytes():
        return tensor.cpu()
    block = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(block, dtype=torch.uint8).view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
