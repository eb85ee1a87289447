"""Where the tests of a whole model run: any device, any backend, by two variables.

    OVERLEAP_TEST_DEVICE=cuda OVERLEAP_TEST_BACKEND=triton python -m pytest tests/test_state.py

The device `pretend` is ../pretend. Without them: a CPU, and the backend that is best there.
"""

import os

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
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreted.quicken()


def ops() -> Ops:
    """Of the backend that is tested."""
    return select(BACKEND, DEVICE.type)


def exact(backend: str = BACKEND) -> bool:
    """Whether a row's bits are promised: by native code on a CPU, which computes everything."""
    return DEVICE.type == "cpu" and backend in ("auto", "cpu") and native(backend)
