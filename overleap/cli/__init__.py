"""The command `overleap`: each command a few lines that call a room.

The only room that may read the environment. Read next: talk.py (ask, chat, generate), demo.py,
tools.py (logits, conform, version), models.py (checkpoints), kept.py (prefixes on disk), plan.py,
compare.py and calibrate.py, bench.py, train.py, evaluate.py, doctor.py, serve.py (HTTP),
accounts.py (its keys and usage), screen.py (the terminal).
"""

from overleap.cli import (
    accounts,
    bench,
    calibrate,
    compare,
    demo,
    doctor,
    evaluate,
    kept,
    models,
    plan,
    serve,
    talk,
    tools,
    train,
)
from overleap.cli.app import app, main

__all__ = [
    "accounts",
    "app",
    "bench",
    "calibrate",
    "compare",
    "demo",
    "doctor",
    "evaluate",
    "kept",
    "main",
    "models",
    "plan",
    "serve",
    "talk",
    "tools",
    "train",
]
