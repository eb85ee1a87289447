"""What the tests of the native kernels share: instruction sets, random cuts of rows.

Importing this skips the module where the extension was not built.
"""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

native = pytest.importorskip(
    "overleap.kernels.cpu._native", reason="the native kernels were not built", exc_type=ImportError
)


def present() -> list[str]:
    """Instruction sets of this machine."""
    best, found = native.isa(), []
    for name in ("portable", "avx2", "avx512", "amx"):
        try:
            native.set_isa(name)
            found.append(name)
        except ValueError:
            pass
    native.set_isa(best)
    return found


@pytest.fixture(params=present())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The tests run once with each instruction set."""
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


def cuts(total: int, number: random.Random) -> list[slice]:
    """0 .. total in random pieces."""
    inner = sorted(number.sample(range(1, total), min(total - 1, number.randint(0, 5))))
    return [slice(a, b) for a, b in pairwise([0, *inner, total])]
