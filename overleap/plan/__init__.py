"""Bytes, FLOPs, time and money for (model, context, users, chips), before anything is fetched.

No torch: an answer takes less than a second. Read next: answer.py (one plan), memory.py (what
fits), predict.py (times at best), cost.py, compare.py (the published efficiency), calibrate.py
(what records of this machine say), chips.toml (the makers' figures).
"""

from overleap.plan.answer import Machine, Plan, machines, parameters, plan, running
from overleap.plan.chips import Chip, bare, chip, chips, with_memory
from overleap.plan.compare import Assumptions, compare
from overleap.plan.cost import Cost, Money, Prices
from overleap.plan.memory import Load
from overleap.plan.weights import Precision

__all__ = [
    "Assumptions",
    "Chip",
    "Cost",
    "Load",
    "Machine",
    "Money",
    "Plan",
    "Precision",
    "Prices",
    "bare",
    "chip",
    "chips",
    "compare",
    "machines",
    "parameters",
    "plan",
    "running",
    "with_memory",
]
