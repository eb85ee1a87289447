"""Bytes of a model's weights in memory: what must stay there, and what may come and go.

Not here: how many weights there are (weights.py), who comes and goes (engine/resident.py).
No torch.
"""

from dataclasses import dataclass

from overleap.config import ModelConfig
from overleap.plan.weights import expert_bytes

PAGE_BYTES = 4096  # of memory; where pages are larger, rows of the embedding take a bit more


@dataclass(frozen=True)
class Weights:
    """Weights that a run makes resident; what is in memory already does not count.

    fixed_bytes   taken whatever is asked for
    row_bytes     a row of the embedding: only those of tokens that occur are read
    table_bytes   all rows of it
    expert_bytes  all routed experts, each in whole pages; 0 where they cannot be let go
    layer_bytes   those of one layer
    least_bytes   the fewest a step can do with: what one token chooses in a layer
    """

    fixed_bytes: int = 0
    row_bytes: int = 0
    table_bytes: int = 0
    expert_bytes: int = 0
    layer_bytes: int = 0
    least_bytes: int = 0

    def dense_bytes(self, tokens: int) -> int:
        """All but the experts, for texts of so many tokens."""
        row = -(-self.row_bytes // PAGE_BYTES) + 1
        return self.fixed_bytes + min(self.table_bytes, tokens * row * PAGE_BYTES)


def mapped_weights(config: ModelConfig, file_bytes: int) -> Weights:
    """As a checkpoint of this config and so many bytes will lie when none of it is converted."""
    one, every = expert_bytes(config), len(config.all_kinds) * config.n_routed_experts
    held = one + 2 * PAGE_BYTES
    row = config.hidden_size * (4 if config.torch_dtype == "float32" else 2)
    table = config.vocab_size * row
    return Weights(
        fixed_bytes=max(0, file_bytes - every * one - table),
        row_bytes=row,
        table_bytes=table,
        expert_bytes=every * held,
        layer_bytes=config.n_routed_experts * held,
        least_bytes=config.num_experts_per_tok * held,
    )
