"""Pages: who holds which, and the tensors they number. One table and one count serve all pools.

Not here: what a sequence owns beside its pages (state.py), which tokens a page holds (prefix.py).
"""

import torch

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.config import LayerKind, ModelConfig
from overleap.errors import CapacityError
from overleap.kernels.spec import Pool, RowFormat


def row_formats(config: ModelConfig, cache_format: CacheFormat) -> tuple[RowFormat, RowFormat]:
    """Formats of main entries (and window rows) and of indexer keys."""
    if cache_format is CacheFormat.WIDE:
        return RowFormat("wide", config.head_dim, 0), RowFormat("wide", config.index_head_dim, 0)
    return (
        RowFormat("kv", config.head_dim, config.qk_rope_head_dim),
        RowFormat("key", config.index_head_dim, 0),
    )


def row_width(row: RowFormat) -> int:
    """Elements of a stored row in its dtype: bytes of a packed row, values of a wide one."""
    if row.kind == "kv":
        return layout.entry_bytes(row.width, row.rope, CacheFormat.RELEASE)
    return row.width if row.kind == "wide" else layout.key_bytes(row.width, CacheFormat.RELEASE)


class PagePool:
    """`pages` pages of 128 tokens over all layers, with a reference count each.

    entries[layer], keys[layer]  Pool of a compressed layer (keys: CSA only), or None
    """

    def __init__(
        self, config: ModelConfig, pages: int, cache_format: CacheFormat, device: torch.device
    ) -> None:
        entry, key = row_formats(config, cache_format)
        self.pages = pages
        self.entries: list[Pool | None] = []
        self.keys: list[Pool | None] = []
        for kind in config.all_kinds:
            per_page = layout.entries_per_page(kind)
            compressed, indexed = kind is not LayerKind.SLIDING, kind is LayerKind.CSA
            self.entries.append(_pool(pages, per_page, entry, device) if compressed else None)
            self.keys.append(_pool(pages, per_page, key, device) if indexed else None)
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each held once. Raises CapacityError and takes none if too few."""
        if count > len(self._free):
            raise CapacityError(
                f"{count} cache pages of {layout.PAGE_TOKENS} tokens are needed, "
                f"{len(self._free)} of {self.pages} are free",
                "wait for other sequences to finish, or start with more memory",
            )
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, page: int) -> None:
        """One more holder of a held page."""
        assert self._holders[page] > 0, f"page {page} is free"
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the page is free when none is left."""
        assert self._holders[page] > 0, f"page {page} is free"
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def copy(self, source: int, target: int) -> None:
        """All layers' rows of one page into another."""
        for pool in (*self.entries, *self.keys):
            if pool is not None:
                pool.rows[target] = pool.rows[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(p.rows.nbytes for p in (*self.entries, *self.keys) if p is not None)


def _pool(pages: int, per_page: int, row: RowFormat, device: torch.device) -> Pool:
    shape = (pages, per_page, row_width(row))
    return Pool(torch.zeros(shape, dtype=row.dtype, device=device), row)
