"""The Triton kernels in Triton's interpreter. Skipped but in a process that has it: see
test_triton.py. The interpreter has its own row in tuning.toml; tiles of cards are tried here too.
"""

import math
import sys

import pytest

from overleap.kernels import select, table
from overleap.kernels.conformance import conform
from overleap.kernels.spec import OP_NAMES
from tests.kernels import interpreted

triton = pytest.importorskip("triton", reason="triton is not installed (the extra `cuda`)")
if not triton.knobs.runtime.interpret:
    pytest.skip("not in a process that interprets kernels", allow_module_level=True)
interpreted.quicken()


def failures(seed: int, enough_s: float, only: list[str] | None = None) -> list[object]:
    verdicts = conform(select("triton"), seed=seed, enough_s=enough_s, only=only)
    assert {v.op for v in verdicts} == set(only or OP_NAMES)
    return [(v.op, v.case, v.error, v.reason) for v in verdicts if not v.passed]


def test_every_op(seed: int) -> None:
    served = {row.op: row.backend for row in table("triton")}
    assert {op for op, who in served.items() if who == "torch"} == {
        "window_write", "page_write", "sample", "orthogonalise",
    }  # fmt: skip
    assert failures(seed, 0.2) == []


def test_all_cases(seed: int) -> None:
    assert failures(seed, math.inf) == []


@pytest.mark.parametrize("row", ["older", "hopper"])
def test_tiles_of_cards(row: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sizes, and rows split among programs as for 132 multiprocessors; but no bf16 factors,
    which the interpreter takes for integers."""
    from dataclasses import replace

    from overleap.kernels.triton import attention, linear, streams
    from overleap.kernels.triton.tuning import named

    sizes = replace(named(row, 132), bf16=False)
    for module in (attention, linear, streams):
        monkeypatch.setattr(sys.modules[module.__name__], "tuning", lambda device: sizes)
    assert failures(seed, 6.0, ["attend", "index_topk"]) == []
    assert failures(seed, 1.0, ["matmul", "experts", "hc_pre", "hc_post"]) == []
