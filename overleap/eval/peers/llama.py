"""llama.cpp through the wheel `xllamacpp`, an independent implementation in C++.

Token ids go in; its own clock times the reading, ours the steps. Not its server's HTTP: requests
are made in this process. Not here: the file it reads (gguf.py). No torch, see program.py.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from overleap.errors import OverleapError
from overleap.eval.peers.program import Floats, Measured, Program, Task

PACKAGE = "xllamacpp"
_MARGIN = 256  # contexts are rounded up to this


class Llama(Program):
    """One slot, everything else as llama.cpp has it by default."""

    def __init__(self, task: Task) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise OverleapError(
                f"llama.cpp comes with the package {PACKAGE}, which is not there ({error})",
                "pip install overleap[peers]",
            ) from None
        self._module: Any = xllamacpp
        self._task = task
        self._server: Any = None
        self._context = 0
        self.version = version(PACKAGE)
        built = " ".join(
            part.split(" = ")[0].strip()
            for part in xllamacpp.get_system_info().partition(":")[2].split("|")
            if part.strip()
        )
        self.manner = f"{PACKAGE} wheel, {'f32' if task.exact else 'f16'} cache, built for {built}"

    def measure(self, ids: list[int], steps: int) -> Measured:
        self._open(len(ids) + steps)
        seen: list[float] = []
        timings: list[dict[str, float]] = []

        def note(event: dict[str, Any]) -> bool:
            if "timings" in event:
                timings.append(event["timings"])
            if event["choices"] and event["choices"][0]["text"]:
                seen.append(time.perf_counter())
            return False

        self._server.handle_completions(_request(ids, steps + 1) | {"stream": True}, note)
        if not timings or int(timings[-1]["prompt_n"]) != len(ids) or len(seen) != steps + 1:
            raise OverleapError(
                f"llama.cpp read or wrote other than asked: {timings}, {len(seen)} tokens"
            )
        steps_s = tuple(later - earlier for earlier, later in pairwise(seen))
        return Measured(timings[-1]["prompt_ms"] / 1000, steps_s)

    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Floats:
        self._open(len(ids) + 1)
        rows = np.full((len(ends), self._task.vocabulary), -np.inf, np.float32)
        for row, end in zip(rows, ends, strict=True):
            request = _request(ids[:end], 1) | {"logprobs": self._task.vocabulary}
            answer = self._server.handle_completions(request)
            found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            row[[one["id"] for one in found]] = [one["logprob"] for one in found]
        return rows

    def _open(self, tokens: int) -> None:
        """A server whose context is just large enough, so that its memory is that of this text."""
        context = -(-(tokens + 1) // _MARGIN) * _MARGIN
        if context == self._context:
            return
        self._server = None  # frees the one before
        module, params = self._module, self._module.CommonParams()
        params.model.path = self._task.path
        params.n_ctx = context
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._task.threads
        params.n_ctx_checkpoints = params.cache_ram_mib = 0  # nothing is read twice
        params.verbosity = 0
        if self._task.exact:
            params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = module.Server(params)
        except RuntimeError as error:
            raise OverleapError(f"llama.cpp cannot open a context of {context}: {error}") from None
        self._context = context


def _request(ids: list[int], count: int) -> dict[str, Any]:
    return {
        "prompt": ids,
        "n_predict": count,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
