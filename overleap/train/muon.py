"""Muon for the matrices, AdamW for the rest (report section 2.4, Alg. 1).

Not a schedule: the caller passes the learning rates of every step. Read next:
kernels/torch/orthogonalise.py, loop.py.
"""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from overleap.config import ModelConfig
from overleap.kernels.spec import Ops

UPDATE_RMS = 0.18  # so that a matrix moves as far as AdamW would move it at the same rate
TINY = 1e-20


def is_matrix(name: str, tensor: Tensor) -> bool:
    """True where Muon applies: everything but embedding, head, norms, sinks, position biases and
    the static parts of the connections."""
    return tensor.ndim == 2 and not name.startswith(("embed.", "head.")) and "ape" not in name


def logical_rows(name: str, config: ModelConfig) -> tuple[int, ...] | None:
    """Rows of the logically independent matrices that a stored one holds, None for a single one.

    The output projection has one a group, an overlapping compressor two series, a connection its
    three maps (pre, post, comb).
    """
    leaf = name.split(".")
    if name.endswith("wo_a.weight"):
        return (config.o_lora_rank,) * config.o_groups
    if leaf[-1] in ("hc_attn_fn", "hc_ffn_fn"):
        return config.hc_mult, config.hc_mult, config.hc_mult**2
    if leaf[-2:-1] and leaf[-2] in ("wkv", "wgate") and leaf[-3] == "compressor":
        width = config.index_head_dim if "indexer" in leaf else config.head_dim
        if "indexer" in leaf or config.compress_ratios[int(leaf[1])] == 4:
            return width, width
    return None


class Optimizer:
    """Steps all trained tensors. `named` are those that require a gradient.

    Of several ranks each keeps the momentum of its own matrices and computes their updates; the
    updates are then shared. Gradients must be equal on all ranks, but for those of the matrices
    `alone`, which no other rank has. Without `muon` AdamW steps all of them.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        ops: Ops,
        config: ModelConfig | None = None,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        alone: Collection[str] = (),
        muon: bool = True,
    ) -> None:
        named, self.alone = list(named), frozenset(alone)
        self.ops, self.momentum, self.weight_decay = ops, momentum, weight_decay
        self.matrices = {name: p for name, p in named if muon and is_matrix(name, p)}
        self.others = {name: p for name, p in named if name not in self.matrices}
        self.parts = {
            name: logical_rows(name, config) if config else None for name in self.matrices
        }
        mine = _rank()
        everyones = {name: p for name, p in self.matrices.items() if name not in self.alone}
        self.owner = _owners(everyones) | dict.fromkeys(self.alone, mine)
        self.velocity = {
            n: torch.zeros_like(p) for n, p in self.matrices.items() if self.owner[n] == mine
        }
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
        updates = self._updates()
        moved = [name for name, p in self.matrices.items() if p.grad is not None]
        shared = [name for name in moved if name not in self.alone]
        if dist.is_initialized() and shared:
            # Whoever does not own a matrix adds zeros, so that every rank sees the same bits.
            whole = [updates.get(n, torch.zeros_like(self.matrices[n])).flatten() for n in shared]
            flat = torch.cat(whole)
            dist.all_reduce(flat)
            sizes = [self.matrices[n].numel() for n in shared]
            pieces = zip(shared, flat.split(sizes), strict=True)
            updates |= {n: piece.view_as(self.matrices[n]) for n, piece in pieces}
        for name in moved:
            p = self.matrices[name]
            p.mul_(1 - matrix_rate * self.weight_decay).sub_(updates[name], alpha=matrix_rate)

    def _updates(self) -> dict[str, Tensor]:
        """Update of every own matrix, of root mean square 0.18; equal shapes done together."""
        nesterov: dict[str, Tensor] = {}
        for name, velocity in self.velocity.items():
            grad = self.matrices[name].grad
            if grad is not None:
                velocity.mul_(self.momentum).add_(grad)
                nesterov[name] = grad + self.momentum * velocity
        by_shape: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name, matrix in nesterov.items():
            rows = self.parts[name]
            for piece in matrix.split(list(rows)) if rows else (matrix,):
                by_shape.setdefault(tuple(piece.shape), []).append((name, piece))
        done: dict[str, list[Tensor]] = {}
        for shape, pieces in by_shape.items():
            update = self.ops.orthogonalise(torch.stack([piece for _, piece in pieces]))
            update = update * (UPDATE_RMS * max(shape) ** 0.5)
            for (name, _), change in zip(pieces, update, strict=True):
                done.setdefault(name, []).append(change)
        return {n: self._joined(n, changes) for n, changes in done.items()}

    def _joined(self, name: str, changes: list[Tensor]) -> Tensor:
        rows = self.parts[name]
        if rows is None:
            return changes[0]
        # Pieces were met shape by shape: put them back in the order of the rows.
        left = {size: [c for c in changes if c.shape[0] == size] for size in set(rows)}
        return torch.cat([left[size].pop(0) for size in rows])

    def _adam(self, rate: float) -> None:
        fast, slow = self.betas
        for name, p in self.others.items():
            if p.grad is None:
                continue
            mean = self.mean[name].lerp_(p.grad, 1 - fast)
            square = self.square[name].lerp_(p.grad.square(), 1 - slow)
            size = (square / (1 - slow**self.steps)).sqrt_().add_(TINY)
            p.mul_(1 - rate * self.weight_decay)
            p.addcdiv_(mean, size, value=-rate / (1 - fast**self.steps))

    def state(self) -> dict[str, Tensor]:
        """Flat names -> tensors: all that a resumed run needs beside the weights; own parts."""
        out = {"steps": torch.tensor(self.steps)}
        for kind, tensors in self._kinds():
            out |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from state(), or from the states of several ranks put together."""
        self.steps = int(state["steps"])
        for kind, tensors in self._kinds():
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}/{name}"])

    def _kinds(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [("velocity", self.velocity), ("mean", self.mean), ("square", self.square)]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _owners(matrices: dict[str, Tensor]) -> dict[str, int]:
    """Whole matrices to ranks, the largest first to whom has least."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    load = [0] * ranks
    owner = {}
    for name in sorted(matrices, key=lambda n: (-matrices[n].numel(), n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += matrices[name].numel() * min(matrices[name].shape)
    return owner
