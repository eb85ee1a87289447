"""Bytes of a token, a page, a slot, a snapshot, a step. One formula: allocator and planner.

Not here: tensors (pool.py, state.py). No torch: `overleap plan` must answer in a second.
Read next: pool.py (pages), state.py (what a sequence owns beside its pages).
"""

from dataclasses import dataclass
from enum import StrEnum

from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig

PAGE_TOKENS = 128  # lcm(4, 128): a page ends where both compressors have just emitted
SNAPSHOT_TOKENS = 4096  # while a prompt is read, a snapshot is kept this often
REWIND_TOKENS = 8  # how far a sequence may move back: rings hold this many rows more
KV_GROUP = 64  # e4m3 values that share one ue8m0 scale in a cache entry
KEY_GROUP = 32  # e2m1 values that share one e8m0 scale in an indexer key
TILE_BYTES = 16 * 2**20  # the largest temporary that attention and the indexer may make
NATIVE_BYTES = 4 * 2**20  # of native kernels: panels and tiles of each thread, code


class CacheFormat(StrEnum):
    """How rows are kept: `release` packs FP8/FP4 as the releases do, `wide` is float32."""

    RELEASE = "release"
    WIDE = "wide"


def entry_bytes(head_dim: int, rope_dims: int, cache_format: CacheFormat) -> int:
    """Bytes of one main entry or window row; 584 for 512 dims with 64 rotary (release).

    e4m3 for the plain dims, bf16 for the rotary dims, one scale byte per 64 plain dims,
    padded to a multiple of 8.
    """
    if cache_format is CacheFormat.WIDE:
        return 4 * head_dim
    plain = head_dim - rope_dims
    used = plain + 2 * rope_dims + -(-plain // KV_GROUP)
    return -(-used // 8) * 8


def key_bytes(index_dim: int, cache_format: CacheFormat) -> int:
    """Bytes of one indexer key; 68 for 128 dims (release)."""
    if cache_format is CacheFormat.WIDE:
        return 4 * index_dim
    return -(-index_dim // 2) + -(-index_dim // KEY_GROUP)


def entries_per_page(kind: LayerKind) -> int:
    """Compressed entries of a layer that one page holds: 32 (CSA), 1 (HCA), 0."""
    ratio = RATIO_OF_KIND[kind]
    return PAGE_TOKENS // ratio if ratio else 0


def ring_rows(config: ModelConfig) -> int:
    """Rows of a window ring: the window and the rows a rewind may need again."""
    return config.sliding_window + REWIND_TOKENS


def tail_rows(kind: LayerKind) -> int:
    """Rows of a compressor's tail: the open block (two where blocks overlap) and the rewind."""
    ratio = RATIO_OF_KIND[kind]
    return (2 * ratio if kind is LayerKind.CSA else ratio) + REWIND_TOKENS


def series_width(kind: LayerKind, width: int) -> int:
    """Values a compressor projects per token: CSA has two series (previous, current block)."""
    return 2 * width if kind is LayerKind.CSA else width


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache. `pages` grow with the context, `windows` and `tails` do not."""

    pages: int
    windows: int
    tails: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.pages + self.windows + self.tails


def page_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Bytes of one page over all layers: 449,824 for V4-Flash, 644,024 for V4-Pro (release)."""
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, cache_format)
    key = key_bytes(config.index_head_dim, cache_format)
    total = 0
    for kind in config.layer_kinds:
        total += entries_per_page(kind) * (entry + (key if kind is LayerKind.CSA else 0))
    return total


def slot_bytes(config: ModelConfig, cache_format: CacheFormat) -> CacheBytes:
    """Bytes of the fixed-size state one sequence owns, whatever its length.

    Window rings of all layers (MTP included) and float32 compressor tails (values and gates).
    """
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, cache_format)
    windows = len(config.all_kinds) * ring_rows(config) * entry
    tails = 0
    for kind in config.layer_kinds:
        if kind is LayerKind.SLIDING:
            continue
        widths = [config.head_dim] + ([config.index_head_dim] if kind is LayerKind.CSA else [])
        tails += sum(tail_rows(kind) * 2 * series_width(kind, width) * 4 for width in widths)
    return CacheBytes(0, windows, tails)


def snapshot_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Bytes of a snapshot at a page boundary: the windows and the CSA overlap of one block."""
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, cache_format)
    total = len(config.all_kinds) * config.sliding_window * entry
    for kind in config.layer_kinds:
        if kind is LayerKind.CSA:
            widths = (config.head_dim, config.index_head_dim)
            total += sum(4 * 2 * series_width(kind, width) * 4 for width in widths)
    return total


def bytes_per_token(config: ModelConfig, cache_format: CacheFormat) -> float:
    """Cache growth per token: 3,514.25 B for V4-Flash, 5,031.4 B for V4-Pro (release)."""
    return page_bytes(config, cache_format) / PAGE_TOKENS


def previous_bytes_per_token(config: ModelConfig) -> float:
    """What a V3.2-style cache of the same geometry takes per token: 788 B a layer at 512 + 64.

    A latent of head_dim e4m3 values with a float32 scale per 128, bf16 rotary dims beside it, and
    an e4m3 indexer key with its scale; every token, every layer (section 4.1).
    """
    latent = config.head_dim + 4 * -(-config.head_dim // 128) + 2 * config.qk_rope_head_dim
    key = config.index_head_dim + 4 * -(-config.index_head_dim // 128)
    return float(config.num_hidden_layers * (latent + key))


def stored_bytes(config: ModelConfig, tokens: int, cache_format: CacheFormat) -> int:
    """Bytes of the entries and window rows that `tokens` tokens leave behind (section 4.1).

    The published accounting: whole entries only, no page rounding, main layers' windows.
    """
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, cache_format)
    key = key_bytes(config.index_head_dim, cache_format)
    total = len(config.layer_kinds) * entry * min(tokens, config.sliding_window)
    for kind in config.layer_kinds:
        if kind is LayerKind.CSA:
            total += (entry + key) * (tokens // RATIO_OF_KIND[kind])
        elif kind is LayerKind.HCA:
            total += entry * (tokens // RATIO_OF_KIND[kind])
    return total


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def cache_bytes(config: ModelConfig, tokens: int, cache_format: CacheFormat) -> CacheBytes:
    """Bytes one sequence of `tokens` tokens occupies as allocated: whole pages and its slot."""
    slot = slot_bytes(config, cache_format)
    return CacheBytes(
        pages_for(tokens) * page_bytes(config, cache_format), slot.windows, slot.tails
    )


def scratch_bytes(config: ModelConfig, chunk_tokens: int, native: bool = False) -> int:
    """Temporaries of one step of `chunk_tokens` tokens, whatever the context.

    native  every op is served by the native kernels (_native_scratch_bytes)

    Per token, in float32: the streams while they are mixed (old, rows to mix, new), the queries
    on their way through norm, rotation and the running softmax, the indexer's queries, and the
    chosen experts' inner vectors. Then tiles of fixed size, and the largest packed linear
    while it is decoded.
    """
    if native:
        return _native_scratch_bytes(config, chunk_tokens)
    streams = (3 * config.hc_mult + 2) * config.hidden_size
    queries = 6 * config.num_attention_heads * config.head_dim
    index = 4 * config.index_n_heads * config.index_head_dim
    inner = 4 * (config.num_experts_per_tok + 1) * config.moe_intermediate_size
    each = 4 * chunk_tokens * (streams + queries + index + inner)
    decoded = 0
    if config.quantization_config is not None:
        wide = config.num_attention_heads * config.head_dim
        groups = config.o_groups * config.o_lora_rank
        decoded = 3 * max(wide * config.q_lora_rank, groups * config.hidden_size)
    return each + 4 * decoded + 6 * TILE_BYTES


def _native_scratch_bytes(config: ModelConfig, chunk_tokens: int) -> int:
    """The same of native kernels: what is live at once, in the type of the activations.

    They neither decode a whole linear nor make tiles of more than a core's cache holds, so that is
    the streams (old, new, a layer's input and output) and the larger of two: queries, the
    heads' outputs as they are and rounded, the indexer's queries and the compressors' inputs in
    float32; or the chosen experts' rows, side by side for a matrix unit, and their inner vectors in
    float32, rounded, and side by side. Half as much again lies about in the heap, which is taken
    from the system once: asked for anew, pages cost prefill a third of its speed.
    """
    wide = 4 if config.torch_dtype == "float32" else 2
    experts = config.num_experts_per_tok + config.n_shared_experts
    streams = wide * (2 * config.hc_mult + 3) * config.hidden_size
    attention = (
        wide * 3 * config.num_attention_heads * config.head_dim
        + wide * 2 * config.index_n_heads * config.index_head_dim
        + 4 * 4 * (config.head_dim + config.index_head_dim)
    )
    inner = (4 + 2 * wide) * config.moe_intermediate_size
    mixture = wide * (experts + 2) * config.hidden_size + experts * inner
    return chunk_tokens * (streams + max(attention, mixture)) * 3 // 2 + NATIVE_BYTES
