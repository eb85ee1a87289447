"""What a request used, as the ledger books it and as reports sum it up.

Not the engine's own account of a request (engine/request.py). Read next: ledger.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens by kind, and the machine's time.

    cache_hit_tokens   prompt tokens that were not computed
    cache_miss_tokens  prompt tokens that were
    output_tokens      tokens chosen, those of the reasoning and the stop token too
    machine_s          its share of the time of the steps it took part in
    """

    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    output_tokens: int = 0
    machine_s: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.cache_hit_tokens, self.cache_miss_tokens, self.output_tokens)
        assert min(numbers) >= 0 and self.machine_s >= 0, self

    @property
    def prompt_tokens(self) -> int:
        """Hits and misses."""
        return self.cache_hit_tokens + self.cache_miss_tokens

    @property
    def computed_tokens(self) -> int:
        """What counts against a quota: all but what a cache had."""
        return self.cache_miss_tokens + self.output_tokens

    @property
    def machine_us(self) -> int:
        """The machine's time in whole microseconds."""
        return round(self.machine_s * 10**6)
