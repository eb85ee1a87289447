"""What is wrong is not measured: a quick proof before a benchmark, a refusal in one sentence.

Not here: the whole proof (run.py), which `overleap conform` runs.
"""

import secrets
from functools import cache

import torch

from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.conformance.run import Verdict, conform

ENOUGH_S = 0.4  # for an op: seconds for all, of which attend and index_topk take most


def refuse_red(backend: str, device: str = "cpu") -> None:
    """Raise BackendError if an op of this backend is wrong: its speed would mean nothing.

    Tries each op for a fraction of a second, once in a process, with a fresh seed. `select` raises
    for a backend that cannot serve.
    """
    seed, failed = _red(backend, device)
    if failed:
        first = failed[0]
        why = first.reason or f"its error is {first.error:.2g}, {first.tolerance:.2g} is allowed"
        raise BackendError(
            f"nothing is measured with backend {backend!r}: its op {first.op} is wrong "
            f"({first.case}: {why})",
            f"`overleap conform --backend {backend} --op {first.op} --seed {seed}` shows all of it",
        )


@cache
def _red(backend: str, device: str) -> tuple[int, tuple[Verdict, ...]]:
    """The seed, and the cases that failed."""
    seed = secrets.randbelow(2**31)
    ops = select(backend, device)
    verdicts = conform(ops, torch.device(device), seed=seed, enough_s=ENOUGH_S)
    return seed, tuple(verdict for verdict in verdicts if not verdict.passed)
