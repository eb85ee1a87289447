"""Ours and other programs on the same weights and token ids, asked in turns in one run.

Not here: the programs (program.py, llama.py, hugging_face.py), the record (../record.py).
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from overleap import machine
from overleap.cache.layout import CacheFormat
from overleap.checkpoint import Checkpoint, convert
from overleap.config import ModelConfig
from overleap.errors import OverleapError, RequestError
from overleap.eval.cost import decode_bytes, prefill_flops
from overleap.eval.peers.gguf import write_gguf
from overleap.eval.peers.program import Floats, Task
from overleap.eval.record import Scalar
from overleap.kernels.conformance.ceilings import Ceilings

PEERS = ("transformers", "llama.cpp")
VERSUS_DEPTHS = (2048, 8192)
TOGETHER = 8  # sequences that ours continues at once, at the least depth
REPEAT_UNDER_S = 20.0  # a reading that took longer is not made again
# A program may take so much of the memory that is free at the start; the rest is for the others.
MEMORY_SHARE = 0.6
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
    together_s: list[float] = field(default_factory=list)  # steps of TOGETHER sequences
    error: str | None = None
    stopped_s: float | None = None  # a reading that was stopped took longer than this


@dataclass(frozen=True)
class Comparison:
    """Cells by program and depth, and how far the programs' answers were apart.

    facts     program -> its version and how it computes
    apart     program -> largest difference to the first program's log-probabilities
    same_best program -> share of compared places with the same likeliest token
    limits    what the machine can do at best, to give shares of it
    """

    config: ModelConfig
    cells: dict[tuple[str, int], Cell]
    facts: dict[str, str]
    apart: dict[str, float]
    same_best: dict[str, float]
    limits: Ceilings | None = None

    def rows(self) -> list[dict[str, Scalar]]:
        """As a record keeps them: medians, and factors of the first program over each other."""
        first = next(iter(self.cells))[0]
        rows: list[dict[str, Scalar]] = []
        for (name, depth), cell in self.cells.items():
            row: dict[str, Scalar] = {"program": name, "depth_tokens": depth}
            if cell.error is not None:
                row["error"] = cell.error
                if cell.stopped_s is not None:
                    base_s = statistics.median(self.cells[first, depth].prefill_s)
                    row["prefill_factor_at_least"] = cell.stopped_s / base_s
                rows.append(row)
                continue
            prefill, step = statistics.median(cell.prefill_s), statistics.median(cell.steps_s)
            row |= {
                "prefills": len(cell.prefill_s),
                "prefill_s": prefill,
                "prefill_tokens_per_s": depth / prefill,
                "prefill_flop_per_s": prefill_flops(self.config, depth) / prefill,
                "decode_tokens_per_s": 1 / step,
                "decode_slowest_s": max(cell.steps_s),
                "decode_bytes": decode_bytes(self.config, depth, CacheFormat.RELEASE),
                "base_bytes": cell.base_bytes,
                "peak_process_bytes": cell.peak_bytes,
            }
            row |= self._shares(depth, prefill, step)
            if cell.together_s:
                together = TOGETHER / statistics.median(cell.together_s)
                row["together_tokens_per_s"] = together
                row["together_factor"] = together * step
            base = self.cells[first, depth]
            if name != first and base.error is None:
                row["prefill_factor"] = prefill / statistics.median(base.prefill_s)
                row["decode_factor"] = step / statistics.median(base.steps_s)
            rows.append(row)
        return rows

    def _shares(self, depth: int, prefill_s: float, step_s: float) -> dict[str, Scalar]:
        """Of the speed of light: of bf16 products while reading, of memory while writing."""
        limits = self.limits
        if limits is None:
            return {}
        least_s = decode_bytes(self.config, depth, CacheFormat.RELEASE) / limits.read.per_s
        shares: dict[str, Scalar] = {"decode_floor_share": least_s / step_s}
        if limits.bf16 is not None:
            done = prefill_flops(self.config, depth) / prefill_s
            shares["prefill_bf16_share"] = done / limits.bf16.per_s
        return shares


class _Process:
    """A program in a process of its own."""

    def __init__(self, task: Task, log: Path) -> None:
        self._task = task
        self.facts: dict[str, Any] = {}
        self.ended = False
        self._log = log.open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "overleap.eval.peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def start(self) -> None:
        """Load the weights. OverleapError as of ask()."""
        self.facts = self.ask(asdict(self._task))

    def ask(self, request: dict[str, Any], limit_s: float | None = None) -> dict[str, Any]:
        """The answer. OverleapError with the program's own words, or the end of its log.

        limit_s  after which the process is ended
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        end = None if limit_s is None else threading.Timer(limit_s, self._process.kill)
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if end is not None:
            end.start()
        line = self._process.stdout.readline()
        if end is not None:
            end.cancel()
        if not line:
            self.ended = True
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
    seed: int = 0,
    limits: Ceilings | None = None,
    patience: float | None = None,
    told: Told | None = None,
) -> Comparison:
    """Let every program read the same random text to each depth and write on from there.

    contenders     the first is what the others are compared with
    rounds         how often each reading is made, unless it is a long one (REPEAT_UNDER_S)
    decode_tokens  greedy steps after each reading; rates are of the median step
    limits         of this machine, for shares of them
    patience       a reading that takes so many times as long as the first program's is stopped
    told           called with a line for people before each reading
    A program that fails at a depth has the reason in its cell and is not asked for deeper ones.
    Raises OverleapError where a program cannot be started at all.
    """
    config = Checkpoint(folder).config
    generator = torch.Generator().manual_seed(seed)
    count = max(*depths, COMPARED_AT[-1])
    ids: list[int] = torch.randint(config.vocab_size, (count,), generator=generator).tolist()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = _started(
            stack, folder, contenders, scratch, threads=threads, chunk_tokens=chunk_tokens
        )
        apart, same_best = _apart(_answers(processes, ids[: COMPARED_AT[-1]], COMPARED_AT, scratch))
        cells = {(one.name, d): Cell() for d in sorted(set(depths)) for one in contenders
                 if one.deepest is None or d <= one.deepest}  # fmt: skip
        asked = _Asked(processes, ids, decode_tokens, told)
        for _ in range(rounds):
            asked.round(cells, contenders[0].name, patience)
        for one in contenders:
            if one.program == "overleap":
                asked.together(one.name, cells[one.name, min(depths)], min(depths))
    return Comparison(
        config,
        cells,
        {name: f"{p.facts['version']}: {p.facts['manner']}" for name, p in processes.items()},
        apart,
        same_best,
        limits,
    )


