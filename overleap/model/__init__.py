"""The paper, one section per file. Knows tensors, never requests. Start at transformer.py."""
