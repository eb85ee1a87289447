"""Where the tests of a whole model run: any device, any backend, by two variables.

    OVERLEAP_TEST_DEVICE=cuda OVERLEAP_TEST_BACKEND=triton python -m pytest tests/test_state.py

The device `pretend` is ../pretend. Without them: a CPU, and the backend that is best there.
"""

import os
from collections.abc import Sequence

import torch

from overleap import devices
from overleap.kernels import native, select
from overleap.kernels.spec import Ops
from tests import pretend
from tests.kernels import interpreted


def _device() -> torch.device:
    name = os.environ.get("OVERLEAP_TEST_DEVICE", "cpu")
    return pretend.register() if name == pretend.NAME else devices.find(name)


DEVICE = _device()
BACKEND = os.environ.get("OVERLEAP_TEST_BACKEND", "auto")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreted.quicken()
    if DEVICE.type == pretend.NAME:
        interpreted.lend()


def ops() -> Ops:
    """Of the backend that is tested."""
    return select(BACKEND, DEVICE.type)


def few(values: Sequence[int], most: int = 4) -> list[int]:
    """All of them; in Triton's interpreter, which takes seconds a step, so many evenly spread."""
    if not INTERPRETED or len(values) <= most:
        return list(values)
    return [values[n * (len(values) - 1) // (most - 1)] for n in range(most)]


def exact(backend: str = BACKEND) -> bool:
    """Whether a row's bits are promised: by native code on a CPU, which computes everything."""
    return DEVICE.type == "cpu" and backend in ("auto", "cpu") and native(backend)
