"""Text in, token ids out; token ids in, events out: the only room that knows text.

Nothing is imported here, so that `overleap.chat.profiles` costs no tokenizer. Not the engine, not
HTTP. Read next: profiles.py (which dialect), dialects.py (prompts), replies.py, tokenizer.py.
"""
