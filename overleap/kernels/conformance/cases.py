"""What is tried with every op: the cases of the ops over packed tokens, and the list of all.

Ops that know sequences are in sequences.py. Read next: draw.py (inputs), compare.py (checks).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.conformance import exact
from overleap.kernels.conformance.compare import (
    RULES,
    Check,
    Finding,
    all_of,
    close,
    misshapen,
    right_experts,
    same_bytes,
    wrong,
)
from overleap.kernels.conformance.draw import KEY, KEY_SHORT, KV, KV_SHORT, WIDE, Draw
from overleap.kernels.spec import Experts, RowFormat, Weight

FLOATS = (torch.float32, torch.bfloat16)
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of an op and how its result is judged.

    writes  number of the argument that the op may change, or None
    moved   bytes that must be read and written once, for GB/s; 0: not worth timing
    """

    op: str
    name: str
    args: tuple[Any, ...]
    check: Check
    dtype: torch.dtype = torch.float32
    writes: int | None = None
    moved: int = 0

    @property
    def tolerance(self) -> float:
        """Of the op's rule, for this dtype."""
        rule = RULES[self.op]
        return rule.bfloat16 if self.dtype is torch.bfloat16 else rule.float32


Cases = Callable[[Draw, bool], Iterator[Case]]


def matmul(draw: Draw, timed: bool) -> Iterator[Case]:
    """Plain, FP8 and FP4 weights; short scale blocks; rounded inputs, loud groups; no tokens."""
    sizes = [(1, 63, 129), (63, 129, 1), (127, 1000, 63), (129, 1, 127), (0, 64, 64)]
    groups = [(1, 32, 129), (63, 160, 1), (129, 992, 127)]
    tried = [(form, False, *size) for form in ("f32", "bf16") for size in sizes]
    tried += [("fp8", rounds, *size) for rounds in (False, True) for size in sizes]
    tried += [("fp4", rounds, *size) for rounds in (False, True) for size in groups]
    if timed:
        tried += [(form, form[:2] == "fp", 1, 4096, 1024) for form in ("bf16", "fp8", "fp4")]
    for form, rounds, tokens, inputs, outputs in tried:
        large = tokens * inputs * outputs > 4096 * 1023 and tokens == 1
        for dtype in FLOATS:
            if form == "f32" and dtype is torch.bfloat16:
                continue  # plain weights come in the dtype of the activations, or smaller
            x = draw.normal(tokens, inputs, dtype=dtype, extreme=not large)
            weight = draw.weight(form, outputs, inputs)
            if rounds and inputs > 1:
                # A loud input that counts for nothing: its group, and no other, rounds coarsely.
                x[:, 0] *= 2.0**12
                _silence(weight)
            name = f"{form} {tokens}x{inputs}x{outputs}{' rounded' * rounds}"
            want = exact.matmul(x, weight, rounds)
            moved = nbytes(x, weight) + 4 * outputs if large else 0
            args = (x, weight, rounds)
            yield Case("matmul", name, args, close(want, dtype), dtype, moved=moved)
            if dtype is torch.bfloat16:
                check = close(want, torch.float32)
                yield Case("matmul", f"{name}, f32 out", (*args, True), check)


def _silence(weight: Weight) -> None:
    """Zeros for what the first input (FP4: the first two) is multiplied by."""
    weight.data.view(torch.uint8)[:, 0] = 0


def grouped_matmul(draw: Draw, timed: bool) -> Iterator[Case]:
    """Weights whose scale blocks cross group borders."""
    tried = [(form, 63, 3, 129, 17) for form in ("f32", "bf16", "fp8")]
    tried += [("fp4", 1, 2, 64, 63), ("bf16", 129, 1, 1, 1)]
    if timed:
        tried += [("fp8", 1, 8, 1024, 256)]
    for form, tokens, groups, inputs, outputs in tried:
        for dtype in FLOATS[: 1 if form == "f32" else 2]:
            x = draw.normal(tokens, groups, inputs, dtype=dtype)
            weight = draw.weight(form, groups * outputs, inputs)
            name = f"{form} {tokens}x{groups}x{inputs}x{outputs}"
            moved = nbytes(x, weight) if inputs == 1024 else 0
            check = close(exact.grouped_matmul(x, weight), dtype)
            yield Case("grouped_matmul", name, (x, weight), check, dtype, moved=moved)


