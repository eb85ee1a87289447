"""V3.2, V4-Flash and V4-Pro beside each other: FLOPs of a token and bytes of a cache by context.

The published figures come out of it to the digit they are given in; the tests hold each. Every
assumption has a name and a switch. Not here: pictures (eval/efficiency.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.config import CSA_RATIO, HCA_RATIO, LayerKind, ModelConfig
from overleap.errors import ConfigError
from overleap.plan.flops import Flops, Previous, Rules, token_flops

MILLION = 10**6  # the report's `1M` fits its FLOP labels as 10^6, not as 2^20
CONTEXTS = (4096, 16384, 65536, 131072, 262144, 524288, MILLION)
GQA_BYTES = 2 * 8 * 128 * 2  # a token and layer of BF16 keys and values, 8 heads of 128
BASELINE = "V3.2"
MODELS = {"V4-Pro": "v4-pro", "V4-Flash": "v4-flash"}


@dataclass(frozen=True)
class Assumptions:
    """What the report leaves open.

    rules    what an operation counts
    bf16     the cache without FP8 and FP4: 2 B a value (V4 1,024 + 256 B, V3.2 1,408 B)
    windows  count the windows of 128 tokens, which do not grow with the context
    """

    rules: Rules = field(default_factory=Rules)
    bf16: bool = False
    windows: bool = True

    def lines(self) -> list[str]:
        """Each in words."""
        rules = self.rules
        kept = (
            "every cached value BF16"
            if self.bf16
            else "cached rotary dims BF16, other dims FP8 with their scales, indexer keys FP4 (V4) "
            "and FP8 (V3.2)"
        )
        return [
            "one token is written at the context, without MTP; a multiply-add is two operations",
            f"in FP8 operations: FP8 linears and FP4 experts count {rules.fp8:g}, BF16 linears "
            f"{rules.bf16:g}, core attention {rules.core:g}, the FP4 indexer {rules.fp4:g}",
            kept,
            f"windows of 128 tokens are {'' if self.windows else 'not '}counted in the cache; "
            "1M is 10^6 tokens",
        ]


@dataclass(frozen=True)
class Row:
    """One model at one context, beside the baseline."""

    model: str
    context: int
    flops: Flops
    counted: float
    parts: dict[str, float]
    cache_bytes: int
    flops_share: float  # of the baseline
    cache_share: float
    gqa_share: float | None  # of a BF16 GQA-8 cache with as many layers; None for the baseline

    def row(self) -> dict[str, Any]:
        """As a program reads it."""
        return {
            "model": self.model,
            "context_tokens": self.context,
            "flops": self.counted,
            "flops_by_part": self.parts,
            "cache_bytes": self.cache_bytes,
            "flops_of_v32": self.flops_share,
            "flops_times_fewer": 1 / self.flops_share,
            "cache_of_v32": self.cache_share,
            "cache_times_smaller": 1 / self.cache_share,
            "cache_of_gqa8": self.gqa_share,
        }


def compare(
    contexts: Sequence[int] = CONTEXTS, assumptions: Assumptions = Assumptions()
) -> list[Row]:
    """A row for every model and context, context by context, the baseline first."""
    return [row for context in contexts for row in _at(context, assumptions)]


def _at(context: int, assumed: Assumptions) -> list[Row]:
    previous, rules = Previous(), assumed.rules
    flops = previous.token_flops(context)
    kept = previous.cache_bytes(context, assumed.bf16)
    first = flops.counted(rules)
    rows = [Row(BASELINE, context, flops, first, flops.parts(rules), kept, 1.0, 1.0, None)]
    for name, preset in MODELS.items():
        config = ModelConfig.preset(preset)
        own = token_flops(config, context)
        counted = own.counted(rules)
        held = cache_bytes(config, context, assumed)
        gqa = GQA_BYTES * config.num_hidden_layers * context
        if not (counted and first and held and kept):
            raise ConfigError(
                f"at {context} tokens there is nothing to compare: {counted:.0f} operations and "
                f"{held} bytes of cache are counted",
                "a longer context, or count windows and every kind of operation",
            )
        rows.append(
            Row(
                name,
                context,
                own,
                counted,
                own.parts(rules),
                held,
                counted / first,
                held / kept,
                held / gqa,
            )
        )
    return rows


def cache_bytes(config: ModelConfig, tokens: int, assumed: Assumptions) -> int:
    """Bytes of what `tokens` tokens leave behind: whole entries, and the windows."""
    kinds, rows = config.layer_kinds, min(tokens, config.sliding_window)
    if not assumed.bf16:
        entry = layout.entry_bytes(config.head_dim, config.qk_rope_head_dim, CacheFormat.RELEASE)
        stored = layout.stored_bytes(config, tokens, CacheFormat.RELEASE)
        return stored - (0 if assumed.windows else len(kinds) * entry * rows)
    entry, key = 2 * config.head_dim, 2 * config.index_head_dim
    return (
        len(kinds) * entry * rows * assumed.windows
        + kinds.count(LayerKind.CSA) * (entry + key) * (tokens // CSA_RATIO)
        + kinds.count(LayerKind.HCA) * entry * (tokens // HCA_RATIO)
    )
