"""Hybrid Newton-Schulz orthogonalisation for Muon, in plain torch (report Alg. 1, section 2.4).

Not the optimiser: train/muon.py.
"""

import torch
from torch import Tensor

# Eight steps that pull all singular values towards 1 fast, two that settle them there.
FAST = (3.4445, -4.7750, 2.0315)
SETTLE = (2.0, -1.5, 0.5)
STEPS = (FAST,) * 8 + (SETTLE,) * 2


def orthogonalise(matrix: Tensor) -> Tensor:
    """See spec.Ops.orthogonalise."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    norm = torch.linalg.matrix_norm(x.float(), keepdim=True).clamp(min=1e-30)
    x = (x.float() / norm).bfloat16()
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result.float()
