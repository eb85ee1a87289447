"""Native code with one line changed, compiled anew, is caught: a tie, a rounding, an unwritten row.

The three sources are compiled as they are, too: what is caught is the change, not the compiling.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overleap.kernels import select
from overleap.kernels.conformance import conform
from tests.kernels.native import native

from overleap.kernels.cpu import rows  # isort: skip (skipped without native)

SOURCE = Path(rows.__file__).parent / "src"
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = "-std=c++20 -O1 -ffp-contract=off -fPIC -shared -pthread -w -DOVERLEAP_ISA=portable".split()

# What bind_rows.cpp makes of the arguments, for C callers.
SHIM = """
#include <cstring>
#include "rows.h"
using namespace overleap;
extern "C" {
void hadamard(const void* x, int type, int64_t count, int64_t width, void* out, int threads) {
    portable::hadamard({x, static_cast<Float>(type), count, 1, width, out, threads});
}
void quantize(const void* x, int type, int64_t count, int64_t width, bool key, int64_t rotary,
              int64_t bytes, void* out, int threads) {
    portable::quantize({x, static_cast<Float>(type), count, 1, width, out, threads},
                       {key, rotary, bytes});
}
static float value(const void* p, int type, int64_t i) {
    if (type == 0) return static_cast<const float*>(p)[i];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}
void route(const void* x, int type, int64_t tokens, int64_t width, const void* gate, int form,
           const float* bias, const int64_t* fixed, int64_t experts, int64_t k, float scale,
           int64_t* ids, float* weight, int threads) {
    std::vector<float> logit(static_cast<size_t>(tokens * experts));
    for (int64_t i = 0; i < tokens * experts; i++)
        for (int64_t j = 0; j < width; j++)
            logit[i] += value(x, type, i / experts * width + j) *
                        value(gate, form, i % experts * width + j);
    portable::route({logit.data(), bias, fixed, tokens, experts, k, scale, ids, weight, threads});
}
}
"""
TYPES: dict[str, list[Any]] = {
    "hadamard": [c_void_p, c_int, c_int64, c_int64, c_void_p, c_int],
    "quantize": [c_void_p, c_int, *[c_int64] * 2, c_bool, *[c_int64] * 2, c_void_p, c_int],
    "route": [
        *(c_void_p, c_int, c_int64, c_int64, c_void_p, c_int, c_void_p, c_void_p),
        *(c_int64, c_int64, c_float, c_void_p, c_void_p, c_int),
    ],
}
# op: its source, a line of it, the line with a mistake, what conform says of it
MISTAKES = {
    "route": (
        "kernel_pooling.cpp",
        "at && better(own, rank(ids[at - 1])); at--",
        "at && !better(rank(ids[at - 1]), own); at--",
        "ties went to larger experts",
    ),
    "quantize": (
        "kernel_quantize.cpp",
        "bits_of(scaled + reinterpret_cast<vf>(magic))",
        "bits_of(scaled * 0x1.000002p0f + reinterpret_cast<vf>(magic))",
        "rows differ",
    ),
    "hadamard": (
        "kernel_rows.cpp",
        "for (int64_t row = first; row < last; row++)\n                hadamard_row(",
        "for (int64_t row = first; row + 1 < last; row++)\n                hadamard_row(",
        "values are NaN",
    ),
}
Compiled = Callable[[str], ctypes.CDLL]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The three sources and the shim as a library: `sound`, or `broken` with all three mistakes."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    (folder / "shim.cpp").write_text(SHIM, "utf-8")

    def build(kind: str) -> ctypes.CDLL:
        library = folder / f"{kind}.so"
        if not library.exists():
            parts = [SOURCE / "threads.cpp", folder / "shim.cpp"]
            for file, line, mistake, _ in MISTAKES.values():
                text = (SOURCE / file).read_text("utf-8")
                assert text.count(line) == 1, f"{file} no longer has the line: {line}"
                parts.append(folder / f"{kind}_{file}")
                changed = text.replace(line, mistake) if kind == "broken" else text
                parts[-1].write_text(changed, "utf-8")
            command = [COMPILER, *FLAGS, f"-I{SOURCE}", "-o", library, *parts]
            subprocess.run([str(part) for part in command], check=True, timeout=240)
        return ctypes.CDLL(str(library))

    return build


@pytest.mark.parametrize("op", MISTAKES)
def test_a_broken_native_op_is_caught(
    op: str, compiled: Compiled, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("sound", "broken"):
        function = getattr(compiled(kind), op)
        function.argtypes, function.restype = TYPES[op], None
        own = {name: getattr(native, name) for name in dir(native) if name[0] != "_"}
        monkeypatch.setattr(rows, "_native", SimpleNamespace(**(own | {op: function})))
        verdicts = conform(select("cpu"), seed=seed, only=[op])
        failed = [v for v in verdicts if not v.passed]
        if kind == "sound":
            assert failed == []
        else:
            assert failed and any(MISTAKES[op][3] in (v.reason or "") for v in failed), failed[:3]
