"""Prefixes: what is found, who holds pages, what goes first, and that no page is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overleap.cache.layout import CacheFormat, snapshot_bytes
from overleap.cache.prefix import Hit, PrefixCache, common_pages, name_pages
from overleap.cache.state import Cache, Sequence
from tests.engine.fake import CONFIG

NOTHING = Hit(None, (), 0)
SNAPSHOT = snapshot_bytes(CONFIG, CacheFormat.WIDE)


def make_cache(pages: int = 40, cache_format: CacheFormat = CacheFormat.WIDE) -> Cache:
    return Cache(CONFIG, pages=pages, slots=4, format=cache_format)


def make_prefix(cache: Cache, snapshots: int = 100) -> PrefixCache:
    return PrefixCache(cache, snapshot_bytes=snapshots * SNAPSHOT)


def read(cache: Cache, tokens: int) -> Sequence:
    """A sequence that stands at `tokens`, as if a model had read them."""
    sequence = cache.open()
    cache.reserve(sequence, tokens)
    sequence.length = tokens
    return sequence


def leave(
    cache: Cache, prefix: PrefixCache, ids: list[int], *stops: int, salt: str = ""
) -> list[int]:
    """Read ids, keep a snapshot at each stop, and close. Returns the pages."""
    sequence = read(cache, len(ids))
    pages = list(sequence.pages)
    for stop in stops:
        sequence.length = stop
        prefix.keep(prefix.chain(ids, salt), pages, cache.snapshot(sequence))
    cache.close(sequence)
    return pages


def text(seed: int, tokens: int) -> list[int]:
    number = random.Random(seed)
    return [number.randrange(2**17) for _ in range(tokens)]


# -- names


def test_names_say_everything_before_them(seed: int) -> None:
    ids = text(seed, 600)
    chain = name_pages(ids, (b"m",))
    assert len(chain) == 4 and len(set(chain)) == 4
    for changed in (0, 127, 128, 300, 511, 512, 599):
        other = list(ids)
        other[changed] += 1
        assert common_pages(chain, name_pages(other, (b"m",))) == min(4, changed // 128)
    assert name_pages(ids, (b"m",), chain=chain[:3]) == chain
    assert name_pages(ids[:127], (b"m",)) == []


@pytest.mark.parametrize(
    "other", [(b"", b"ab"), (b"ab",), (b"ab", b""), (b"b", b"a"), (b"a", b"c")]
)
def test_domains_are_apart(other: tuple[bytes, ...]) -> None:
    assert name_pages([0] * 128, (b"a", b"b")) != name_pages([0] * 128, other)


def test_models_formats_and_salts_do_not_share(seed: int) -> None:
    ids = text(seed, 128)
    wide, release = make_cache(), make_cache(cache_format=CacheFormat.RELEASE)
    chains = [
        PrefixCache(cache, snapshot_bytes=1, model_digest=model).chain(ids, salt)[0]
        for cache in (wide, release)
        for model in ("one", "two")
        for salt in ("", "x")
    ]
    assert len(set(chains)) == 8


# -- finding


def test_lookup_takes_the_deepest_usable_snapshot(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache)
    ids = text(seed, 1000)
    pages = leave(cache, prefix, ids, 256, 768)
    chain = prefix.chain(ids, "")
    for tokens, length, known in (
        (1000, 768, 768),
        (768, 768, 768),
        (767, 256, 640),
        (256, 256, 256),
        (255, 0, 128),
        (0, 0, 0),
    ):
        hit = prefix.lookup(chain, tokens)
        assert (hit.length, hit.known) == (length, known)
        assert list(hit.pages) == pages[: length // 128]
    assert prefix.pages == 6, "pages behind the last snapshot are not held"
    assert cache.pages_free == 34


def test_a_text_that_goes_on_differently_is_found_up_to_there(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache)
    ids = text(seed, 1000)
    leave(cache, prefix, ids, 256, 896)
    other = ids[:700] + text(seed + 1, 300)
    hit = prefix.lookup(prefix.chain(other, ""), len(other) - 1)
    assert (hit.length, hit.known) == (256, 640)
    leave(cache, prefix, other, 640, 896)
    assert prefix.lookup(prefix.chain([*other[:650], 1], ""), 650).length == 640
    assert prefix.pages == 7 + 2, "the pages they share are held once"


def test_salts_keep_customers_apart(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache)
    ids = text(seed, 300)
    leave(cache, prefix, ids, 256, salt="one")
    assert prefix.lookup(prefix.chain(ids, "two"), 299) == NOTHING
    assert prefix.lookup(prefix.chain(ids, "one"), 299).length == 256


# -- letting go


def test_the_oldest_snapshot_goes_when_the_budget_is_full(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache, snapshots=2)
    texts = [text(seed + n, 256) for n in range(3)]
    chains = [prefix.chain(ids, "") for ids in texts]
    leave(cache, prefix, texts[0], 256)
    leave(cache, prefix, texts[1], 256)
    prefix.use(chains[0], prefix.lookup(chains[0], 256))
    leave(cache, prefix, texts[2], 256)
    assert [prefix.lookup(chain, 256).length for chain in chains] == [256, 0, 256]
    assert prefix.snapshot_bytes == 2 * SNAPSHOT and prefix.pages == 4
    assert cache.pages_free == 36


def test_keeping_again_counts_as_use(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache, snapshots=2)
    texts = [text(seed + n, 256) for n in range(3)]
    for number in (0, 1, 0, 2):
        leave(cache, prefix, texts[number], 256)
    lengths = [prefix.lookup(prefix.chain(ids, ""), 256).length for ids in texts]
    assert lengths == [256, 0, 256]


def test_a_long_text_keeps_its_latest_snapshots(seed: int) -> None:
    cache = make_cache()
    prefix = make_prefix(cache, snapshots=2)
    ids = text(seed, 1280)
    leave(cache, prefix, ids, 256, 512, 768, 1024, 1280)
    chain = prefix.chain(ids, "")
    assert [prefix.lookup(chain, n).length for n in (1280, 1279, 1023)] == [1280, 1024, 0]


def test_a_snapshot_beyond_the_budget_is_not_kept(seed: int) -> None:
    cache = make_cache()
    prefix = PrefixCache(cache, snapshot_bytes=SNAPSHOT - 1)
    leave(cache, prefix, text(seed, 128), 128)
    assert prefix.pages == 0 and cache.pages_free == 40 and prefix.snapshot_bytes == 0


def test_reclaim_shortens_chains_from_the_end(seed: int) -> None:
    cache = make_cache(pages=10)
    prefix = make_prefix(cache)
    ids = text(seed, 1280)
    leave(cache, prefix, ids, 512, 1280)
    chain = prefix.chain(ids, "")
    assert cache.pages_free == 0 and prefix.reclaimable(NOTHING) == 10
    prefix.reclaim(3, NOTHING)
    assert cache.pages_free == 6 and prefix.lookup(chain, 1280).length == 512
    spare = prefix.lookup(chain, 1280)
    assert prefix.reclaimable(spare) == 0
    prefix.reclaim(10, spare)
    assert cache.pages_free == 6, "the spared chain stays"
    prefix.reclaim(10, NOTHING)
    assert cache.pages_free == 10 and prefix.pages == 0 and prefix.snapshot_bytes == 0


def test_chains_in_use_go_last(seed: int) -> None:
    cache = make_cache(pages=12)
    prefix = make_prefix(cache)
    used, idle = text(seed, 512), text(seed + 1, 512)
    leave(cache, prefix, used, 512)
    leave(cache, prefix, idle, 512)
    hit = prefix.lookup(prefix.chain(used, ""), 512)
    assert hit.snapshot is not None
    sequence = cache.restore(hit.snapshot, list(hit.pages))
    assert prefix.reclaimable(NOTHING) == 4
    prefix.reclaim(8, NOTHING)
    assert cache.pages_free == 8
    assert prefix.lookup(prefix.chain(used, ""), 512).length == 512
    assert prefix.lookup(prefix.chain(idle, ""), 512).length == 0
    cache.close(sequence)
    prefix.clear()
    assert cache.pages_free == 12


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["leave", "open", "close", "reclaim", "clear"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=6),  # a text, page by page
        st.integers(0, 20),
    ),
    max_size=30,
)


@given(actions=ACTIONS, snapshots=st.integers(1, 6))
def test_pages_are_held_by_those_who_need_them(
    actions: list[tuple[str, list[int], int]], snapshots: int
) -> None:
    """After anything: the count of every page is its holders, and every hit can be restored."""
    cache = make_cache(pages=24)
    prefix = make_prefix(cache, snapshots)
    running: list[Sequence] = []
    for action, blocks, number in actions:
        ids = [block for block in blocks for _ in range(128)]
        chain = prefix.chain(ids, "")
        if action == "leave" and cache.pages_free >= len(blocks) and cache.slots_free:
            leave(cache, prefix, ids, *{128 * (1 + number % len(blocks)), len(ids)})
        elif action == "open" and cache.slots_free:
            hit = prefix.lookup(chain, len(ids))
            assert hit.known >= hit.length and len(hit.pages) * 128 == hit.length
            if hit.snapshot is not None:
                running.append(cache.restore(hit.snapshot, list(hit.pages)))
                prefix.use(chain, hit)
        elif action == "close" and running:
            cache.close(running.pop(number % len(running)))
        elif action == "reclaim":
            spare = prefix.lookup(chain, len(ids))
            possible = cache.pages_free + prefix.reclaimable(spare)
            prefix.reclaim(number, spare)
            assert cache.pages_free >= min(number, possible)
            assert prefix.lookup(chain, len(ids)).length == spare.length
            if number > possible:
                assert cache.pages_free == possible, "the promise is exact"
        elif action == "clear":
            prefix.clear()
        assert prefix.snapshot_bytes <= snapshots * SNAPSHOT
        held = {page for sequence in running for page in sequence.pages}
        in_prefix = 24 - cache.pages_free - len(held)
        assert 0 <= in_prefix <= prefix.pages <= in_prefix + len(held)
    for sequence in running:
        cache.close(sequence)
    assert cache.pages_free == 24 - prefix.pages
    prefix.clear()
    assert cache.pages_free == 24 and prefix.pages == 0 and prefix.snapshot_bytes == 0
