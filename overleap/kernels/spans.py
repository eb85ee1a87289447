"""Which tokens a step has, of which sequences, and where these stand: what all ops are told.

Not here: the ops (spec.py), what becomes of it on a device (`known`, graph.py). T packed tokens,
B sequences, P pages.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from overleap.cache.layout import PAGE_TOKENS


@dataclass(frozen=True)
class Spans:
    """Which packed tokens belong to which sequence, and where each sequence stands.

    start, count, slot  per sequence: absolute position of its first new token, new tokens, slot
    offset              B + 1 row numbers into the packed tokens
    position_T, slot_T  i64 [T]  absolute position and slot of every token
    table_BP            i64 [B, P]  pages of every sequence, -1 beyond its last; P is `rounded`
    kept                what is made of these once and used by many ops
    """

    start: tuple[int, ...]
    count: tuple[int, ...]
    slot: tuple[int, ...]
    offset: tuple[int, ...]
    position_T: Tensor
    slot_T: Tensor
    table_BP: Tensor
    kept: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, parts: Sequence[tuple[int, int, int, Sequence[int]]], device: torch.device) -> Self:
        """From (start, count, slot, pages) of every sequence."""
        start, count, slot, pages = zip(*parts, strict=True)
        offset = [0]
        for n in count:
            offset.append(offset[-1] + n)
        position = torch.cat([torch.arange(s, s + n) for s, n in zip(start, count, strict=True)])
        table = torch.full((len(parts), rounded(max(map(len, pages)))), -1, dtype=torch.int64)
        for row, numbers in enumerate(pages):
            if numbers:  # by way of an array, which takes a long list in a quarter of the time
                known = torch.frombuffer(array("q", numbers), dtype=torch.int64)
                table[row, : len(numbers)] = known
        return cls(
            start,
            count,
            slot,
            tuple(offset),
            position.to(device),
            torch.cat([torch.full((n,), s) for s, n in zip(slot, count, strict=True)]).to(device),
            table.to(device),
        )

    def emitted(self, ratio: int) -> list[tuple[int, int]]:
        """Per sequence, the blocks [first, last) of `ratio` tokens that this step completes."""
        return [(s // ratio, (s + n) // ratio) for s, n in zip(self.start, self.count, strict=True)]

    @cached_property
    def reach(self) -> int:
        """Tokens that the longest sequence has after this step, `rounded`: a bound on what is
        visible that steps have in common over a long stretch of text."""
        longest = max(s + n for s, n in zip(self.start, self.count, strict=True))
        return rounded(-(-longest // PAGE_TOKENS)) * PAGE_TOKENS

    def known(self, make: "Callable[[Spans, int], Tensor]", number: int) -> Tensor:
        """`make(self, number)`, i64 made on the host, on the device; made once."""
        key = (make, number)
        if key not in self.kept:
            self.kept[key] = make(self, number).to(self.position_T.device)
        found: Tensor = self.kept[key]
        return found

    def follow(self, other: "Spans") -> None:
        """Fill these tensors, in place, with those of another step of the same shapes."""
        self.position_T.copy_(other.position_T)
        self.slot_T.copy_(other.slot_T)
        self.table_BP.copy_(other.table_BP)
        for key, own in self.kept.items():
            if isinstance(key, tuple) and own.numel():
                make, number = key
                own.copy_(make(other, number))

    def begins(self, ratio: int) -> Tensor:
        """i64 [completed]: position of the first token of every block that this step completes."""
        return self.known(_begins, ratio)

    def last_rows(self, capacity: int) -> Tensor | None:
        """Packed rows that survive in a ring of `capacity` rows; None means all of them."""
        return None if max(self.count) <= capacity else self.known(_last_rows, capacity)


def _last_rows(spans: Spans, capacity: int) -> Tensor:
    ends = zip(spans.offset[:-1], spans.offset[1:], strict=True)
    return torch.cat([torch.arange(max(a, b - capacity), b) for a, b in ends])


def _begins(spans: Spans, ratio: int) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in spans.emitted(ratio)]) * ratio


def rounded(pages: int) -> int:
    """So many pages or a few more: the next multiple of 8, and of a quarter of the power of two
    below. Of growing texts few numbers come of it, which what is made for one is made for."""
    unit = max(8, 1 << max(0, pages.bit_length() - 3))
    return -(-pages // unit) * unit
