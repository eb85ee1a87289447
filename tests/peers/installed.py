"""Which of the other programs are there."""

import importlib.util
from typing import Any

import pytest

PACKAGES = {"transformers": "transformers", "llama.cpp": "xllamacpp"}


def needs(*peers: str) -> list[Any]:
    """Parameters of a test, one a program, each skipped where its package is not installed."""
    return [
        pytest.param(
            peer,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(PACKAGES[peer]) is None,
                reason=f"{PACKAGES[peer]} is not installed: pip install overleap[peers]",
            ),
        )
        for peer in peers
    ]
