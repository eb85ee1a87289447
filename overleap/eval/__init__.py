"""What a model can do and how fast, measured and recorded. Changes nothing. Start at needle.py."""
