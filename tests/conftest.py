"""What every test shares: a printed seed, one thread per worker, a memory cap, no network.

Not a place for helpers of one room: those live beside its tests. Read next: test_architecture.py.
"""

import os
import random
import resource

import pytest
from hypothesis import settings

# Set before anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MEMORY_CAP_BYTES = 8 * 2**30  # private memory of one worker; a leak fails a test, not the machine


def pytest_configure(config: pytest.Config) -> None:
    # A CUDA driver reserves more address space than this as it starts, without using it.
    if os.path.exists("/dev/nvidiactl"):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_CAP_BYTES:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_CAP_BYTES, hard))


# Two workers beside other work: a slow example is not a failure. The blob repeats one exactly.
settings.register_profile("overleap", deadline=None, print_blob=True)
settings.load_profile("overleap")


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed, so that a failure can be repeated with OVERLEAP_TEST_SEED."""
    given = os.environ.get("OVERLEAP_TEST_SEED")
    value = int(given) if given is not None else random.SystemRandom().randrange(2**31)
    print(f"repeat with OVERLEAP_TEST_SEED={value}")
    return value
