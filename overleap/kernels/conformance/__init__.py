"""Does a backend compute what the contract says? Every op of kernels/spec.py, against float64.

    verdicts = conform(kernels.select("torch"), torch.device("cpu"), seed=1)

Not here: printing (the command line does). `refuse_red` is for those who measure, ceilings.py says
what a machine can do at best. Read next: cases.py (what is tried), compare.py (rules).
"""

from overleap.kernels.conformance.ceilings import Ceilings, Rate
from overleap.kernels.conformance.compare import RULES, Rule
from overleap.kernels.conformance.gate import refuse_red
from overleap.kernels.conformance.run import Verdict, conform, op_names

__all__ = [
    "RULES",
    "Ceilings",
    "Rate",
    "Rule",
    "Verdict",
    "conform",
    "op_names",
    "refuse_red",
]