def rms_norm(draw: Draw, timed: bool) -> Iterator[Case]:
    """With and without weight, rows of zeros, no tokens."""
    shapes = [(63, 129), (1, 1), (5, 3, 1000), (0, 64)] + [(256, 4096)] * timed
    for shape in shapes:
        for dtype in FLOATS:
            x = draw.normal(*shape, dtype=dtype, extreme=shape[0] < 256)
            x[:1] = 0
            for weight in (None, draw.normal(shape[-1])):
                name = f"{list(shape)}{' weighted' if weight is not None else ''}"
                moved = 2 * nbytes(x) if shape[0] == 256 else 0
                check = close(exact.rms_norm(x, weight, EPS), dtype)
                yield Case("rms_norm", name, (x, weight, EPS), check, dtype, moved=moved)


def _positions(draw: Draw, tokens: int) -> tuple[Tensor, Tensor]:
    """Positions up to a million, and frequencies of 8 pairs."""
    position = draw.integers(0, 1 << 20, tokens)
    position[0], position[-1] = 0, (1 << 20) - 1
    return position, 10000.0 ** -(torch.arange(8) / 8).to(draw.device)


def rotate(draw: Draw, timed: bool) -> Iterator[Case]:
    """Forward and inverse, positions up to a million, all dims or the last 16."""
    for shape in [(63, 129), (127, 3, 16), (2, 1, 17)] + [(256, 64, 128)] * timed:
        position, frequency = _positions(draw, shape[0])
        for dtype in FLOATS:
            for inverse in (False, True):
                x = draw.normal(*shape, dtype=dtype)
                args = (x, position, frequency, inverse)
                check = close(exact.rotate(*args), dtype)
                name = f"{list(shape)}{' inverse' * inverse}"
                moved = 2 * nbytes(x) if shape[0] == 256 else 0
                yield Case("rotate", name, args, check, dtype, moved=moved)


def norm_rope(draw: Draw, timed: bool) -> Iterator[Case]:
    """One row or several heads a token, with and without weight."""
    for shape in [(63, 129), (127, 3, 64), (2, 1, 16)] + [(256, 64, 128)] * timed:
        position, frequency = _positions(draw, shape[0])
        for dtype in FLOATS:
            for weight in (None, draw.normal(shape[-1])):
                x = draw.normal(*shape, dtype=dtype, extreme=True)
                args = (x, weight, EPS, position, frequency)
                check = close(exact.norm_rope(*args), dtype)
                name = f"{list(shape)}{' weighted' if weight is not None else ''}"
                moved = 2 * nbytes(x) if shape[0] == 256 else 0
                yield Case("norm_rope", name, args, check, dtype, moved=moved)


def hadamard(draw: Draw, timed: bool) -> Iterator[Case]:
    """Every power of two up to 128."""
    for shape in [(63, 128), (5, 3, 64), (7, 2), (9, 1)] + [(256, 64, 128)] * timed:
        for dtype in FLOATS:
            x = draw.normal(*shape, dtype=dtype, extreme=shape[0] < 256)
            moved = 2 * nbytes(x) if shape[0] == 256 else 0
            check = close(exact.hadamard(x), dtype)
            yield Case("hadamard", str(list(shape)), (x,), check, dtype, moved=moved)


def quantize(draw: Draw, timed: bool) -> Iterator[Case]:
    """All codes, all halfway points between them, extreme scales, zeros of both signs, NaN."""
    for row in (KV, KV_SHORT, KEY, KEY_SHORT, WIDE):
        x = draw.normal(65, row.width, extreme=True)
        x[0], x[1] = 0.0, -0.0
        tried = {"normal": x, "heads": draw.normal(3, 5, row.width), "codes": _codes(draw, row)}
        tried["bf16"] = draw.normal(63, row.width).bfloat16()
        for name, values in tried.items():
            want = exact.row_bytes(values, row)
            yield Case("quantize", f"{_title(row)} {name}", (values, row), same_bytes(want))
        x = draw.normal(2, row.width)
        x[0, 0], x[1, 1] = torch.nan, torch.inf
        yield Case("quantize", f"{_title(row)} not finite", (x, row), _stays_nan(x, row))
    if timed:
        for row in (KV, KEY):
            x = draw.normal(4096, row.width)
            want = exact.row_bytes(x, row)
            name, moved = f"{_title(row)} 4096", nbytes(x) + nbytes(want)
            yield Case("quantize", name, (x, row), same_bytes(want), moved=moved)


