"""Which pages and which snapshot match these tokens, so that a second question reads its tail only.

Not here: who may run (engine/scheduler.py), what a snapshot holds (state.py), what is found again
on disk (disk.py). Read next: engine/engine.py (who asks and who keeps).

A page of 128 tokens is named by a digest of all tokens up to its end, so equal names mean equal
prefixes. The names form a tree. A sequence can continue only where a snapshot was taken; pages
without a snapshot at or below them in the tree are of no use and are not held.
"""

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from overleap.cache import layout
from overleap.cache.disk import DiskTier
from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.state import Cache, Snapshot
from overleap.cache.store import DiskStats

_PAGE = struct.Struct(f"<{PAGE_TOKENS}Q")
Chain = list[bytes]  # the name of every full page of some tokens, in order


def name_pages(
    ids: Ids[int], domain: Ids[bytes], salt: bytes = b"", public: int = 0, chain: Ids[bytes] = ()
) -> Chain:
    """Names of the full pages of `ids`; `chain` holds those already known.

    domain  what must be equal for pages to be: model digest, cache format
    salt    whose pages they are
    public  the first so many pages are everybody's; the salt enters behind them
    """
    names = list(chain)
    for first in range(len(names) * PAGE_TOKENS, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        before = names[-1] if names else _root((*domain, b"", b"public"))
        if len(names) == public:
            before = _root((before, salt) if public else (*domain, salt))
        digest = hashlib.sha256(before)
        digest.update(_PAGE.pack(*ids[first : first + PAGE_TOKENS]))
        names.append(digest.digest())
    return names


def _root(domain: Ids[bytes]) -> bytes:
    """The name before the first page. Lengths keep ("ab", "c") and ("a", "bc") apart."""
    digest = hashlib.sha256(b"overleap prefix 1")
    for part in domain:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def common_pages(one: Chain, other: Chain) -> int:
    """How many pages two chains share: names are cumulative, so a bisection finds it."""
    shorter = min(len(one), len(other))
    return bisect_left(range(shorter), True, key=lambda page: one[page] != other[page])


@dataclass(eq=False)
class _Node:
    """A page in the tree. `children` counts the pages that follow it."""

    name: bytes
    parent: "_Node | None"
    page: int
    children: int = 0
    snapshot: Snapshot | None = None


@dataclass(frozen=True)
class Hit:
    """What a lookup found.

    snapshot  where to continue, or None for nothing found
    pages     the pages before it, in order
    known     tokens that match although nothing can be continued there: another request went
              on differently after them, so a snapshot is worth taking
    """

    snapshot: Snapshot | None
    pages: tuple[int, ...]
    known: int

    @property
    def length(self) -> int:
        """Tokens that need not be computed again."""
        return self.snapshot.length if self.snapshot else 0


class PrefixCache:
    """Prefixes that sequences left behind. It holds references on their pages.

    snapshot_bytes  budget of the snapshots, outside the page pool; 0 keeps nothing
    model_digest    names the weights and what computes: pages of others never match
    disk            where all that is kept goes as well, and is found when memory has it no more

    Held pages need no budget of their own: they stand in for free ones until `reclaim` is
    asked for them. Snapshots and chains go in order of last use.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        snapshot_bytes: int,
        model_digest: str = "",
        disk: DiskTier | None = None,
    ) -> None:
        self._cache = cache
        fits = layout.snapshot_bytes(cache.config, cache.format) <= snapshot_bytes
        self._disk = disk if fits else None
        self._model_digest = model_digest
        self._nodes: dict[bytes, _Node] = {}
        self._kept: dict[bytes, _Node] = {}  # those with a snapshot, least recently used first
        self._budget = snapshot_bytes
        self.snapshot_bytes = 0

    @property
    def pages(self) -> int:
        """Pages it holds, some of them together with running sequences."""
        return len(self._nodes)

    @property
    def enabled(self) -> bool:
        """False where nothing is ever kept."""
        return self._budget > 0

    def chain(
        self, ids: Ids[int], salt: str, public_tokens: int = 0, known: Ids[bytes] = ()
    ) -> Chain:
        """Names of the full pages of `ids`, for this model, cache format and salt.

        public_tokens  full pages within the first so many are everybody's, whatever the salt
        """
        domain = (self._model_digest.encode(), self._cache.format.encode())
        return name_pages(ids, domain, salt.encode(), public_tokens // PAGE_TOKENS, known)

    def lookup(self, chain: Chain, tokens: int) -> Hit:
        """The deepest place to continue at, within the first `tokens` tokens."""
        path = self._path(chain, tokens)
        known = len(path) * PAGE_TOKENS
        while path and path[-1].snapshot is None:
            path.pop()
        if not path:
            return Hit(None, (), known)
        return Hit(path[-1].snapshot, tuple(node.page for node in path), known)

    def fetch(self, chain: Chain, tokens: int, hit: Hit) -> Hit:
        """A deeper place to continue at that the disk has, brought into free pages; else `hit`."""
        if self._disk is None:
            return hit
        known = [node.page for node in self._path(chain, tokens)]
        names = chain[: tokens // PAGE_TOKENS]
        found = self._disk.fetch(self._cache, self._model_digest, names, known, len(hit.pages))
        if found is None:
            return hit
        pages, snapshot = found
        self._hold(chain, pages, snapshot)
        for page in pages[len(known) :]:
            self._cache.pool.release(page)
        return Hit(snapshot, tuple(pages), max(hit.known, snapshot.length))

    def use(self, chain: Chain, hit: Hit) -> None:
        """The hit serves a request: it becomes the most recently used."""
        if hit.snapshot is not None:
            name = chain[len(hit.pages) - 1]
            self._kept[name] = self._kept.pop(name)
            if self._disk is not None:
                self._disk.touch(chain[: len(hit.pages)])

    def keep(self, chain: Chain, pages: Ids[int], snapshot: Snapshot) -> None:
        """Remember a snapshot and hold the pages before it; the sequence keeps its own holds."""
        if snapshot.nbytes > self._budget:
            return
        self._hold(chain, pages, snapshot)
        if self._disk is not None:
            self._disk.keep(self._cache, self._model_digest, chain, pages, snapshot)

    def disk_stats(self) -> DiskStats | None:
        """What is on disk; None without one."""
        return None if self._disk is None else self._disk.stats()

    def _path(self, chain: Chain, tokens: int) -> list[_Node]:
        """The pages that are held of the first `tokens` tokens."""
        path: list[_Node] = []
        for name in chain[: tokens // PAGE_TOKENS]:
            if name not in self._nodes:
                break
            path.append(self._nodes[name])
        return path

    def _hold(self, chain: Chain, pages: Ids[int], snapshot: Snapshot) -> None:
        depth = snapshot.length // PAGE_TOKENS
        assert 0 < depth <= min(len(chain), len(pages)), (depth, len(chain), len(pages))
        parent: _Node | None = None
        for name, page in zip(chain[:depth], pages[:depth], strict=True):
            node = self._nodes.get(name)
            if node is None:
                self._cache.pool.share(page)
                node = self._nodes[name] = _Node(name, parent, page)
                if parent is not None:
                    parent.children += 1
            parent = node
        assert parent is not None
        if parent.snapshot is None:
            parent.snapshot = snapshot
            self.snapshot_bytes += snapshot.nbytes
        self._kept.pop(parent.name, None)
        self._kept[parent.name] = parent
        while self.snapshot_bytes > self._budget:
            self._drop(next(iter(self._kept.values())))

    def reclaimable(self, spare: Hit) -> int:
        """Pages that `reclaim` could free without touching those of `spare`."""
        pool = self._cache.pool
        alone = sum(pool.holders(node.page) == 1 for node in self._nodes.values())
        return alone - sum(pool.holders(page) == 1 for page in spare.pages)

    def reclaim(self, free: int, spare: Hit) -> None:
        """Let go of chains, from their ends, until the pool has `free` free pages."""
        pool = self._cache.pool
        while pool.free < free:
            leaves = [
                node
                for node in self._kept.values()
                if not node.children and node.snapshot is not spare.snapshot
            ]
            if not leaves:
                return
            # min() takes the first of equals: the least recently used. Chains that a running
            # sequence holds as well free little, so they go last.
            self._drop(min(leaves, key=lambda node: pool.holders(node.page) > 1))

    def clear(self) -> None:
        """Let go of everything."""
        while self._kept:
            self._drop(next(iter(self._kept.values())))

    def _drop(self, node: _Node) -> None:
        """Forget a snapshot, and the pages that only it needed."""
        assert node.snapshot is not None
        self.snapshot_bytes -= node.snapshot.nbytes
        node.snapshot = None
        del self._kept[node.name]
        end: _Node | None = node
        while end is not None and not end.children and end.snapshot is None:
            del self._nodes[end.name]
            self._cache.pool.release(end.page)
            end = end.parent
            if end is not None:
                end.children -= 1
