"""Which compressed blocks the indexer chose for a token: noted on the way, for pictures.

Not how they are chosen (model/indexer.py). Read next: request.py, `Chosen`.

The op `index_topk` of every layer that chooses is wrapped from outside, as a mesh would wrap a
built model; what it returns is noted and passed on untouched.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, cast

from torch import Tensor

from overleap.engine.request import Chosen
from overleap.model.transformer import Transformer


class Choices:
    """The choices of a model's last step. Made once for a model."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._ratios: dict[int, int] = {}
        self._rows: list[int] = []
        self._chosen: dict[int, Tensor] = {}
        for number, block in enumerate(model.layers):
            attention = cast(Any, block).attn
            if attention.indexer is None:
                continue
            self._ratios[number] = attention.ratio
            noted = partial(self._note, number, attention.ops.index_topk)
            wrapped = copy(attention.ops)  # coarse ops that are composed are methods of its class
            vars(wrapped)["index_topk"] = noted
            attention.ops = wrapped

    def _note(self, layer: int, choose: Callable[..., Tensor], *given: Any) -> Tensor:
        chosen_TK = choose(*given)
        if self._rows:
            self._chosen[layer] = chosen_TK[self._rows]
        return chosen_TK

    def expect(self, rows: list[int]) -> None:
        """Before a step: of which of its packed tokens `of` may be asked. No others are kept."""
        self._rows = rows
        watch = self._model.watchers.add if rows else self._model.watchers.discard
        watch(self)
        self._chosen.clear()  # layers that see few blocks do not choose, and leave nothing

    def of(self, row: int, tokens: int) -> tuple[Chosen, ...]:
        """What the last step chose for its packed token `row`, of a text of so many tokens."""
        found = []
        for layer, ratio in self._ratios.items():
            visible = tokens // ratio
            if layer in self._chosen:
                chosen_K = self._chosen[layer][self._rows.index(row)]
                entries = tuple(sorted(e for e in chosen_K.tolist() if e >= 0))
            else:
                entries = tuple(range(visible))
            found.append(Chosen(layer, visible, entries))
        return tuple(found)
