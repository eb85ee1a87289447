"""Routed experts spread over ranks: each keeps its own, a token's vector travels to them and back.

The same sums as with all experts on every rank. Everything else of the model is on every rank.
Not here: what an expert computes (ops.py), who calls whom in a step (loop.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from overleap.errors import TrainingError
from overleap.train.recipe import Recipe

Local = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spread:
    """Which rank has which of `experts` experts: each as many, in order."""

    rank: int
    ranks: int
    experts: int

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """For this process. Every rank must run as many passes as any other.

        Raises TrainingError where experts or the rows of a stage cannot be shared evenly.
        """
        spread = cls(dist.get_rank(), dist.get_world_size(), recipe.config.n_routed_experts)
        if spread.experts % spread.ranks:
            raise TrainingError(
                f"{spread.experts} experts cannot be shared evenly by {spread.ranks} ranks"
            )
        for number, stage in enumerate(recipe.stages):
            passes = -(-stage.rows // recipe.rows_of_a_pass(stage))
            if stage.rows % recipe.rows_of_a_pass(stage) or passes % spread.ranks:
                raise TrainingError(
                    f"stage {number} has {passes} passes a step, {spread.ranks} ranks with spread "
                    "experts need as many each",
                    "change the stage's rows, or group_tokens",
                )
        return spread

    @property
    def mine(self) -> slice:
        """Own experts among all."""
        return slice(self.rank * self.each, (self.rank + 1) * self.each)

    @property
    def each(self) -> int:
        """Experts of a rank in a layer."""
        return self.experts // self.ranks

    def owner(self, name: str) -> int | None:
        """The only rank with this tensor, by its official name; None where all have it."""
        _, inside, rest = name.partition(".ffn.experts.")
        return int(rest.partition(".")[0]) // self.each if inside else None

    def is_elsewhere(self, name: str) -> bool:
        """Whether another rank has the tensor."""
        return self.owner(name) not in (None, self.rank)

    def through(self, x_TD: Tensor, ids_TX: Tensor, weight_TX: Tensor, local: Local) -> Tensor:
        """Sum of the chosen experts' outputs [T, D], as `local` computes it for own experts.

        x_TD   in the type in which vectors travel; ids_TX: of all experts
        local  of rows [N, D], numbers of own experts [N, 1], weights [N, 1] -> [N, D], wide
        """
        flat = ids_TX.flatten()
        order = flat.argsort(stable=True)
        token = order // ids_TX.shape[1]
        counts = torch.bincount(flat, minlength=self.experts)
        theirs = _swap(counts, [self.each] * self.ranks, [self.each] * self.ranks)
        sent = counts.view(self.ranks, -1).sum(1).tolist()
        got = theirs.view(self.ranks, -1).sum(1).tolist()
        numbers = torch.arange(self.each, device=flat.device).repeat(self.ranks)
        rows = _travel(x_TD[token], sent, got)
        share = _travel(weight_TX.flatten()[order][:, None], sent, got)
        done = local(rows, numbers.repeat_interleave(theirs)[:, None], share)
        back = _travel(done.to(x_TD.dtype), got, sent)
        out = done.new_zeros(x_TD.shape)
        return out.index_add(0, token, back.to(done.dtype))


def _travel(rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
    """Rows [N, W] in order of the ranks they go to, `sent` of them to each; those that came."""
    out: Tensor = _Travel.apply(rows, sent, got)  # type: ignore[no-untyped-call]
    return out


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
        ctx.sent, ctx.got = sent, got
        return _swap(rows, sent, got)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient goes the way back."""
        return _swap(grad, ctx.got, ctx.sent), None, None


def _swap(rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
    """As bytes: not every backend of torch.distributed knows every type."""
    out = rows.new_empty(sum(got), *rows.shape[1:])
    width = math.prod(rows.shape[1:])
    there, here = (t.contiguous().view(-1, width).view(torch.uint8) for t in (out, rows))
    dist.all_to_all_single(there, here, got, sent)
    return out
