"""Mixture of experts: hash or score routing, routed experts and the shared one.

Report section 2.1. Arithmetic is in kernels/ (`route`, `mixture`).
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from overleap.config import ModelConfig
from overleap.kernels.spec import Experts, Ops
from overleap.model.layers import Linear, parameter


class Expert(nn.Module):
    """w1 gate, w3 up, w2 down; the released names."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        wide = config.moe_intermediate_size
        self.w1 = Linear(config.hidden_size, wide, ops)
        self.w2 = Linear(wide, config.hidden_size, ops)
        self.w3 = Linear(config.hidden_size, wide, ops)


def _experts(experts: list[Expert]) -> Experts:
    parts = ([expert.get_submodule(name) for expert in experts] for name in ("w1", "w2", "w3"))
    return Experts(*(tuple(p.stored for p in part if isinstance(p, Linear)) for part in parts))


class Gate(nn.Module):
    """The router's tensors: weight, and a selection bias or (hash layers) a table of experts."""

    bias: nn.Parameter | None
    tid2eid: nn.Parameter | None

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.weight = parameter(config.n_routed_experts, config.hidden_size)
        table = parameter(config.vocab_size, config.num_experts_per_tok, dtype=torch.int32)
        self.register_parameter("bias", None if hashed else parameter(config.n_routed_experts))
        self.register_parameter("tid2eid", table if hashed else None)


# Told a layer's input [T, D], token ids [T] and choices [T, X] before experts are read; yields
# ranges of tokens, together all, each when the experts of its tokens may be read.
Before = Callable[[Tensor, Tensor, Tensor], Iterator[slice]]


class Stored(NamedTuple):
    """Weights of a mixture as the kernels take them; of the router bias or table, one is None."""

    routed: Experts
    shared: Experts
    gate: Tensor
    bias: Tensor | None
    table: Tensor | None


class MoE(nn.Module):
    """x [T, D] and token ids [T] -> [T, D].

    before  who sees to it that experts are in memory, where not all of them are
    """

    before: Before | None

    def __init__(self, config: ModelConfig, hashed: bool, ops: Ops) -> None:
        super().__init__()
        self.gate = Gate(config, hashed)
        self.experts = nn.ModuleList(Expert(config, ops) for _ in range(config.n_routed_experts))
        self.shared_experts = Expert(config, ops)
        self.ops, self.limit, self.before = ops, config.swiglu_limit, None
        self.k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor

    @cached_property
    def stored(self) -> Stored:
        """The weights as the kernels take them; they must be in place."""
        every = [expert for expert in self.experts if isinstance(expert, Expert)]
        gate, shared = self.gate, self.shared_experts
        return Stored(_experts(every), _experts([shared]), gate.weight, gate.bias, gate.tid2eid)

    def route(self, x_TD: Tensor, ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Experts i64 [T, X] and weights f32 [T, X] of every token."""
        _, _, weight, bias, table = self.stored
        fixed = None if table is None else table[ids_T].long()
        return self.ops.route(x_TD, weight, bias, fixed, self.k, self.scale)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """Routed experts plus the shared expert."""
        chosen_TX, weight_TX = self.route(x_TD, ids_T)
        routed, shared = self.stored[:2]
        if self.before is None:
            return self.ops.mixture(x_TD, chosen_TX, weight_TX, routed, shared, self.limit)
        parts = [
            self.ops.mixture(x_TD[r], chosen_TX[r], weight_TX[r], routed, shared, self.limit)
            for r in self.before(x_TD, ids_T, chosen_TX)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
