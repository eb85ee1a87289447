"""Muon for the matrices, AdamW for the rest (report section 2.4, Alg. 1).

Not a schedule: the caller passes the learning rates of every step. Read next:
kernels/torch/orthogonalise.py, loop.py.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from overleap.kernels.spec import Ops

UPDATE_RMS = 0.18  # so that a matrix moves as far as AdamW would move it at the same rate


def is_matrix(name: str, tensor: Tensor) -> bool:
    """True where Muon applies: linear weights, each expert by itself.

    Embedding, head, norms, sinks, position biases and the connections' tensors go to AdamW, and so
    do the router and the indexer's head weights, whose few rows are scores, not a basis.
    """
    kept = ("embed", "head", "hc_", "ape", "gate.weight", "weights_proj")
    return tensor.ndim == 2 and not any(part in name for part in kept)


class Optimizer:
    """Steps all trained tensors. `named` are those that require a gradient."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        ops: Ops,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        named = list(named)
        self.ops, self.momentum, self.weight_decay = ops, momentum, weight_decay
        self.matrices = {name: p for name, p in named if is_matrix(name, p)}
        self.others = {name: p for name, p in named if not is_matrix(name, p)}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        self.betas = betas
        self.mean = {name: torch.zeros_like(p) for name, p in self.others.items()}
        self.square = {name: torch.zeros_like(p) for name, p in self.others.items()}
        self.steps = 0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self.matrices.values(), *self.others.values()):
            p.grad = None

    @torch.no_grad()
    def step(self, matrix_rate: float, other_rate: float) -> None:
        """One update. Tensors without a gradient stay as they are."""
        self.steps += 1
        self._adam(other_rate)
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.matrices.items():
            if p.grad is not None:
                by_shape.setdefault(tuple(p.shape), []).append(name)
        for shape, names in by_shape.items():
            grads = torch.stack([self._gradient(name) for name in names])
            moved = torch.stack([self.velocity[name] for name in names])
            moved.mul_(self.momentum).add_(grads)
            update = self.ops.orthogonalise(grads + self.momentum * moved)  # Nesterov
            update *= matrix_rate * UPDATE_RMS * max(shape) ** 0.5
            for name, velocity, change in zip(names, moved, update, strict=True):
                self.velocity[name].copy_(velocity)
                p = self.matrices[name]
                p.mul_(1 - matrix_rate * self.weight_decay).sub_(change)

    def _gradient(self, name: str) -> Tensor:
        grad = self.matrices[name].grad
        assert grad is not None
        return grad

    def _adam(self, rate: float) -> None:
        fast, slow = self.betas
        for name, p in self.others.items():
            if p.grad is None:
                continue
            mean = self.mean[name].lerp_(p.grad, 1 - fast)
            square = self.square[name].lerp_(p.grad.square(), 1 - slow)
            size = (square / (1 - slow**self.steps)).sqrt_().add_(1e-12)
            p.addcdiv_(mean, size, value=-rate / (1 - fast**self.steps))

    def state(self) -> dict[str, Tensor]:
        """Flat names -> tensors: all that a resumed run needs beside the weights."""
        out = {"steps": torch.tensor(self.steps)}
        for kind, tensors in self._kinds():
            out |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from state()."""
        self.steps = int(state["steps"])
        for kind, tensors in self._kinds():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}/{name}"])

    def _kinds(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [("velocity", self.velocity), ("mean", self.mean), ("square", self.square)]
