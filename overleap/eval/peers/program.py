"""What is asked of a program that is measured. No torch: llama.cpp runs in a process without it.

In a process where torch has computed before, it was measured to write at a quarter of its speed.
Not here: the programs (ours.py, llama.py, hugging_face.py), asking (versus.py).
Read next: worker.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARM_UP_TOKENS = 256
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Task:
    """How a program is to be set up.

    program       `overleap`, `transformers` or `llama.cpp`
    path          a checkpoint folder, unpacked for transformers; for llama.cpp a GGUF file
    vocabulary    token ids of the model
    exact         float32 throughout and nothing rounded, for comparing logits
    backend       of our kernels; others have none
    chunk_tokens  of our prefill steps; the others read in their own usual way
    memory_bytes  that the process may take at most; None: no limit
    """

    program: str
    path: str
    vocabulary: int
    threads: int
    exact: bool = False
    backend: str = "auto"
    chunk_tokens: int = 512
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds to read a text, and of each greedy step that continues it."""

    prefill_s: float
    steps_s: tuple[float, ...]


class Program(ABC):
    """A program with a model in memory, ready to read."""

    version: str
    # How it computes, in a few words, for the record.
    manner: str

    @abstractmethod
    def measure(self, ids: list[int], steps: int) -> Measured:
        """Read the text from nothing, then write `steps` tokens."""

    @abstractmethod
    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Floats:
        """[len(ends), V]: of the token that follows ids[:end], for every end."""

    def write_together(self, ids: list[int], sequences: int, steps: int) -> list[float]:
        """Seconds of steps that each continue so many texts, of the length of `ids`, by a token."""
        raise NotImplementedError  # only ours is asked


def open_program(task: Task) -> Program:
    """The program that the task names, with its weights loaded.

    Raises OverleapError where the package that it comes in is not installed.
    """
    if task.program == "llama.cpp":
        from overleap.eval.peers.llama import Llama

        return Llama(task)
    program: Any
    if task.program == "transformers":
        from overleap.eval.peers.hugging_face import HuggingFace as program
    else:
        from overleap.eval.peers.ours import Ours as program
    opened: Program = program(task)
    return opened
