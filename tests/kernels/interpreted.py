"""Triton's interpreter at a bearable speed.

It puts its own functions in place of the language's before every call of a function of a kernel,
though they are in place since the kernel began: a third of its time. Those of the language's own
library are left in place for good, so once is enough for them too.
"""

from typing import Any


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
