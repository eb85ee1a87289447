"""What is tried with the coarse ops: the cases of their parts, and what the parts do to each other.

Where one part rounds what another made, inputs are such that nothing is left to round.
Read next: cases.py, sequences.py (the parts), kernels/composed.py (what a coarse op is).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overleap.kernels.conformance import cases, exact, sequences
from overleap.kernels.conformance.cases import EPS, FLOATS, Case
from overleap.kernels.conformance.compare import RULES, Check, Finding, all_of, close, same_bytes
from overleap.kernels.conformance.draw import KEY, KV, KV_SHORT, WIDE, Draw
from overleap.kernels.conformance.exact import Exact
from overleap.kernels.spec import Experts, Joint, RowFormat, Weight


def project(draw: Draw, timed: bool) -> Iterator[Case]:
    """Several forms at once, results side by side and apart, with and without a norm."""
    for tokens, inputs in [(1, 256), (63, 129), (127, 64), (0, 32)]:
        forms = ["bf16", "fp8", "f32"] + ["fp4"] * (inputs % 32 == 0)
        for dtype in FLOATS:
            plain = [form for form in forms if form != "f32" or dtype is torch.float32]
            x = draw.normal(tokens, inputs, dtype=dtype)
            for norm in (None, draw.normal(inputs)):
                parts = [
                    Joint((draw.weight(form, 17, inputs), draw.weight(form, 64, inputs)), False, w)
                    for form in plain
                    for w in (False, True)
                ]
                if norm is None:
                    parts += [Joint((draw.weight("fp8", 33, inputs),), True)]
                given = x if norm is None else exact.rms_norm(x, norm, EPS).want
                checks = [_projected(given, part, dtype, norm is not None) for part in parts]
                name = f"{tokens}x{inputs}{' normed' * (norm is not None)}"
                args = (x, tuple(parts), norm, EPS)
                yield Case("project", name, args, all_of(*checks), dtype)


def _projected(x: Tensor, part: Joint, dtype: torch.dtype, rounded_before: bool) -> Check:
    found = [exact.matmul(x, weight, part.round_input) for weight in part.weights]
    want = Exact(*(torch.cat([getattr(f, n) for f in found], -1) for n in ("want", "size")))
    # A norm's result is stored in bf16 before the products, so that f32 sums are no closer.
    wide = part.wide and not rounded_before
    strict = RULES["project"].bfloat16 / RULES["project"].float32
    times = strict if wide and dtype is torch.bfloat16 else 1.0
    return close(want, torch.float32 if part.wide else dtype, times)


def attention_inputs(draw: Draw, timed: bool) -> Iterator[Case]:
    """Values in wide f32 rows; and signs, which no norm and no rounding on the way changes."""
    for tokens in (0, 1, 63):
        yield _inputs_of_values(draw, tokens)
        for dtype in FLOATS:
            yield _inputs_of_signs(draw, tokens, dtype)


def _inputs_of_values(draw: Draw, tokens: int) -> Case:
    columns, rank, heads, width = 129, 65, 3, 64
    frequency = 10000.0 ** -(torch.arange(8) / 8).to(draw.device)
    position, x = draw.integers(0, 1 << 20, tokens), draw.normal(tokens, columns)
    q_norm, kv_norm = draw.normal(rank), draw.normal(width)
    shapes = [(rank, columns), (width, columns), (17, columns), (heads * width, rank), (33, rank)]
    a, kv, other, b, more = (draw.weight("f32", *shape) for shape in shapes)

    def normed(of: Exact, weight: Tensor | None) -> Exact:
        want = exact.rms_norm(of.want, weight, EPS).want
        factor = exact.rms_norm(of.want, weight, EPS).want / of.want
        return Exact(want, of.size * factor.abs())

    def times(of: Exact, weight: Weight) -> Exact:
        w = exact.weight_values(weight)
        return Exact(of.want @ w.T, of.size @ w.abs().T)

    def turned(of: Exact) -> Exact:
        want = exact.rotate(of.want, position, frequency, False).want
        pairs = (
            of.size[..., -16:]
            .unflatten(-1, (8, 2))
            .sum(-1, keepdim=True)
            .expand(*of.size.shape[:-1], 8, 2)
        )
        return Exact(want, torch.cat([of.size[..., :-16], pairs.flatten(-2)], -1))

    latent = normed(exact.matmul(x, a, False), q_norm)
    q, row = times(latent, b), normed(exact.matmul(x, kv, False), kv_norm)
    q = Exact(*(part.unflatten(-1, (heads, width)) for part in (q.want, q.size)))
    wanted = [
        turned(normed(q, None)),
        turned(row),
        exact.matmul(x, other, False),
        times(latent, more),
    ]
    of_input, of_latent = (
        tuple(Joint((w,), False) for w in part) for part in ((a, kv, other), (b, more))
    )
    args = (x, of_input, of_latent, q_norm, kv_norm, EPS, heads, position, frequency)
    checks = all_of(*(close(want, torch.float32) for want in wanted))
    return Case(
        "attention_inputs",
        f"{tokens} of values, wide rows",
        (*args, RowFormat("wide", width, 0)),
        checks,
    )


def _inputs_of_signs(draw: Draw, tokens: int, dtype: torch.dtype) -> Case:
    columns, rank, heads = 128, 64, 2
    width, still = KV.width, torch.zeros(tokens, dtype=torch.int64, device=draw.device)
    frequency = 10000.0 ** -(torch.arange(KV.rope // 2) / (KV.rope // 2)).to(draw.device)
    x = (2 * draw.integers(0, 2, tokens, columns) - 1).to(dtype)

    def picking(outputs: int, inputs: int) -> tuple[Weight, Tensor]:
        which = draw.integers(0, inputs, outputs)
        one = torch.nn.functional.one_hot(which, inputs)
        return Weight(one.bfloat16()), which

    (a, of_a), (kv, of_kv) = picking(rank, columns), picking(width, columns)
    (b, of_b), packed = picking(heads * width, rank), draw.weight("fp8", 33, rank)
    latent, ones = x[:, of_a], torch.ones(max(rank, width), device=draw.device)
    q = exact.rms_norm(latent[:, of_b].unflatten(-1, (heads, width)), None, EPS)
    row = exact.rms_norm(x[:, of_kv], None, EPS).want.to(dtype)
    wide = Joint((draw.weight("bf16", 17, columns),), False, True)
    checks = all_of(
        close(q, dtype),
        same_bytes(exact.row_bytes(row, KV)),
        close(exact.matmul(x, wide.weights[0], False), torch.float32),
        close(exact.matmul(latent, packed, True), dtype),
    )
    args = (
        *(x, (Joint((a,), False), Joint((kv,), False), wide)),
        *((Joint((b,), False), Joint((packed,), True)), ones[:rank], ones[:width]),
        *(EPS, heads, still, frequency, KV),
    )
    return Case("attention_inputs", f"{tokens} of signs, packed rows", args, checks, dtype)


def project_back(draw: Draw, timed: bool) -> Iterator[Case]:
    """Plain weights; and small whole numbers, which e4m3 holds, with a rounded second half."""
    for tokens, groups, inputs, rank, outputs in [(63, 3, 129, 17, 65), (1, 2, 64, 64, 256)]:
        for dtype in FLOATS:
            x = draw.normal(tokens, groups, inputs, dtype=dtype)
            inner = draw.weight("bf16", groups * rank, inputs)
            outer = draw.weight("bf16", outputs, groups * rank)
            latent = exact.grouped_matmul(x, inner)
            w = exact.weight_values(outer)
            size = latent.size.flatten(1) @ w.abs().T
            check = close(Exact(latent.want.flatten(1) @ w.T, size), dtype)
            args = (x, inner, Joint((outer,), False))
            yield Case("project_back", f"{tokens}x{groups}x{inputs}", args, check, dtype)
            whole = draw.integers(-1, 2, tokens, groups, 8).to(dtype)
            ones = Weight(draw.integers(-1, 2, groups * rank, 8).bfloat16())
            packed = draw.weight("fp8", outputs, groups * rank)
            latent = exact.grouped_matmul(whole, ones)
            want = exact.matmul(latent.want.flatten(1), packed, True)
            args = (whole, ones, Joint((packed,), True))
            name = f"whole numbers, {tokens}x{groups}, fp8 rounded"
            yield Case("project_back", name, args, close(want, dtype), dtype)


def norm_rope_quantize(draw: Draw, timed: bool) -> Iterator[Case]:
    """Every part alone and all together in wide rows; packed rows of what no part changes."""
    frequency = 10000.0 ** -(torch.arange(8) / 8).to(draw.device)
    for heads in ((), (3,)):
        position = draw.integers(0, 1 << 20, 63)
        x = draw.normal(63, *heads, 64)
        for weight, eps, mixed in (
            (None, None, False),
            (draw.normal(64), EPS, False),
            (None, EPS, True),
            (None, None, True),
        ):
            args: tuple[Any, ...] = (
                *(x, weight, eps, position, frequency, mixed, RowFormat("wide", 64, 0)),
            )
            normed = x if eps is None else exact.rms_norm(x, weight, eps).want
            want = exact.rotate(normed, position, frequency, False)
            if mixed:
                want = exact.hadamard(want.want)
            check = close(want, torch.float32)
            name = f"wide, {len(heads)} heads, norm {eps is not None}, mixed {mixed}"
            yield Case("norm_rope_quantize", name, args, check)
        still = torch.zeros(63, dtype=torch.int64, device=draw.device)
        for row in (KV, KV_SHORT, KEY, WIDE):
            for dtype in FLOATS:
                x = draw.normal(63, *heads, row.width, dtype=dtype, extreme=True)
                args = (x, None, None, still, frequency, False, row)
                check = same_bytes(exact.row_bytes(x, row))
                name = f"{row.kind} {row.width}, {len(heads)} heads, position 0"
                yield Case("norm_rope_quantize", name, args, check, dtype)
        # Of width 64 the transform divides by 8, so that whole numbers stay exact.
        key = RowFormat("key", 64, 0)
        whole = draw.integers(-3, 4, 63, *heads, key.width).float()
        check = same_bytes(exact.row_bytes(exact.hadamard(whole).want.float(), key))
        args = (whole, None, None, still, frequency, True, key)
        yield Case("norm_rope_quantize", f"key, {len(heads)} heads, mixed", args, check)


def compress_write(draw: Draw, timed: bool) -> Iterator[Case]:
    """The cases of compress, and the tail afterwards."""
    for case in sequences.compress(draw, False):
        rows, tail, _, _, spans = case.args
        written = same_bytes(exact.window_write(tail, rows, spans), tail)
        yield replace(case, op="compress_write", check=_both(case.check, written), writes=1)


def attend_write(draw: Draw, timed: bool) -> Iterator[Case]:
    """The cases of attend, turned back, and the ring afterwards."""
    for case in sequences.attend(draw, False):
        _, fresh, ring, *_, spans = case.args
        frequency = 10000.0 ** -(torch.arange(2) / 2).to(draw.device)
        out, log = exact.attend(*case.args)
        turned = exact.rotate(out.want, spans.position_T, frequency, True).want
        size, slack = out.size.clone(), out.slack
        pairs = size[..., -4:].unflatten(-1, (2, 2)).norm(dim=-1, keepdim=True)
        size[..., -4:] = pairs.expand(*pairs.shape[:-1], 2).flatten(-2)
        check = all_of(
            close(Exact(turned, size, None if slack is None else 2 * slack), case.dtype),
            close(log, torch.float32),
        )
        written = same_bytes(exact.window_write(ring.rows, fresh, spans), ring.rows)
        yield replace(
            case,
            op="attend_write",
            args=(*case.args, frequency),
            check=_both(check, written),
            writes=2,
            moved=0,
        )


def _both(result: Check, written: Check) -> Check:
    def check(got: Any) -> Finding:
        return max((result(got), written(got)), key=lambda finding: finding.error)

    return check


def mixture(draw: Draw, timed: bool) -> Iterator[Case]:
    """The cases of experts, with a shared expert of the same and of another width and form."""
    for case in cases.experts(draw, False):
        x, ids, share, routed, limit, rounds = case.args
        width, inner = x.shape[1], routed.w1[0].data.shape[0]
        form = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(routed.w1[0].data.dtype, "fp8")
        shapes = ((inner, width), (width, inner), (inner, width))
        shared = Experts(*((draw.weight(form, *shape),) for shape in shapes))
        rule = RULES["experts"]
        doubt = rule.bfloat16 if case.dtype is torch.bfloat16 else rule.float32
        every = torch.zeros((x.shape[0], 1), dtype=torch.int64), torch.ones((x.shape[0], 1))
        both = (
            exact.experts(x, ids, share, routed, limit, rounds, doubt),
            exact.experts(x, *every, shared, limit, rounds, doubt),
        )
        slack = [part.slack for part in both if part.slack is not None]
        want = Exact(
            both[0].want + both[1].want,
            both[0].size + both[1].size,
            torch.stack(slack).sum(0) if slack else None,
        )
        args = (x, ids, share, routed, shared, limit)
        yield replace(case, op="mixture", args=args, check=close(want, case.dtype), moved=0)


def hc_pre_norm(draw: Draw, timed: bool) -> Iterator[Case]:
    """The cases of hc_pre; its y normed."""
    for case in cases.hc_pre(draw, False):
        norm = draw.normal(case.args[0].shape[2])
        y, post, comb = exact.hc_pre(*case.args)
        normed = exact.rms_norm(y.want, norm, EPS).want
        mean = (y.want**2).mean(-1, keepdim=True) + EPS
        # An error of y counts itself, and through the root of the mean of squares.
        through = (y.want.abs() * y.size).mean(-1, keepdim=True) / mean
        size = norm.cpu().double().abs() * (y.size + y.want.abs() * through) / mean.sqrt()
        times = RULES["hc_pre"].bfloat16 / RULES["hc_pre"].float32
        strict = times if case.dtype is torch.bfloat16 else 1.0
        gates = [close(gate, torch.float32, strict) for gate in (post, comb)]
        check = all_of(close(Exact(normed, size), case.dtype), *gates)
        yield replace(case, op="hc_pre_norm", args=(*case.args, norm), check=check, moved=0)
