"""The process of one program: requests come in as lines of JSON, answers go out as such.

    python -m overleap.eval.peers.worker

First line: the task. Then one request a line, until the input ends. What the program itself
prints goes to stderr. Not for people: versus.py starts it.
"""

import json
import os
import resource
import sys
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np

from overleap import machine
from overleap.errors import OverleapError
from overleap.eval.peers.program import Program, Task, open_program


def main() -> None:
    """Serve until the input ends; a program that fails says so and ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        task = Task(**json.loads(sys.stdin.readline()))
        if task.memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
        program = open_program(task)
        _put(answers, {"version": program.version, "manner": program.manner})
        for line in sys.stdin:
            _put(answers, _served(program, json.loads(line)))
    except OverleapError as error:
        _put(answers, {"error": error.message, "hint": error.hint})
    except (MemoryError, RuntimeError) as error:
        # torch raises RuntimeError where memory ends.
        _put(answers, {"error": str(error).partition("\n")[0] or "out of memory", "hint": None})


def _served(program: Program, request: dict[str, Any]) -> dict[str, Any]:
    ids = request["ids"]
    if request["what"] == "log_probabilities":
        np.save(request["path"], program.log_probabilities(ids, request["ends"]))
        return {}
    if request["what"] == "together":
        return {"steps_s": program.write_together(ids, request["sequences"], request["steps"])}
    machine.forget_peak()
    before = machine.resident_bytes()
    measured = program.measure(ids, request["steps"])
    return asdict(measured) | {"base_bytes": before, "peak_bytes": machine.recent_peak_bytes()}


def _put(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
