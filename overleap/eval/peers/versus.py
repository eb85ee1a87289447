"""Ours and other programs on the same weights and token ids, asked in turns in one run.

Not here: the programs (program.py, llama.py, hugging_face.py), the record (../record.py).
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from overleap import machine
from overleap.checkpoint import Checkpoint, convert
from overleap.errors import OverleapError, RequestError
from overleap.eval.peers.gguf import write_gguf
from overleap.eval.peers.program import Floats, Task
from overleap.eval.record import Scalar

PEERS = ("transformers", "llama.cpp")
VERSUS_DEPTHS = (2048, 8192)
REPEAT_UNDER_S = 20.0  # a reading that took longer is not made again
# A program may take so much of the memory that is free at the start; the rest is for the others.
MEMORY_SHARE = 0.6
COMPARED_TOKENS = 640
COMPARED_AT = (1, 127, 129, 511, 640)  # before and after a window, a chunk, many entries
Told = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One program of a comparison.

    name     as the record calls it
    program  `overleap`, or one of PEERS
    backend  of our kernels
    deepest  tokens that it is asked to read at most; None: all depths
    """

    name: str
    program: str
    backend: str = "auto"
    deepest: int | None = None

    @classmethod
    def peer(cls, text: str) -> Self:
        """From `NAME` or `NAME:DEEPEST`, as the command line has it."""
        name, _, deepest = text.partition(":")
        if name not in PEERS or (deepest and not deepest.isdecimal()):
            raise RequestError(
                f"{text!r} names no program to compare with", f"there are {', '.join(PEERS)}"
            )
        return cls(name, name, deepest=int(deepest) if deepest else None)


