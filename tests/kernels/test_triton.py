"""Kernels in Triton: compiled ahead of time for chips that are not here, proven in the interpreter.

Compiling needs no card: ptxas comes with Triton. The interpreter wants a process of its own
(test_triton_interpreted.py says what runs there), as do steps captured on the pretend device
(../engine/test_captured.py). State equivalence takes it more than an hour: `make test-hours`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overleap.errors import BackendError
from overleap.kernels import select, table
from overleap.kernels.conformance.draw import KEY, KV, Draw
from overleap.kernels.spec import Experts
from tests import pretend

triton = pytest.importorskip("triton", reason="triton is not installed (the extra `cuda`)")
if triton.knobs.runtime.interpret:
    pytest.skip("this process interprets kernels", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
needs_pretend = pytest.mark.skipif(bool(pretend.missing()), reason=str(pretend.missing()))
TYPES = {torch.float32: "*fp32", torch.int16: "*i16", torch.uint8: "*u8", torch.int64: "*i64"}
SMALL_FLOATS = re.compile(r"\bf8E|\bf4E|\bf6E|e4m3|e5m2|e2m1|ue8m0", re.IGNORECASE)
MODULES = ("attention", "compress", "linear", "rows", "streams")
Launch = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def test_without_a_card_it_says_what_would_run_it() -> None:
    with pytest.raises(BackendError, match="need a GPU") as refused:
        select("triton", "cpu")
    assert "TRITON_INTERPRET=1" in str(refused.value.hint)
    assert {row.backend for row in table("auto", "cpu")} & {"triton"} == set()


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from overleap.kernels import triton as ours

    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="triton is not installed") as refused:
        ours.ops("cpu")
    assert "overleap[cuda]" in str(refused.value.hint)


def test_the_older_chips_compile(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention, whose products in f32 take ptxas a minute."""
    compile_all(75, "older", seed, monkeypatch, but="attend_part")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "row"), [(75, "older"), (80, "ampere"), (90, "hopper")])
def test_every_kernel_compiles(
    capability: int, row: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_all(capability, row, seed, monkeypatch)


def compile_all(
    capability: int, row: str, seed: int, monkeypatch: pytest.MonkeyPatch, but: str = ""
) -> None:
    """Every kernel, as the ops launch it with release weights and rows; no FP8 or FP4 anywhere."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = launches(row, seed, monkeypatch)
    names = {kernel.fn.__name__ for kernel, _, _, _ in kernels}
    assert names >= {
        "product", "expert_hidden", "expert_down", "norm_turn", "transform", "pack_kv", "pack_key",
        "attend_part", "attend_join", "score_entries", "pool_rows", "mix_part", "gates", "collapse",
        "spread",
    }  # fmt: skip
    target = GPUTarget("cuda", capability, 32)
    for kernel, types, constants, options in kernels:
        if kernel.fn.__name__ == but:
            continue
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=places)
        made = triton.compile(source, target=target, options=options)
        assert len(made.asm["cubin"]) > 1000, kernel.fn.__name__
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            found = SMALL_FLOATS.search(made.asm[stage])
            assert found is None, (kernel.fn.__name__, stage, found)
        if capability < 80:  # these multiply no bf16, nor convert it
            assert not re.search(r"\bbf16\b", made.asm["ptx"]), kernel.fn.__name__
        room = 64 << 10 if capability < 80 else 160 << 10  # of shared memory, in bytes
        assert made.metadata.shared <= room, (kernel.fn.__name__, made.metadata.shared)
    print(f"{len(kernels)} kernels for sm_{capability}")


def test_small_floats_are_seen() -> None:
    for text in ("tensor<64xf8E4M3FN>", "cvt.rn.f16x2.e4m3x2", "tt.fp_to_fp : f4E2M1FN", "ue8m0x2"):
        assert SMALL_FLOATS.search(text), text
    assert not SMALL_FLOATS.search("tensor<64x64xf32> i8 f16 bf16 0xf8")


def launches(row: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the ops would launch with these tiles: kernel, types, constants, options."""
    from triton.runtime.jit import JITFunction

    from overleap.kernels.triton import ops as ours
    from overleap.kernels.triton.tuning import named

    found: dict[str, Launch] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **named_args: Any) -> None:
        bound = dict(zip(self.arg_names, args, strict=False)) | named_args
        options = {k: v for k, v in named_args.items() if k not in self.arg_names}
        constants = {p.name: bound[p.name] for p in self.params if p.is_constexpr}
        types = {
            p.name: "constexpr" if p.is_constexpr else type_of(bound[p.name]) for p in self.params
        }
        assert all(0 < n < 65536 for n in grid[1:]) and grid[0] > 0
        found[f"{self.fn.__name__} {types} {constants}"] = (
            self, types, constants, options | {"enable_fp_fusion": True},
        )  # fmt: skip

    served = ours("cuda")
    for name in MODULES:
        module = sys.modules[f"overleap.kernels.triton.{name}"]
        if "tuning" in vars(module):
            monkeypatch.setattr(module, "tuning", lambda device: named(row, 64))
    monkeypatch.setattr(JITFunction, "run", note)
    for call in calls(Draw(seed, torch.device("cpu"))):
        call(served)
    return list(found.values())


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]  # KeyError: a type that some chip does not have
    return "fp32" if isinstance(value, float) else "i32"


