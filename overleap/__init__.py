"""The public names of Overleap: load a checkpoint, make an engine, hand it requests.

Not a place for code: every name is imported from its room on first use, so `import overleap` costs
no torch. Read next: docs/walk.md, then overleap/config.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from overleap.checkpoint import load
    from overleap.config import ModelConfig
    from overleap.engine.engine import Engine
    from overleap.engine.request import Request, Sampling

__version__ = "0.1.0"

__all__ = ["Engine", "ModelConfig", "Request", "Sampling", "__version__", "load"]

_HOMES = {
    "Engine": "overleap.engine.engine",
    "ModelConfig": "overleap.config",
    "Request": "overleap.engine.request",
    "Sampling": "overleap.engine.request",
    "load": "overleap.checkpoint",
}


def __getattr__(name: str) -> object:
    """Import a public name from its room on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'overleap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
