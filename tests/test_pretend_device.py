"""The whole package on a device that torch only pretends to have, in a process of its own.

pretend/device.cpp says what it is; pretend/test_on_device.py and the tests of state equivalence run
on it. The whole of them is among the slow tests, a part of each runs always.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pretend

ROOT = Path(__file__).resolve().parents[1]
if why := pretend.missing():
    pytest.skip(why, allow_module_level=True)


def run(*what: str, passing: int) -> None:
    """pytest in a process where the device is the tests' own; at least so many tests pass."""
    pretend.library()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *what],
        env=os.environ | {"OVERLEAP_TEST_DEVICE": pretend.NAME},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    print(last)
    assert int(last.split(" passed")[0].split()[-1]) >= passing, last


def test_the_device() -> None:
    run("tests/pretend", passing=12)


def test_some_state_equivalence() -> None:
    chosen = "(snapshot or batched or poison or clean) and (wide or release)"
    run("tests/test_state.py", "-k", chosen, passing=10)


def test_some_state_equivalence_of_the_engine() -> None:
    run("tests/test_state_engine.py", "-k", "aborted and torch", passing=1)


@pytest.mark.slow
def test_state_equivalence() -> None:
    run("tests/test_state.py", "--timeout", "3000", passing=53)


@pytest.mark.slow
def test_state_equivalence_of_the_engine() -> None:
    run("tests/test_state_engine.py", "-k", "torch", "--timeout", "3000", passing=8)
