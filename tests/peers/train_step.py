"""One training step of ours beside a plain one of transformers: same weights, same tokens.

    python -m tests.peers.train_step --tokens 4096 --rounds 3 --results results

Ours does all that a run of the bundled model's recipe does: Muon, draft block, distillation,
balance.
Theirs is forward, cross-entropy, backward, AdamW. Each in a process of its own, in turn; the record
has tokens a second (median step) and peak memory. Not a test.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from overleap import machine
from overleap.checkpoint import save
from overleap.eval.record import append, take
from overleap.train.initial import initial_weights
from overleap.train.muon import Optimizer
from overleap.train.passes import Pass
from overleap.train.recipe import Recipe, Stage
from overleap.train.recipes import mini_config
from tests.train.small import random_row

PROGRAMS = ("overleap", "transformers bf16", "transformers float32")
WARM_UP = 2


def ours(tokens: int, steps: int) -> list[float]:
    """Seconds of each step, the first ones included."""
    torch._dynamo.config.recompile_limit = 64
    config = mini_config()
    stage = Stage(steps, tokens, 1, (), mtp=0.3)
    recipe = Recipe(config=config, stages=(stage,), seed=0, language_rows=1.0)
    work = Pass(recipe, initial_weights(config, 0), torch.bfloat16)
    named = [(n, p) for n, p in work.model.named_parameters() if p.requires_grad]
    optimizer = Optimizer(named, work.ops, config)
    took = []
    for step in range(steps):
        row = random_row([tokens], step, config.vocab_size)
        began = time.perf_counter()
        optimizer.zero_grad()
        total, _, _ = work.losses(stage, [row], str(step))
        total.backward()
        work.ops.take()
        optimizer.step(0.01, 1e-3)
        took.append(time.perf_counter() - began)
    return took


def theirs(tokens: int, steps: int, dtype: torch.dtype) -> list[float]:
    """As `ours`."""
    import transformers

    config = mini_config()
    with tempfile.TemporaryDirectory() as scratch:
        save(initial_weights(config, 0), config, Path(scratch) / "model")
        transformers.utils.logging.disable_progress_bar()
        model = transformers.DeepseekV4ForCausalLM.from_pretrained(
            Path(scratch) / "model", dtype=dtype
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    took = []
    for step in range(steps):
        ids = torch.tensor([random_row([tokens], step, config.vocab_size).ids])
        began = time.perf_counter()
        optimizer.zero_grad()
        logits = model(ids, use_cache=False).logits[0]
        F.cross_entropy(logits[:-1].float(), ids[0, 1:]).backward()
        optimizer.step()
        took.append(time.perf_counter() - began)
    return took


def worker(program: str, tokens: int, steps: int) -> None:
    """One program's steps; what it took, as a line of JSON."""
    if program == "overleap":
        took = ours(tokens, steps)
    else:
        took = theirs(tokens, steps, getattr(torch, program.split()[1].replace("bf16", "bfloat16")))
    peak = machine.peak_resident_bytes()
    print(json.dumps({"seconds": took[WARM_UP:], "peak_process_bytes": peak}))


def main() -> None:
    """See the file header."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--program")
    given = parser.parse_args()
    if given.program:
        worker(given.program, given.tokens, given.steps + WARM_UP)
        return
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    peaks = dict.fromkeys(PROGRAMS, 0)
    for _ in range(given.rounds):
        for name in PROGRAMS:
            command = [sys.executable, "-m", "tests.peers.train_step", "--program", name]
            command += ["--tokens", str(given.tokens), "--steps", str(given.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(name, done.stderr[-600:])
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            seconds[name] += found["seconds"]
            peaks[name] = max(peaks[name], found["peak_process_bytes"])
    rows: list[dict[str, Any]] = []
    for name in PROGRAMS:
        if not seconds[name]:
            continue
        step = statistics.median(seconds[name])
        rows.append(
            {
                "program": name,
                "tokens_per_s": given.tokens / step,
                "step_s": step,
                "peak_process_bytes": peaks[name],
                "ratio": step / statistics.median(seconds["overleap"]),
                "memory_ratio": peaks[name] / peaks["overleap"],
            }
        )
        print(rows[-1])
    settings = {"model": "mini", "tokens": given.tokens, "threads": torch.get_num_threads()}
    if given.results:
        print(append(take("train", rows, settings), given.results))


if __name__ == "__main__":
    main()
