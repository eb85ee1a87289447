"""Native ops on single rows: norms, rotation, cache rows, compression, routing, streams.

Not here: arithmetic (src/kernel_rows.cpp, src/kernel_streams.cpp).
"""

from collections.abc import Callable
from typing import Any

OPS: dict[str, Callable[..., Any]] = {}