def calls(draw: Draw) -> list[Callable[[Any], object]]:
    """Every op of the backend in bf16 with release weights and rows, of a size that matters not."""
    bf16 = torch.bfloat16
    x, rows = draw.normal(3, 512, dtype=bf16), draw.normal(3, 2, 512)
    position, frequency = draw.integers(0, 99, 3), draw.normal(32)
    spans, ratio4, ratio128 = draw.spans((300, 2), (7, 1)), (KV, 4), (KV, 128)
    ids, share = torch.tensor([[0, 1]] * 3), draw.normal(3, 2)
    parts = [[draw.weight("fp4", n, 512) for _ in range(2)] for n in (512, 512, 512)]
    q, sink = draw.normal(3, 64, 512, dtype=bf16), draw.normal(64)
    chosen, ring = torch.tensor([[0, 1]] * 3), draw.ring(KV, 128, spans)
    streams = draw.normal(3, 4, 512, dtype=bf16)
    gates = (draw.normal(24, 2048), draw.normal(24), draw.normal(3))
    head = (draw.normal(4, 2048), draw.normal(4), draw.normal(1))
    fresh, keys = draw.rows(KV, 3), draw.rows(KEY, 3, 64)
    after = (sink, 0.1, 128, spans)
    some = [
        lambda ops, form=form: ops["matmul"](x, draw.weight(form, 512, 512), form[:2] == "fp")
        for form in ("bf16", "fp8", "fp4")
    ]
    some += [
        lambda ops: ops["matmul"](x.repeat(40, 1), draw.weight("fp8", 512, 512), True),
        lambda ops: ops["grouped_matmul"](draw.normal(3, 2, 512), draw.weight("fp8", 512, 512)),
        lambda ops: ops["experts"](x, ids, share, Experts(*map(tuple, parts)), 10.0, True),
        lambda ops: ops["norm_rope"](x, draw.normal(512), 1e-6, position, frequency),
        lambda ops: ops["rms_norm"](x, None, 1e-6),
        lambda ops: ops["rotate"](x, position, frequency, True),
        lambda ops: ops["hadamard"](draw.normal(3, 64, 128, dtype=bf16)),
        lambda ops: ops["quantize"](x, KV),
        lambda ops: ops["quantize"](x[:, :128], KEY),
        lambda ops: ops["compress"](rows, draw.tail(512, 128, spans), draw.normal(128, 512), 128,
                                    draw.spans((127, 2), (0, 1))),
        lambda ops: ops["compress"](rows, draw.tail(512, 4, spans), draw.normal(4, 512), 4, spans),
        lambda ops: ops["index_topk"](keys, draw.normal(3, 64), draw.pool(KEY, 4, spans), 4, spans,
                                      2),
        lambda ops: ops["attend"](q, fresh, ring, draw.pool(*ratio4, spans), chosen, 4, *after),
        lambda ops: ops["attend"](q, fresh, ring, draw.pool(*ratio128, spans), None, 128, *after),
        lambda ops: ops["hc_pre"](streams, *gates, 20, 1e-6, 1e-6),
        lambda ops: ops["hc_head"](streams, *head, 1e-6, 1e-6),
        lambda ops: ops["hc_post"](x, streams, draw.normal(3, 4), draw.normal(3, 4, 4)),
    ]  # fmt: skip
    return some


def interpret(*what: str, passing: int, device: str = "cpu") -> None:
    """pytest in a process that interprets kernels; at least so many tests pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    variables = {
        "TRITON_INTERPRET": "1", "OVERLEAP_TEST_BACKEND": "triton", "OVERLEAP_TEST_DEVICE": device
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--timeout", "3500", *what],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    print(last)
    assert int(last.split(" passed")[0].split()[-1]) >= passing, last


@pytest.mark.timeout(900)
def test_some_of_every_op_in_the_interpreter() -> None:
    interpret("tests/kernels/test_triton_interpreted.py", "-k", "every_op", passing=1)


@needs_pretend
@pytest.mark.timeout(900)
def test_some_steps_captured_on_a_pretend_device() -> None:
    interpret("tests/engine/test_captured.py", "-k", "not bits", passing=3, device=pretend.NAME)


@needs_pretend
@pytest.mark.slow
def test_steps_captured_on_a_pretend_device() -> None:
    interpret("tests/engine/test_captured.py", "-k", "bits", passing=2, device=pretend.NAME)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["older", "hopper"])
def test_tiles_of_cards_in_the_interpreter(row: str) -> None:
    interpret("tests/kernels/test_triton_interpreted.py", "-k", f"tiles and {row}", passing=1)


@pytest.mark.slow
def test_all_of_every_op_in_the_interpreter() -> None:
    interpret("tests/kernels/test_triton_interpreted.py", "-k", "all_cases", passing=1)


@pytest.mark.hours
def test_state_equivalence_in_the_interpreter() -> None:
    interpret("tests/test_state.py", passing=53)
