"""What a step must do at least: operations of a reading, bytes of a decode step.

Counts of the model, whoever runs it: what a program does beyond them is its own loss. No time and
no machine here. Read next: cache/layout.py (bytes of an entry), peers/versus.py (who divides).
"""

from overleap.cache.layout import CacheFormat, entry_bytes, key_bytes
from overleap.checkpoint import tensor_table
from overleap.checkpoint.convert import parameters
from overleap.checkpoint.table import FP4, FP8, Role, TensorSpec
from overleap.config import CSA_RATIO, HCA_RATIO, LayerKind, ModelConfig


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Operations of reading `tokens` tokens, a multiply-add counted as two.

    Every weight a token uses (the head for the last token only), queries against keys and
    weights against values of the rows attended, and the scores of the index.
    """
    used = parameters(config, tensor_table(config))["active"]
    head = config.vocab_size * config.hidden_size
    total = 2 * ((used - head) * tokens + head)
    width = config.num_attention_heads * config.head_dim
    window = _capped(tokens, 1, config.sliding_window)
    for kind in config.layer_kinds:
        rows = window
        if kind is LayerKind.CSA:
            rows += _capped(tokens, CSA_RATIO, config.index_topk)
            scored = _capped(tokens, CSA_RATIO, tokens)
            total += 2 * scored * config.index_n_heads * config.index_head_dim
        elif kind is LayerKind.HCA:
            rows += _capped(tokens, HCA_RATIO, tokens)
        total += 4 * rows * width
    return total


def decode_bytes(config: ModelConfig, depth: int, cache_format: CacheFormat) -> int:
    """Bytes that one decode step of one sequence at this depth must read.

    Weights as the checkpoint stores them: all that every token uses, the experts that one token
    chooses, one row of the embedding. Of the cache: the window, every index key, the chosen
    entries, every HCA entry.
    """
    total = 0
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    for name, spec in tensor_table(config).items():
        if name.startswith("mtp."):
            continue
        size = _stored_bytes(spec, config)
        if name == "embed.weight" or spec.role is Role.IDS:
            size //= spec.shape[0]
        elif ".ffn.experts." in name:
            size = size * chosen // experts
        total += size
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, cache_format)
    for kind in config.layer_kinds:
        total += min(depth, config.sliding_window) * entry
        if kind is LayerKind.CSA:
            entries = depth // CSA_RATIO
            total += min(entries, config.index_topk) * entry
            if entries > config.index_topk:  # else all are chosen and none is scored
                total += entries * key_bytes(config.index_head_dim, cache_format)
        elif kind is LayerKind.HCA:
            total += depth // HCA_RATIO * entry
    return total


def _stored_bytes(spec: TensorSpec, config: ModelConfig) -> int:
    """Of a tensor in a checkpoint: plain ones in its type, small ones in float32."""
    count = 1
    for size in spec.shape:
        count *= size
    if spec.role in (Role.SMALL, Role.IDS):
        return 4 * count
    packed = spec.storage in (FP4, FP8) or spec.role is Role.SCALE
    if packed:
        return count
    return (4 if config.torch_dtype == "float32" else 2) * count


def _capped(tokens: int, ratio: int, most: int) -> int:
    """Sum over t = 1 .. tokens of min(t // ratio, most)."""
    whole = tokens // ratio
    if whole <= most:
        return ratio * whole * (whole - 1) // 2 + whole * (tokens - whole * ratio + 1)
    reached = ratio * most  # the first t at which the cap holds
    return ratio * most * (most - 1) // 2 + most * (tokens - reached + 1)
