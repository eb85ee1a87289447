"""The definition of every op in plain torch, for any torch device. The contract is ../spec.py."""