def _codes(draw: Draw, row: RowFormat) -> Tensor:
    """Rows whose groups hold the largest code, and codes or points halfway between, in order."""
    grid = exact.E2M1 if row.kind == "key" else exact.E4M3
    group = 32 if row.kind == "key" else 64
    points = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    points = torch.cat((points, -points))
    count = -(-len(points) // (row.width // 2)) + 1
    x = points.repeat(2 * row.width)[: count * row.width].view(count, row.width).clone()
    x[:, ::group] = grid[-1]  # fixes the scale of the group at 1
    scale = 2.0 ** draw.integers(-8, 9, count, 1).cpu()
    return (x * scale).float().to(draw.device)


def _stays_nan(x: Tensor, row: RowFormat) -> Check:
    """A group that holds a NaN or an infinity is not read back as numbers; the others are right."""
    spoiled = torch.zeros(x.shape, dtype=torch.bool)
    group = {"kv": 64, "key": 32, "wide": 1}[row.kind]
    spoiled[:, : min(group, row.width - row.rope)] = row.kind != "wide"
    want = x.cpu().clone()
    want[spoiled] = 1.0
    stored = exact.row_bytes(want.nan_to_num(1.0, 1.0), row)
    want = exact.row_values(stored, row)
    spoiled |= ~x.cpu().isfinite()

    def check(got: Any) -> Finding:
        if bad := misshapen(got, tuple(stored.shape), stored.dtype):
            return bad
        values = exact.row_values(got, row)
        if values[spoiled].isfinite().any():
            return wrong("a NaN or an infinity became a number")
        if not torch.equal(values[~spoiled], want[~spoiled]):
            return wrong("a group without NaN changed")
        return Finding(0.0)

    return check


def route(draw: Draw, timed: bool) -> Iterator[Case]:
    """Learned and fixed choice, a bias that matters, experts that tie."""
    shapes = [(63, 129, 9, 3), (1, 64, 1, 1), (127, 63, 129, 6)] + [(1, 4096, 256, 6)] * timed
    for tokens, width, experts, k in shapes:
        for dtype in FLOATS:
            x, weight = draw.normal(tokens, width, dtype=dtype), draw.normal(experts, width)
            weight = (weight * width**-0.5 * 3).to(dtype)
            bias = draw.normal(experts)
            table = torch.stack([torch.randperm(experts, generator=draw.generator)[:k]] * tokens)
            table = table.to(draw.device)
            name = f"{tokens}x{width}x{experts} top {k}"
            moved = nbytes(x, weight, bias) if width == 4096 else 0
            for label, b, fixed in (
                (" biased", bias, None),
                ("", None, None),
                (" fixed", None, table),
            ):
                args = (x, weight, b, fixed, k, 1.5)
                check = right_experts(*args, representable=False)
                yield Case("route", name + label, args, check, dtype, moved=moved)
    # Small integers: logits are exact, and a quarter of the experts are copies of others.
    x, weight = draw.integers(-2, 3, 63, 8).float(), draw.integers(-2, 3, 20, 8).float()
    weight[15:] = weight[:5]
    args = (x, weight, None, None, 12, 1.0)
    yield Case("route", "equal experts", args, right_experts(*args, representable=True))


def experts(draw: Draw, timed: bool) -> Iterator[Case]:
    """Plain and packed experts, some without tokens, values beyond the limit."""
    tried = [(form, 63, 129, 65, 9, 3) for form in ("f32", "bf16", "fp8")]
    tried += [("fp4", 127, 160, 96, 6, 2), ("fp8", 1, 128, 128, 4, 4), ("fp4", 2, 32, 32, 63, 1)]
    tried += [("fp4", 1, 2048, 512, 16, 6)] * timed
    for form, tokens, width, inner, count, chosen in tried:
        for dtype in FLOATS[: 1 if form == "f32" else 2]:
            x = draw.normal(tokens, width, dtype=dtype) * 4
            shuffled = torch.rand(tokens, count, generator=draw.generator).argsort(1)
            ids, share = shuffled[:, :chosen].to(draw.device), draw.normal(tokens, chosen).abs()
            parts: list[list[Weight]] = []
            for outputs, inputs in ((inner, width), (width, inner), (inner, width)):
                parts.append([draw.weight(form, outputs, inputs) for _ in range(count)])
            rounds = form in ("fp8", "fp4")
            args = (x, ids, share, Experts(*map(tuple, parts)), 10.0, rounds)
            rule = RULES["experts"]
            doubt = rule.bfloat16 if dtype is torch.bfloat16 else rule.float32
            check = close(exact.experts(*args, doubt), dtype)
            name = f"{form} {tokens}x{width}x{inner}, {chosen} of {count}"
            moved = 0
            if width == 2048:
                moved = nbytes(x, *(part[e] for part in parts for e in ids[0].tolist()))
            yield Case("experts", name, args, check, dtype, moved=moved)


def hc_pre(draw: Draw, timed: bool) -> Iterator[Case]:
    """Two and four streams, gates near 0 and 1, rows of very different size."""
    shapes = [(63, 4, 129), (1, 2, 1), (127, 4, 63), (5, 1, 64)] + [(64, 4, 4096)] * timed
    for tokens, streams, width in shapes:
        for dtype in FLOATS:
            for strength in (0.5, 8.0):
                rows = (2 + streams) * streams
                x = draw.normal(tokens, streams, width, dtype=dtype, extreme=tokens != 64)
                fn = draw.normal(rows, streams * width) * (streams * width) ** -0.5
                args = (x, fn, draw.normal(rows), draw.normal(3).abs() * strength, 20, EPS, EPS)
                y, post, comb = exact.hc_pre(*args)
                # Gates stay f32 whatever the streams are, and are held to that.
                times = RULES["hc_pre"].bfloat16 / RULES["hc_pre"].float32
                strict = times if dtype is torch.bfloat16 else 1.0
                gates = [close(gate, torch.float32, strict) for gate in (post, comb)]
                check = all_of(close(y, dtype), *gates)
                name = f"{tokens}x{streams}x{width}, gates x {strength:g}"
                moved = nbytes(x, fn) if tokens == 64 else 0
                yield Case("hc_pre", name, args, check, dtype, moved=moved)


def hc_head(draw: Draw, timed: bool) -> Iterator[Case]:
    """Two and four streams, one token, none."""
    for tokens, streams, width in [(63, 4, 129), (1, 2, 1), (0, 4, 64)] + [(64, 4, 4096)] * timed:
        for dtype in FLOATS:
            x = draw.normal(tokens, streams, width, dtype=dtype, extreme=tokens != 64)
            fn = draw.normal(streams, streams * width) * (streams * width) ** -0.5
            args = (x, fn, draw.normal(streams), draw.normal(1).abs(), EPS, EPS)
            moved = nbytes(x, fn) if tokens == 64 else 0
            check = close(exact.hc_head(*args), dtype)
            name = f"{tokens}x{streams}x{width}"
            yield Case("hc_head", name, args, check, dtype, moved=moved)


def hc_post(draw: Draw, timed: bool) -> Iterator[Case]:
    """A mix that is not symmetric, so that its direction shows."""
    shapes = [(63, 4, 129), (1, 2, 1), (127, 3, 63)] + [(64, 4, 4096)] * timed
    for tokens, streams, width in shapes:
        for dtype in FLOATS:
            x = draw.normal(tokens, streams, width, dtype=dtype, extreme=tokens != 64)
            y, post = draw.normal(tokens, width, dtype=dtype), draw.normal(tokens, streams).abs()
            args = (y, x, post, draw.normal(tokens, streams, streams).softmax(1))
            check = close(exact.hc_post(*args), dtype)
            moved = nbytes(y) + 2 * nbytes(x) if tokens == 64 else 0
            name = f"{tokens}x{streams}x{width}"
            yield Case("hc_post", name, args, check, dtype, moved=moved)


def nbytes(*things: Tensor | Weight | None) -> int:
    """Bytes of tensors and stored weights."""
    total = 0
    for thing in things:
        if isinstance(thing, Weight):
            total += nbytes(thing.data, thing.scale)
        elif thing is not None:
            total += thing.nbytes
    return total


def _title(row: RowFormat) -> str:
    return f"{row.kind} {row.width}"
