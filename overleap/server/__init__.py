"""HTTP over the engine, and who may use it how much: keys, tiers, metering, reports.

Never tensors or weights: text and token ids go to the rooms below. Read next: auth.py (who asks),
ledger.py (what may be spent, what was), isolation.py (whose cache), tiers.toml (the table).
"""