@dataclass
class Cell:
    """What one program did at one depth, over all rounds."""

    prefill_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    base_bytes: int = 0
    peak_bytes: int | None = None
    together_s: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Cells by program and depth, and how far the programs' answers were apart.

    facts     program -> its version and how it computes
    apart     program -> largest difference to the first program's log-probabilities
    same_best program -> share of compared places with the same likeliest token
    """

    cells: dict[tuple[str, int], Cell]
    facts: dict[str, str]
    apart: dict[str, float]
    same_best: dict[str, float]

    def rows(self) -> list[dict[str, Scalar]]:
        """As a record keeps them: medians, and factors of the first program over each other."""
        first = next(iter(self.cells))[0]
        rows: list[dict[str, Scalar]] = []
        for (name, depth), cell in self.cells.items():
            row: dict[str, Scalar] = {"program": name, "depth_tokens": depth}
            if cell.error is not None:
                rows.append(row | {"error": cell.error})
                continue
            prefill, step = statistics.median(cell.prefill_s), statistics.median(cell.steps_s)
            row |= {
                "prefills": len(cell.prefill_s),
                "prefill_s": prefill,
                "prefill_tokens_per_s": depth / prefill,
                "decode_tokens_per_s": 1 / step,
                "decode_slowest_s": max(cell.steps_s),
                "base_bytes": cell.base_bytes,
                "peak_process_bytes": cell.peak_bytes,
            }
            base = self.cells[first, depth]
            if name != first and base.error is None:
                row["prefill_factor"] = prefill / statistics.median(base.prefill_s)
                row["decode_factor"] = step / statistics.median(base.steps_s)
            rows.append(row)
        return rows


class _Process:
    """A program in a process of its own."""

    def __init__(self, task: Task, scratch: Path) -> None:
        self._log = (scratch / f"{task.program}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "overleap.eval.peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.facts = self.ask(asdict(task))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer. OverleapError with the program's own words, or the end of its log."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = ([text.strip() for text in self._log if text.strip()] or ["no word"])[-1]
            raise OverleapError(f"the process ended with {self._process.wait()}: {last[:300]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OverleapError(answer["error"], answer["hint"])
        return answer

    def close(self) -> None:
        """End the process, and with it what it holds."""
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def versus(
    folder: Path,
    contenders: Sequence[Contender],
    depths: Sequence[int],
    *,
    threads: int,
    rounds: int = 3,
    decode_tokens: int = 16,
    chunk_tokens: int = 512,
    together: int = 8,
    seed: int = 0,
    told: Told | None = None,
) -> Comparison:
    """Let every program read the same random text to each depth and write on from there.

    contenders     the first is what the others are compared with
    rounds         how often each reading is made, unless it is a long one (REPEAT_UNDER_S)
    decode_tokens  greedy steps after each reading; rates are of the median step
    together       sequences that ours continues at once at each depth
    told           called with a line for people before each reading
    A program that fails at a depth has the reason in its cell and is not asked for deeper ones.
    Raises OverleapError where a program cannot be started at all.
    """
    vocabulary = Checkpoint(folder).config.vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(
        vocabulary, (max(*depths, COMPARED_TOKENS),), generator=generator
    ).tolist()
    free = machine.free_bytes()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        open_ones: dict[str, _Process] = {}
        for one in contenders:
            process = _Process(
                Task(
                    one.program,
                    str(prepared(one.program, folder, scratch)),
                    vocabulary,
                    threads,
                    backend=one.backend,
                    chunk_tokens=chunk_tokens,
                    memory_bytes=None if free is None else int(MEMORY_SHARE * free),
                ),
                scratch,
            )
            stack.callback(process.close)
            open_ones[one.name] = process
        apart, same_best = _apart(open_ones, ids[:COMPARED_TOKENS], scratch)
        cells = {(one.name, d): Cell() for d in sorted(set(depths)) for one in contenders
                 if one.deepest is None or d <= one.deepest}  # fmt: skip
        for turn in range(rounds):
            for (name, depth), cell in cells.items():
                if turn and cell.prefill_s and cell.prefill_s[0] > REPEAT_UNDER_S:
                    continue
                if told:
                    told(f"round {turn + 1}: {name} reads {depth} tokens")
                _fill(cell, open_ones[name], ids[:depth], decode_tokens)
    return Comparison(
        cells,
        {name: f"{p.facts['version']}: {p.facts['manner']}" for name, p in open_ones.items()},
        apart,
        same_best,
    )


def prepared(program: str, folder: Path, scratch: Path, exact: bool = False) -> Path:
    """The checkpoint in the form that a program reads, written into `scratch` if need be."""
    if program == "llama.cpp":
        path = scratch / "model.gguf"
        write_gguf(folder, path, exact=exact)
        return path
    if program == "transformers" and Checkpoint(folder).config.quantization_config is not None:
        if not (scratch / "unpacked").exists():
            convert(folder, scratch / "unpacked", "bf16")  # exact
        return scratch / "unpacked"
    return folder


def _fill(cell: Cell, process: _Process, ids: list[int], steps: int) -> None:
    if cell.error is not None:
        return
    try:
        answer = process.ask({"what": "measure", "ids": ids, "steps": steps})
    except OverleapError as error:
        cell.error = error.message
        return
    cell.prefill_s.append(answer["prefill_s"])
    cell.steps_s += answer["steps_s"]
    cell.base_bytes = answer["base_bytes"]
    if answer["peak_bytes"] is not None:
        cell.peak_bytes = max(cell.peak_bytes or 0, answer["peak_bytes"])


def _apart(
    processes: dict[str, _Process], ids: list[int], scratch: Path
) -> tuple[dict[str, float], dict[str, float]]:
    found: dict[str, Floats] = {}
    for name, process in processes.items():
        path = scratch / f"{len(found)}.npy"
        request = {"what": "log_probabilities", "ids": ids, "ends": COMPARED_AT, "path": str(path)}
        process.ask(request)
        found[name] = np.load(path)
    first = next(iter(found.values()))
    others = list(found.items())[1:]
    return (
        {name: float(np.abs(rows - first).max()) for name, rows in others},
        {n: float((rows.argmax(-1) == first.argmax(-1)).mean()) for n, rows in others},
    )
