"""The command `overleap`: each command a few lines that call a room.

The only room that may read the environment. Read next: talk.py (ask, chat, generate), demo.py,
tools.py (logits, conform, version), models.py (checkpoints), kept.py (prefixes on disk), bench.py,
serve.py (HTTP), accounts.py (its keys and usage), screen.py (the terminal).
"""

from overleap.cli import accounts, bench, demo, kept, models, serve, talk, tools
from overleap.cli.app import app, main

__all__ = ["accounts", "app", "bench", "demo", "kept", "main", "models", "serve", "talk", "tools"]
