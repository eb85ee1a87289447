"""What the running model can carry and what that costs, for the page: predicted and measured.

The prediction is the planner's (plan/answer.py, `running`). Not what it does now (metrics.py).
Read next: admin.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overleap.cache.layout import PAGE_TOKENS, pages_for
from overleap.engine.request import Stats
from overleap.server.costs import CostModel
from overleap.server.tiers import NANOS

MILLION = 10**6


@dataclass(frozen=True)
class Capacity:
    """Of one serving process.

    context_tokens  of a request at most; slots: requests served at once
    plan            what the planner says of this model in this memory; None: it cannot tell
    costs           what a busy second costs whoever runs the machine
    """

    context_tokens: int
    slots: int
    plan: Mapping[str, Any] | None = None
    costs: CostModel | None = None

    def of(self, stats: Stats) -> dict[str, Any]:
        """Bytes, tokens, requests: what the cache as it was made holds, what the memory would."""
        held = stats.pages // pages_for(self.context_tokens)
        found: dict[str, Any] = {
            "context_tokens": self.context_tokens,
            "cache_tokens": stats.pages * PAGE_TOKENS,
            "users_at_full_context": min(self.slots, held),
            "slots": self.slots,
        }
        if self.plan is not None:
            memory = self.plan["memory"]
            found |= {
                "weight_bytes": memory["weights"] + memory["experts"],
                "predicted_bytes": memory["total"],
                "have_bytes": self.plan["have_bytes"],
                "memory_users_at_full_context": self.plan["most_users"],
                "memory_largest_context": self.plan["largest_context"],
            }
        return found

    def cost(self, stats: Stats) -> dict[str, Any] | None:
        """Units of the currency, at the speed of this process so far; None before it has any.

        request  the mean of those served; full_context: a context read whole, by tokens read so
                 far; read and written: a million tokens
        """
        if self.costs is None or not stats.finished:
            return None
        read = stats.prefill_s / stats.read_tokens if stats.read_tokens else None
        written = stats.decode_s / stats.generated_tokens if stats.generated_tokens else None
        return {
            "currency": self.costs.currency,
            "request": self._units((stats.prefill_s + stats.decode_s) / stats.finished),
            "full_context": self._units(None if read is None else read * self.context_tokens),
            "million_read": self._units(None if read is None else read * MILLION),
            "million_written": self._units(None if written is None else written * MILLION),
        }

    def _units(self, seconds: float | None) -> float | None:
        if self.costs is None or seconds is None:
            return None
        return self.costs.of(round(seconds * 10**6)).total / NANOS
