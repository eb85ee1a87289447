from collections.abc import Callable
from typing import Any

OPS: dict[str, Callable[..., Any]] = {}