class _Asked:
    """Puts the questions, and remembers who failed at what."""

    def __init__(
        self, processes: dict[str, _Process], ids: list[int], steps: int, told: Told | None
    ) -> None:
        self._processes, self._ids, self._steps = processes, ids, steps
        self._told = told or (lambda line: None)
        self._rounds = 0
        self._failed: dict[str, int] = {}  # program -> tokens at which it failed

    def round(self, cells: dict[tuple[str, int], Cell], first: str, patience: float | None) -> None:
        """One reading of every cell, but where the last one was long or its program failed."""
        self._rounds += 1
        for (name, depth), cell in cells.items():
            at = self._failed.get(name)
            if at is not None and (depth >= at or self._processes[name].ended):
                if not cell.prefill_s and cell.error is None:
                    cell.error = f"not asked, after it failed at {at} tokens"
                continue
            if cell.prefill_s and cell.prefill_s[0] > REPEAT_UNDER_S:
                continue
            self._told(f"round {self._rounds}: {name} reads {depth} tokens")
            ours, limit_s = cells[first, depth], None
            if patience is not None and cell is not ours and ours.prefill_s:
                limit_s = patience * ours.prefill_s[0]
            self._fill(name, depth, cell, limit_s)

    def _fill(self, name: str, depth: int, cell: Cell, limit_s: float | None) -> None:
        """One reading. A failure is the cell's only where it has no reading yet."""
        request = {"what": "measure", "ids": self._ids[:depth], "steps": self._steps}
        began = time.monotonic()
        try:
            answer = self._processes[name].ask(request, limit_s)
        except OverleapError as error:
            self._failed[name] = depth
            stopped = limit_s is not None and time.monotonic() - began >= limit_s
            why = f"stopped after {limit_s:.0f} s" if stopped else error.message
            if cell.prefill_s:
                self._told(f"{name} at {depth} tokens: {why}")
            else:
                cell.error, cell.stopped_s = why, limit_s if stopped else None
            return
        cell.prefill_s.append(answer["prefill_s"])
        cell.steps_s += answer["steps_s"]
        cell.base_bytes = answer["base_bytes"]
        if answer["peak_bytes"] is not None:
            cell.peak_bytes = max(cell.peak_bytes or 0, answer["peak_bytes"])

    def together(self, name: str, cell: Cell, depth: int) -> None:
        """Steps of TOGETHER sequences, where their texts, which are read first, are not long."""
        process = self._processes[name]
        if process.ended or not cell.prefill_s or cell.prefill_s[0] > REPEAT_UNDER_S:
            return
        request = {"what": "together", "ids": self._ids[:depth], "steps": self._steps}
        try:
            cell.together_s += process.ask(request | {"sequences": TOGETHER})["steps_s"]
        except OverleapError as error:
            self._told(f"{name}, {TOGETHER} at once: {error.message}")


