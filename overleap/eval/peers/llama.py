"""llama.cpp through the wheel `xllamacpp`, an independent implementation in C++.

Our own GGUF file goes in (gguf.py), token ids too; its own clock times the reading, ours the
steps. Not its server's HTTP: requests are made in this process.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overleap.checkpoint import Checkpoint
from overleap.errors import OverleapError
from overleap.eval.peers.gguf import write_gguf
from overleap.eval.peers.program import Measured, Program, Task

PACKAGE = "xllamacpp"
_MARGIN = 256  # contexts are rounded up to this


class Llama(Program):
    """A GGUF file of its own, kept as long as this object."""

    def __init__(self, task: Task, folder: Path) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise OverleapError(
                f"llama.cpp comes with the package {PACKAGE}, which is not there ({error})",
                "pip install overleap[peers]",
            ) from None
        self._module: Any = xllamacpp
        self._threads, self._exact = task.threads, task.exact
        self._vocabulary = Checkpoint(folder).config.vocab_size
        self._scratch = tempfile.TemporaryDirectory()
        self._path = Path(self._scratch.name) / "model.gguf"
        write_gguf(folder, self._path, exact=task.exact)
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
        request = self._request(ids, steps + 1) | {"stream": True}
        timings: list[dict[str, float]] = []

        def note(event: dict[str, Any]) -> bool:
            if "timings" in event:
                timings.append(event["timings"])
            if event["choices"] and event["choices"][0]["text"]:
                seen.append(time.perf_counter())
            return False

        self._server.handle_completions(request, note)
        if not timings or int(timings[-1]["prompt_n"]) != len(ids) or len(seen) != steps + 1:
            raise OverleapError(
                f"llama.cpp read or wrote other than asked: {timings}, {len(seen)} tokens"
            )
        steps_s = tuple(later - earlier for earlier, later in pairwise(seen))
        return Measured(timings[-1]["prompt_ms"] / 1000, steps_s)

    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Tensor:
        self._open(len(ids) + 1)
        rows = []
        for end in ends:
            request = self._request(ids[:end], 1) | {"logprobs": self._vocabulary}
            answer = self._server.handle_completions(request)
            found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            row = torch.full((self._vocabulary,), -torch.inf)
            row[[one["id"] for one in found]] = torch.tensor([one["logprob"] for one in found])
            rows.append(row)
        return torch.stack(rows)

    def _request(self, ids: list[int], count: int) -> dict[str, Any]:
        return {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }

    def _open(self, tokens: int) -> None:
        """A server whose context is just large enough, so that its memory is that of this text."""
        context = -(-(tokens + 1) // _MARGIN) * _MARGIN
        if context == self._context:
            return
        self._server = None  # frees the one before
        module = self._module
        params = module.CommonParams()
        params.model.path = str(self._path)
        params.n_ctx = context
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.n_ctx_checkpoints = params.cache_ram_mib = 0  # nothing is read twice
        params.verbosity = 0
        if self._exact:
            params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = module.Server(params)
        except RuntimeError as error:
            raise OverleapError(f"llama.cpp cannot open a context of {context}: {error}") from None
        self._context = context
        sys.stderr.flush()
