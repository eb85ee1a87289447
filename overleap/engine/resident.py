"""Routed experts of a model whose weights are larger than memory: kept by use, read ahead, bounded.

The model tells which experts a layer is about to read and waits until they are there; what it
computes is the same with and without. Not here: pages of files (checkpoint/pages.py), what is kept
and how it is read (shelf.py). Read next: docs/concepts/larger-than-memory.md.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from overleap.checkpoint.pages import Placed
from overleap.engine.request import ExpertStats
from overleap.engine.shelf import Shelf
from overleap.errors import CapacityError
from overleap.machine import size
from overleap.model.moe import MoE
from overleap.model.transformer import Transformer


class Resident:
    """Keeps at most `bound_bytes` of a model's routed experts in memory, from when it is made.

    Raises CapacityError where that is less than one token of one layer takes.
    """

    def __init__(self, model: Transformer, placed: Placed, bound_bytes: int) -> None:
        least = placed.weights.least_bytes
        if bound_bytes < least:
            raise CapacityError(
                f"{size(bound_bytes)} are given to the experts, one token of one layer takes "
                f"{size(least)}",
                "give the process more memory",
            )
        blocks = [*model.layers, *model.mtp]
        found = [block.get_submodule("ffn") for block in blocks]
        self._layers = [layer for layer in found if isinstance(layer, MoE)]
        self._main = len(model.layers)  # the others are asked by the draft, not by a step
        self._bound = bound_bytes
        self._shelf = Shelf(placed.experts, bound_bytes)
        self._model = model
        self._hook = model.register_forward_pre_hook(self._begin)
        model.watchers.add(self)
        for number, layer in enumerate(self._layers):
            layer.before = partial(self._before, number)

    def close(self) -> None:
        """Leave the model as it was, and the experts that are in memory to the system."""
        self._hook.remove()
        self._model.watchers.discard(self)
        for layer in self._layers:
            layer.before = None
        self._shelf.close()

    def stats(self) -> ExpertStats:
        """So far."""
        done, held = self._shelf.counts()
        return ExpertStats(
            kept=done.kept,
            ahead=done.ahead,
            missed=done.missed,
            read_ahead=done.read_ahead,
            right=done.right,
            read_bytes=done.read_bytes,
            resident_bytes=held,
            bound_bytes=self._bound,
            waited_s=done.waited_s,
            bounded=self._shelf.lets_go,
        )

    def _begin(self, _: Any, arguments: tuple[Any, ...]) -> None:
        """A step begins: what its tokens choose in the hash layers is known."""
        ids_T: Tensor = arguments[0].ids_T
        self._shelf.age(len(ids_T))
        for number, layer in enumerate(self._layers):
            if layer.gate.tid2eid is not None:
                chosen_TX = layer.gate.tid2eid[ids_T]
                self._shelf.expect(number, _most_wanted(chosen_TX))

    def _before(
        self, number: int, x_TD: Tensor, ids_T: Tensor, chosen_TX: Tensor
    ) -> Iterator[slice]:
        """Ranges of tokens to compute in turn; when one is handed out, its experts are there."""
        chosen_TX = chosen_TX.cpu()  # once, where the router runs on a device
        self._shelf.use(number, chosen_TX)
        for tokens, needed in self._shelf.cut(chosen_TX):
            self._shelf.hold(number, needed)
            if tokens.stop == len(ids_T):
                self._look_ahead(number, x_TD, ids_T)
            yield tokens
        self._shelf.release(number)

    def _look_ahead(self, number: int, x_TD: Tensor, ids_T: Tensor) -> None:
        """Expect of the next layer what its router would choose for this layer's input."""
        if number + 1 < self._main and self._layers[number + 1].gate.tid2eid is None:
            chosen_TX, _ = self._layers[number + 1].route(x_TD, ids_T)
            self._shelf.expect(number + 1, _most_wanted(chosen_TX))


def _most_wanted(chosen_TX: Tensor) -> list[int]:
    """Every chosen expert once, those of most tokens first; for one token in the router's order."""
    if len(chosen_TX) == 1:
        return [int(e) for e in chosen_TX[0]]
    numbers, counts = torch.unique(chosen_TX, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [int(e) for e in numbers[order]]