def answers(
    folder: Path,
    contenders: Sequence[Contender],
    ids: list[int],
    ends: Sequence[int],
    *,
    threads: int = 1,
    exact: bool = True,
) -> dict[str, Floats]:
    """Log-probabilities [len(ends), V] of what follows ids[:end], by program.

    exact  in float32 with nothing rounded: what is left is the order of sums
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = _started(stack, folder, contenders, scratch, threads=threads, exact=exact)
        return _answers(processes, ids, ends, scratch)


def _started(
    stack: ExitStack,
    folder: Path,
    contenders: Sequence[Contender],
    scratch: Path,
    *,
    threads: int,
    exact: bool = False,
    chunk_tokens: int = 512,
) -> dict[str, _Process]:
    """Every program with its weights loaded, until the stack is left."""
    vocabulary, free = Checkpoint(folder).config.vocab_size, machine.free_bytes()
    processes: dict[str, _Process] = {}
    for one in contenders:
        task = Task(
            one.program,
            str(_prepared(one.program, folder, scratch, exact)),
            vocabulary,
            threads,
            exact=exact,
            backend=one.backend,
            chunk_tokens=chunk_tokens,
            memory_bytes=None if free is None else int(MEMORY_SHARE * free),
        )
        process = _Process(task, scratch / f"{len(processes)}.log")
        stack.callback(process.close)
        process.start()
        processes[one.name] = process
    return processes


def _prepared(program: str, folder: Path, scratch: Path, exact: bool) -> Path:
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


def _answers(
    processes: dict[str, _Process], ids: list[int], ends: Sequence[int], scratch: Path
) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    for name, process in processes.items():
        path = scratch / f"{len(found)}.npy"
        process.ask({"what": "log_probabilities", "ids": ids, "ends": ends, "path": str(path)})
        found[name] = np.load(path)
    return found


def _apart(found: dict[str, Floats]) -> tuple[dict[str, float], dict[str, float]]:
    (_, first), *others = found.items()
    return (
        {name: float(np.abs(rows - first).max()) for name, rows in others},
        {n: float((rows.argmax(-1) == first.argmax(-1)).mean()) for n, rows in others},
    )
