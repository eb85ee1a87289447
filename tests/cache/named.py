"""Pages and snapshots whose content follows from their name, so that a wrong byte is seen.

Shared by the tests of the disk tier and by the process that they kill. Read next: test_disk.py.
"""

import random
from pathlib import Path

import torch
from torch import Tensor

from overleap.cache.disk import DiskTier
from overleap.cache.layout import CacheFormat
from overleap.cache.packing import form_of
from overleap.cache.prefix import name_pages
from overleap.cache.state import Cache, Snapshot
from overleap.cache.unit import Unit
from tests.engine.fake import CONFIG

MODEL = "00ff" * 16
SPACE = 10**9  # more than any test writes


def make_cache(pages: int = 80, cache_format: CacheFormat = CacheFormat.RELEASE) -> Cache:
    """A cache in which nothing is what any name says."""
    cache = Cache(CONFIG, pages=pages, slots=2, format=cache_format)
    for layer in cache.layers:
        for pool in (layer.ring, layer.entries, layer.keys):
            if pool is not None:
                pool.rows.fill_(99)
    return cache


def chain_of(blocks: list[int], salt: str = "") -> list[bytes]:
    """Names of the pages of a text in which every page repeats one token."""
    ids = [block for block in blocks for _ in range(128)]
    return name_pages(ids, (MODEL.encode(), salt.encode()))


def noise(like: Tensor, *what: object) -> Tensor:
    """Values that `what` decides."""
    generator = torch.Generator().manual_seed(random.Random(repr(what)).getrandbits(63))
    if like.dtype is torch.uint8:
        return torch.randint(256, like.shape, generator=generator, dtype=torch.uint8)
    return torch.randn(like.shape, generator=generator)


def page_of(cache: Cache, page: int, name: bytes) -> list[tuple[Tensor, Tensor]]:
    """Every pool's rows of a page, with what they must be under this name."""
    found = []
    for number, layer in enumerate(cache.layers):
        for kind, pool in (("entries", layer.entries), ("keys", layer.keys)):
            if pool is not None:
                rows = pool.rows[page]
                found.append((rows, noise(rows, name, number, kind)))
    return found


def snapshot_of(cache: Cache, name: bytes, depth: int) -> Snapshot:
    """The snapshot that belongs to a name."""
    sequence = cache.open()
    sequence.length = 128
    like = cache.snapshot(sequence)
    cache.close(sequence)
    windows = [noise(rows, name, number) for number, rows in enumerate(like.windows)]
    tails = [
        (noise(main, name, number, "main"), noise(index, name, number, "index"))
        for number, (main, index) in enumerate(like.tails)
    ]
    return Snapshot(128 * depth, tuple(windows), tuple(tails))


def keep(tier: DiskTier, cache: Cache, chain: list[bytes], depth: int) -> None:
    """Keep the first `depth` pages of a text, as if a model had read them."""
    pages = cache.pool.take(depth)
    for page, name in zip(pages, chain[:depth], strict=True):
        for rows, wanted in page_of(cache, page, name):
            rows.copy_(wanted)
    tier.keep(cache, MODEL, chain, pages, snapshot_of(cache, chain[depth - 1], depth))
    for page in pages:
        cache.pool.release(page)


def fetch(tier: DiskTier, cache: Cache, chain: list[bytes], known: int = 0, beyond: int = 0) -> int:
    """Pages that the disk gives for a text, every byte of them checked."""
    held = cache.pool.take(known)
    for page, name in zip(held, chain[:known], strict=True):
        for rows, wanted in page_of(cache, page, name):
            rows.copy_(wanted)
    free = cache.pages_free
    answer = tier.fetch(cache, MODEL, chain, held, beyond)
    depth = 0
    if answer is not None:
        pages, snapshot = answer
        depth = len(pages)
        assert snapshot.length == 128 * depth > 128 * beyond
        assert pages[:known] == held[:depth]
        for page, name in zip(pages, chain[:depth], strict=True):
            for rows, wanted in page_of(cache, page, name):
                assert torch.equal(rows, wanted), "a page is wrong"
        wanted_snapshot = snapshot_of(cache, chain[depth - 1], depth)
        for rows, wanted in zip(snapshot.windows, wanted_snapshot.windows, strict=True):
            assert torch.equal(rows, wanted), "a window is wrong"
        for pair, wanted_pair in zip(snapshot.tails, wanted_snapshot.tails, strict=True):
            assert all(map(torch.equal, pair, wanted_pair)), "a tail is wrong"
        for page in pages[known:]:
            cache.pool.release(page)
    assert cache.pages_free == free, "pages were lost"
    for page in held:
        cache.pool.release(page)
    return depth


def files(folder: Path) -> list[Path]:
    """The units of a store."""
    return sorted(folder.glob("*.safetensors"))


def blocks(seed: int, count: int) -> list[int]:
    """A text of so many pages."""
    number = random.Random(seed)
    return [number.randrange(10**6) for _ in range(count)]


def unit_bytes(cache: Cache, pages: int, snapshot: bool = True) -> int:
    """Bytes of a unit's file, the first of its text."""
    return form_of(Unit("0" * 64, "", 0, pages, snapshot), cache, MODEL).size


def flip(data: bytearray, number: random.Random, low: int, high: int) -> bytearray:
    """The data with one bit changed."""
    data[number.randrange(low, high)] ^= 1 << number.randrange(8)
    return data
