"""Token ids in, token ids out. Never sees text. Start at request.py, then engine.py."""
