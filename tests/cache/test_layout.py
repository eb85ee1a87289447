"""Bytes of the cache: the published figures, and that what is allocated is what the formula says.

Not about what the bytes mean (tests/kernels/test_quant.py). Read next: test_state_cache.py.
"""

import random

import pytest

from overleap.cache.layout import (
    PAGE_TOKENS,
    REWIND_TOKENS,
    CacheFormat,
    bytes_per_token,
    cache_bytes,
    entries_per_page,
    entry_bytes,
    key_bytes,
    page_bytes,
    pages_for,
    previous_bytes_per_token,
    ring_rows,
    series_width,
    slot_bytes,
    snapshot_bytes,
    stored_bytes,
    tail_rows,
)
from overleap.cache.state import Cache
from overleap.config import LayerKind, ModelConfig
from tests.checkpoints import tiny_config
from tests.oracles.running import start

RELEASE, WIDE = CacheFormat.RELEASE, CacheFormat.WIDE
FLASH, PRO = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")


def test_rows_of_the_releases() -> None:
    assert entry_bytes(512, 64, RELEASE) == 448 + 2 * 64 + 7 + 1 == 584
    assert key_bytes(128, RELEASE) == 64 + 4 == 68
    assert entry_bytes(512, 64, WIDE) == 2048
    assert key_bytes(128, WIDE) == 512


@pytest.mark.parametrize(
    ("head", "rope", "used"),
    [(40, 16, 24 + 32 + 1), (16, 16, 32), (80, 8, 72 + 16 + 2), (129, 1, 128 + 2 + 2)],
)
def test_entries_of_other_sizes(head: int, rope: int, used: int) -> None:
    """The same rule: plain bytes, two a rotary dim, a scale for 64 begun, up to a multiple of 8."""
    got = entry_bytes(head, rope, RELEASE)
    assert used <= got < used + 8
    assert got % 8 == 0


def test_keys_of_other_sizes() -> None:
    assert [key_bytes(n, RELEASE) for n in (2, 16, 32, 64)] == [2, 9, 17, 34]


def test_published_bytes_per_token() -> None:
    assert page_bytes(FLASH, RELEASE) == 449_824
    assert page_bytes(PRO, RELEASE) == 644_024
    assert bytes_per_token(FLASH, RELEASE) == 3_514.25
    assert bytes_per_token(PRO, RELEASE) == 5_031.4375


def test_published_bytes_of_a_million_tokens() -> None:
    """3.517 and 5.036 GB at 10^6 tokens, 3.688 and 5.280 GB at 2^20; windows included."""
    in_gb = {
        (name, tokens): round(stored_bytes(config, tokens, RELEASE) / 1e9, 3)
        for name, config in (("flash", FLASH), ("pro", PRO))
        for tokens in (10**6, 2**20)
    }
    assert in_gb == {
        ("flash", 10**6): 3.517,
        ("flash", 2**20): 3.688,
        ("pro", 10**6): 5.036,
        ("pro", 2**20): 5.280,
    }
    # DeepSeek-V3.2 keeps 656 B of latent and a 132 B indexer key per token in each of 61 layers.
    previous = 61 * (656 + 132) * 10**6
    assert round(100 * stored_bytes(PRO, 10**6, RELEASE) / previous, 2) == 10.48
    assert round(100 * stored_bytes(FLASH, 10**6, RELEASE) / previous, 2) == 7.32


def test_stored_bytes_counts_whole_entries() -> None:
    """Nothing for a block that is not complete; window rows up to 128 and no further."""
    layers, csa = len(FLASH.layer_kinds), FLASH.layer_kinds.count(LayerKind.CSA)
    hca = FLASH.layer_kinds.count(LayerKind.HCA)
    assert stored_bytes(FLASH, 0, RELEASE) == 0
    assert stored_bytes(FLASH, 3, RELEASE) == 3 * layers * 584
    assert stored_bytes(FLASH, 4, RELEASE) == 4 * layers * 584 + csa * 652
    full = layers * 128 * 584
    assert stored_bytes(FLASH, 127, RELEASE) == full - layers * 584 + csa * 31 * 652
    assert stored_bytes(FLASH, 131, RELEASE) == full + csa * 32 * 652 + hca * 584


def test_pages() -> None:
    assert [pages_for(n) for n in (0, 1, 127, 128, 129, 256)] == [0, 1, 1, 1, 2, 2]
    assert {kind: entries_per_page(kind) for kind in LayerKind} == {
        "sliding": 0,
        "csa": 32,
        "hca": 1,
    }
    assert PAGE_TOKENS == 128


def test_fixed_rows() -> None:
    assert ring_rows(FLASH) == 128 + REWIND_TOKENS
    assert tail_rows(LayerKind.CSA) == 2 * 4 + REWIND_TOKENS
    assert tail_rows(LayerKind.HCA) == 128 + REWIND_TOKENS
    assert series_width(LayerKind.CSA, 512) == 1024
    assert series_width(LayerKind.HCA, 512) == 512


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_allocated_is_what_the_formula_says(cache_format: CacheFormat, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(5):
        config = tiny_config(draw.randrange(10**6))
        pages, slots = draw.randint(1, 5), draw.randint(1, 4)
        cache = Cache(config, pages=pages, slots=slots, format=cache_format)
        pools = [p for layer in cache.layers for p in (layer.entries, layer.keys) if p is not None]
        assert sum(p.rows.nbytes for p in pools) == pages * page_bytes(config, cache_format)
        assert cache.pool.nbytes == pages * page_bytes(config, cache_format)

        slot = slot_bytes(config, cache_format)
        assert sum(layer.ring.rows.nbytes for layer in cache.layers) == slots * slot.windows
        tails = [t for layer in cache.layers for t in (layer.tail, layer.index_tail)]
        assert sum(t.nbytes for t in tails if t is not None) == slots * slot.tails
        assert slot.pages == 0
        assert slot.total == slot.windows + slot.tails
        assert cache.allocated_bytes == cache.pool.nbytes + slots * slot.total

        tokens = draw.randint(1, pages * PAGE_TOKENS)
        sequence = start(cache, tokens)
        assert cache.nbytes(sequence) == cache_bytes(config, tokens, cache_format).total


@pytest.mark.parametrize("cache_format", CacheFormat)
def test_snapshot_bytes(cache_format: CacheFormat, seed: int) -> None:
    config = tiny_config(seed)
    cache = Cache(config, pages=2, slots=1, format=cache_format)
    sequence = start(cache, 256)
    sequence.length = 256
    assert cache.snapshot(sequence).nbytes == snapshot_bytes(config, cache_format)


def test_a_v32_style_cache_takes_788_bytes_a_token_and_layer() -> None:
    v32 = FLASH.with_(num_hidden_layers=61, compress_ratios=(0,) * 62)
    assert previous_bytes_per_token(v32) == 61 * 788 == 48068
    assert previous_bytes_per_token(FLASH) == 43 * 788
