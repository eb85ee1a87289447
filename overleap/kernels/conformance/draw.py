"""Random inputs: values, packed weights, cache rows, and sequences whose unread memory is NaN.

Read next: cases.py, sequences.py (who draws what).
"""

import torch
from torch import Tensor

from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool, RowFormat, Weight

PAGE = 128  # tokens of a page: pools have 128 / ratio rows in one
POISON = 255  # as bytes: NaN in e4m3, in bf16 and as a scale
WIDE = RowFormat("wide", 40, 0)
KV = RowFormat("kv", 512, 64)  # the released size
KV_SHORT = RowFormat("kv", 100, 16)  # 84 plain values: the last group has 20
KEY = RowFormat("key", 128, 0)
KEY_SHORT = RowFormat("key", 16, 0)


class Draw:
    """A seeded source of inputs, the same on every device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, extreme: bool = False
    ) -> Tensor:
        """Standard normal; `extreme`: rows between 2^-40 and 2^40 times that."""
        x = torch.randn(shape, generator=self.generator)
        if extreme and x.numel():
            x = x * 2.0 ** self._integers(-40, 41, (*shape[:-1], 1))
        return x.to(dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """i64, low <= n < high."""
        return self._integers(low, high, shape).to(self.device)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def _bytes(self, low: int, high: int, *shape: int) -> Tensor:
        return self._integers(low, high, shape).to(torch.uint8)

    def weight(self, form: str, outputs: int, inputs: int) -> Weight:
        """A weight of about 1 / sqrt(inputs): f32, bf16, or fp8 and fp4 with every code in it."""
        if form in ("f32", "bf16"):
            dtype = torch.float32 if form == "f32" else torch.bfloat16
            return Weight((self.normal(outputs, inputs) * inputs**-0.5).to(dtype))
        if form == "fp4":
            codes = self._bytes(0, 256, outputs, inputs // 2).view(torch.int8)
            scale = self._bytes(118, 124, outputs, inputs // 32)
        else:
            codes = self._e4m3(outputs, inputs).view(torch.float8_e4m3fn)
            scale = self._bytes(112, 118, -(-outputs // 128), -(-inputs // 128))
        return Weight(codes.to(self.device), scale.view(torch.float8_e8m0fnu).to(self.device))

    def _e4m3(self, *shape: int) -> Tensor:
        """Every finite code, as bytes."""
        return self._bytes(0, 127, *shape) + 128 * self._bytes(0, 2, *shape)

    def rows(self, row: RowFormat, *shape: int) -> Tensor:
        """Finite stored rows [*shape, row] with every code in them, of about unit size."""
        if row.kind == "wide":
            return self.normal(*shape, row.width)
        if row.kind == "key":
            codes = self._bytes(0, 256, *shape, row.width // 2)
            scale = self._bytes(122, 127, *shape, -(-row.width // 32))
            return torch.cat((codes, scale), -1).to(self.device)
        plain = row.width - row.rope
        rope = torch.randn((*shape, row.rope), generator=self.generator).bfloat16()
        scale = self._bytes(117, 122, *shape, -(-plain // 64))
        used = plain + 2 * row.rope + scale.shape[-1]
        padding = torch.zeros((*shape, -used % 8), dtype=torch.uint8)
        parts = (self._e4m3(*shape, plain), rope.view(torch.uint8), scale, padding)
        return torch.cat(parts, -1).to(self.device)

    def poisoned(self, row: RowFormat, *shape: int) -> Tensor:
        """Rows [*shape, row] that are NaN throughout."""
        width = self.rows(row, 1).shape[-1]
        value = torch.nan if row.kind == "wide" else POISON
        return torch.full((*shape, width), value, dtype=row.dtype, device=self.device)

    def spans(self, *parts: tuple[int, int]) -> Spans:
        """From (start, count) of every sequence; slots and pages in random order, some unused."""
        needed = [-(-(start + count) // PAGE) for start, count in parts]
        slots = torch.randperm(len(parts) + 2, generator=self.generator).tolist()
        pages = torch.randperm(sum(needed) + 2, generator=self.generator).tolist()
        rows = []
        for (start, count), slot, n in zip(parts, slots, needed, strict=False):
            rows.append((start, count, slot, [pages.pop() for _ in range(n)]))
        return Spans.of(rows, self.device)

    def ring(self, row: RowFormat, window: int, spans: Spans) -> Pool:
        """Rings with rows where the window reaches back, and NaN in every other row."""
        ring = self.poisoned(row, len(spans.slot) + 2, window + 8)
        for start, slot in zip(spans.start, spans.slot, strict=True):
            near = torch.arange(max(0, start - window + 1), start)
            ring[slot, near.to(self.device) % ring.shape[1]] = self.rows(row, len(near))
        return Pool(ring, row)

    def tail(self, width: int, ratio: int, spans: Spans) -> Tensor:
        """Compressor tails f32 [slots, rows, 2, W] likewise: NaN where no block reaches back."""
        capacity = 2 * ratio if ratio == 4 else ratio
        tail = torch.full((len(spans.slot) + 2, capacity + 8, 2, width), torch.nan)
        for start, slot in zip(spans.start, spans.slot, strict=True):
            first = max(0, start // ratio * ratio - (ratio if ratio == 4 else 0))
            for position in range(first, start):
                tail[slot, position % tail.shape[1]] = self.normal(2, width).cpu()
        return tail.to(self.device)

    def pool(self, row: RowFormat, ratio: int, spans: Spans) -> Pool:
        """Pages with every entry completed by the end of this step, and NaN in every other row."""
        per_page = PAGE // ratio
        pool = self.poisoned(row, spans.table_BP.shape[1] * len(spans.slot) + 2, per_page)
        for b, (_, last) in enumerate(spans.emitted(ratio)):
            number = torch.arange(last)
            page = spans.table_BP[b].cpu()[number // per_page]
            rows = self.rows(row, last)
            pool[page.to(self.device), (number % per_page).to(self.device)] = rows
        return Pool(pool, row)
