"""Arithmetic whose results do not depend on shapes: float64 inside, rounded to float32 once.

A matrix product adds in an order that depends on how many rows it has, so a text read in one
piece and in two differs by an ulp here and there. In the release format an ulp can flip an FP8
code, which hides small mistakes of ours. Under `Steady` equal inputs give equal bits, whatever
the chunks are, so that state can be compared with `==`. Nothing here is used by the package.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What adds, and what a processor may compute differently in a vector and in its tail.
_INEXACT: set[Callable[..., Any]] = {
    F.linear,
    F.silu,
    F.softplus,
    torch.bmm,
    torch.exp,
    torch.linalg.vector_norm,
    torch.rsqrt,
    torch.sigmoid,
    Tensor.__matmul__,
    Tensor.cos,
    Tensor.exp,
    Tensor.log,
    Tensor.matmul,
    Tensor.mean,
    Tensor.sin,
    Tensor.softmax,
    Tensor.sqrt,
    Tensor.sum,
}


class Steady(TorchFunctionMode):
    """Within `with Steady():`, the functions above compute in float64 and round once."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _INEXACT:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            wide = {name: _widened(value) for name, value in kwargs.items()}
            result = func(*map(_widened, args), **wide)
            return result.float() if result.dtype is torch.float64 else result


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype is torch.float32 else value
