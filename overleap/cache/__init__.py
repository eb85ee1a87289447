"""What a sequence remembers. Empty on purpose: layout.py must import without torch. Start there."""
