"""FLOPs of one token at a context, by what they are spent on; a multiply-add is two.

V4 from its weights (weights.py) and layer kinds, V3.2 from its published shape. The rules are
named and can be switched: the report gives labels, not its formula. Not here: bytes of a cache
(cache/layout.py), time (predict.py).
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from overleap.config import CSA_RATIO, HCA_RATIO, LayerKind, ModelConfig
from overleap.plan.weights import Part, Role, matrices


@dataclass(frozen=True)
class Rules:
    """What an operation counts, in FP8 operations (report: `equivalent FP8 FLOPs`).

    core  attention over the chosen rows; fp4  the indexer of V4; that of V3.2 is FP8
    """

    fp8: float = 1.0
    bf16: float = 2.0
    core: float = 2.0
    fp4: float = 0.5


RAW = Rules(1, 1, 1, 1)


@dataclass(frozen=True)
class Flops:
    """Operations of a token, uncounted by precision.

    dense    FP8 linears: attention's projections, shared experts, the indexer's queries
    experts  routed experts
    wide     BF16 linears: compressors, head weights of the indexer, routers, stream mixing, head
    core     attention over window rows and entries
    index    scores of compressed entries (V4) or tokens (V3.2)
    """

    dense: float
    experts: float
    wide: float
    core: float
    index: float
    index_is_fp4: bool = True

    def parts(self, rules: Rules = Rules()) -> dict[str, float]:
        """Every component in FP8 operations."""
        return {
            "dense": self.dense * rules.fp8 + self.wide * rules.bf16,
            "experts": self.experts * rules.fp8,
            "core attention": self.core * rules.core,
            "indexer": self.index * (rules.fp4 if self.index_is_fp4 else rules.fp8),
        }

    def counted(self, rules: Rules = Rules()) -> float:
        """The sum, in FP8 operations."""
        return sum(self.parts(rules).values())


@cache
def linears(config: ModelConfig) -> Flops:
    """The part that does not depend on the context; the main model, no MTP."""
    dense = experts = wide = 0
    for each in matrices(config):
        if not each.main or len(each.shape) < 2 or each.part is Part.EMBEDDING:
            continue
        if each.part is Part.EXPERTS:
            experts += 2 * each.used_elements
        elif each.role is Role.LINEAR:
            dense += 2 * each.used_elements
        elif each.shape[0] not in (CSA_RATIO, HCA_RATIO) or each.role is not Role.SMALL:
            wide += 2 * each.used_elements
        # A compressor's position bias is added, not multiplied: elementwise, like the norms.
    # Mixing streams back: weights of 4 x 4 and 2 x 4 a channel, two sub-blocks a layer.
    mixing = 2 * 2 * (config.hc_mult**2 + 2 * config.hc_mult) * config.hidden_size
    return Flops(dense, experts, wide + config.num_hidden_layers * mixing, 0, 0)


def rows_attended(config: ModelConfig, kind: LayerKind, context: float) -> float:
    """Window rows and entries that one query of such a layer attends."""
    window = min(config.sliding_window, context)
    if kind is LayerKind.CSA:
        return window + min(config.index_topk, context / CSA_RATIO)
    return window + (context / HCA_RATIO if kind is LayerKind.HCA else 0)


def token_flops(config: ModelConfig, context: float) -> Flops:
    """One token that attends a context of so many."""
    fixed = linears(config)
    wide = config.num_attention_heads * 2 * config.head_dim  # scores and values, an entry is both
    core = sum(2 * wide * rows_attended(config, kind, context) for kind in config.layer_kinds)
    scan = 2 * config.index_n_heads * config.index_head_dim * context / CSA_RATIO
    index = config.layer_kinds.count(LayerKind.CSA) * scan
    return Flops(fixed.dense, fixed.experts, fixed.wide, core, index)


def read_flops(config: ModelConfig, begin: int, end: int) -> Flops:
    """All tokens begin .. end - 1 of a prompt together.

    A token's cost is linear in its position between the points where a window or a top-k fills,
    so the sum is that of trapezoids.
    """
    breaks = {begin, end, config.sliding_window, CSA_RATIO * config.index_topk}
    points = sorted(point for point in breaks if begin <= point <= end)
    core = index = 0.0
    for low, high in pairwise(points):
        first, last = token_flops(config, low), token_flops(config, high)
        core += (high - low) * (first.core + last.core) / 2
        index += (high - low) * (first.index + last.index) / 2
    fixed, tokens = linears(config), end - begin
    head = 2 * config.vocab_size * config.hidden_size * (tokens - 1)  # only the last one's logits
    return Flops(
        fixed.dense * tokens, fixed.experts * tokens, fixed.wide * tokens - head, core, index
    )


@dataclass(frozen=True)
class Previous:
    """DeepSeek-V3.2, as the baseline: latent attention, an indexer over every token.

    Bytes per token and layer: 512 e4m3 with 4 float32 scales, 64 bf16 rotary dims, and an e4m3
    indexer key with its scale.
    """

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    heads: int = 128
    latent: int = 512
    rope: int = 64
    nope: int = 128
    q_rank: int = 1536
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048
    experts: int = 256
    per_token: int = 8
    inner: int = 2048
    dense_inner: int = 18432
    vocab: int = 129280

    def token_flops(self, context: float) -> Flops:
        """One token at a context. dense: all FP8 linears but those of routed experts."""
        d, q = self.hidden, self.q_rank
        heads = self.heads * (self.nope + self.rope)
        attention = d * q + q * heads + d * (self.latent + self.rope) + self.heads * self.nope * d
        indexer = q * self.index_heads * self.index_dim + d * self.index_dim
        sparse = self.layers - self.dense_layers
        shared = sparse * 3 * d * self.inner + self.dense_layers * 3 * d * self.dense_inner
        dense = 2 * (self.layers * (attention + indexer) + shared)
        experts = 2 * sparse * self.per_token * 3 * d * self.inner
        absorbed = self.latent * self.heads * 2 * self.nope
        wide = 2 * self.layers * (absorbed + d * self.index_heads)
        wide += 2 * (sparse * d * self.experts + d * self.vocab)
        rows = min(self.topk, context)
        core = 2 * self.layers * self.heads * (2 * self.latent + self.rope) * rows
        index = 2 * self.layers * self.index_heads * self.index_dim * context
        return Flops(dense, experts, wide, core, index, index_is_fp4=False)

    def bytes_per_layer(self, bf16: bool = False) -> int:
        """Of cache for a token in one layer: 656 + 132, or 2 B a value."""
        if bf16:
            return 2 * (self.latent + self.rope + self.index_dim)
        latent = self.latent + 4 * (self.latent // 128) + 2 * self.rope
        return latent + self.index_dim + 4 * (self.index_dim // 128)

    def cache_bytes(self, tokens: int, bf16: bool = False) -> int:
        """Of a sequence."""
        return self.layers * self.bytes_per_layer(bf16) * tokens
