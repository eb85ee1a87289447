"""What a model takes on a chip, at a context, for so many users, and what of it fits.

The cache is that of cache/layout.py. Not here: time (predict.py), the machine that runs this
process (engine/budget.py decides there; the tests hold the two together).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.config import ModelConfig
from overleap.plan.chips import Chip
from overleap.plan.weights import Part, Precision, Role, expert_bytes, matrices

CHUNKS = (512, 256, 128, 64)  # tokens of a step, the largest that fits
SNAPSHOTS_BYTES = 256 * 2**20  # of snapshots, for all users
LEAST_SNAPSHOTS = 4
TEXT_BYTES = 48  # of a token: its ids and characters on the way
SPARE_PAGES = 2
SPARE_SLOTS = 1  # a fork beside the texts of all users
RESERVE_BYTES = {"cpu": 2**28, "unified": 2**28, "gpu": 2**30, "npu": 2**30}
MOST_USERS = 1 << 16
_SPLIT = (Part.ATTENTION, Part.SHARED, Part.INDEXER)  # their linears are cut by head or width


@dataclass(frozen=True)
class Load:
    """A model as it is to be run.

    context  tokens of every user's text, its answer included
    chunk    tokens of a step; None: the largest usual one that fits
    reserve  bytes of the process or the driver beside everything; None: by the kind of chip
    """

    config: ModelConfig
    context: int
    users: int = 1
    precision: Precision = Precision.RELEASE
    cache_format: CacheFormat = CacheFormat.RELEASE
    chunk: int | None = None
    reserve: int | None = None


@dataclass(frozen=True)
class Split:
    """How `count` chips share: experts over all of them, attention over groups of `tensor`."""

    count: int
    tensor: int

    @property
    def groups(self) -> int:
        """Groups that each hold other users."""
        return self.count // self.tensor

    def users(self, users: int) -> int:
        """Of the fullest group."""
        return -(-users // self.groups)


@dataclass(frozen=True)
class Weights:
    """Bytes: routed experts; what tensor parallelism cuts; what every chip holds whole."""

    experts: int
    cut: int
    whole: int

    @property
    def total(self) -> int:
        """Of the model."""
        return self.experts + self.cut + self.whole


@dataclass(frozen=True)
class Memory:
    """Of the fullest chip.

    weights   all but the routed experts; experts: its share of them
    cache     pages, windows and tails of its users
    kept      snapshots and text
    scratch   temporaries, whatever the context
    reserve   process or driver
    least_experts  of the experts that must be at hand for one layer
    """

    weights: int
    experts: int
    cache: int
    kept: int
    scratch: int
    reserve: int
    least_experts: int
    chunk: int

    @property
    def beside_experts(self) -> int:
        """All but the routed experts."""
        return self.weights + self.cache + self.kept + self.scratch + self.reserve

    @property
    def total(self) -> int:
        """With all experts."""
        return self.beside_experts + self.experts

    @property
    def least(self) -> int:
        """With all experts elsewhere but those in use."""
        return self.beside_experts + self.least_experts


@cache
def weights_of(config: ModelConfig, precision: Precision) -> Weights:
    """The bytes of the weights by how several chips share them; MTP blocks included."""
    experts = cut = whole = 0
    for each in matrices(config):
        size = each.count * each.nbytes(config, precision)
        if each.part is Part.EXPERTS:
            experts += size
        elif each.part in (Part.EMBEDDING, Part.HEAD) or (
            each.part in _SPLIT and each.role is Role.LINEAR
        ):
            cut += size
        else:
            whole += size
    return Weights(experts, cut, whole)


@cache
def _cache_sizes(config: ModelConfig, form: CacheFormat) -> tuple[int, int, int]:
    """Of a slot, a page and a snapshot."""
    slot = layout.slot_bytes(config, form).total
    return slot, layout.page_bytes(config, form), layout.snapshot_bytes(config, form)


def splits(config: ModelConfig, count: int) -> list[Split]:
    """The ways in which so many chips can share: attention over 1, 2, ... chips that divide the
    output groups (report code: tensor parallel up to o_groups)."""
    return [
        Split(count, tensor)
        for tensor in range(1, count + 1)
        if count % tensor == 0 and config.o_groups % tensor == 0
    ]


def memory(load: Load, chip: Chip, split: Split, chunk: int, least: bool = False) -> Memory:
    """What the fullest chip holds.

    least  fewest snapshots, as when memory is tight
    """
    config, form = load.config, load.cache_format
    found, users = weights_of(config, load.precision), split.users(load.users)
    slots, pages = users + SPARE_SLOTS, users * layout.pages_for(load.context) + SPARE_PAGES
    slot, page, snapshot = _cache_sizes(config, form)
    held = slots * slot + pages * page
    fewest = LEAST_SNAPSHOTS * snapshot
    often = fewest + users * (load.context // layout.SNAPSHOT_TOKENS) * snapshot
    snapshots = fewest if least else max(fewest, min(often, SNAPSHOTS_BYTES))
    reserve = RESERVE_BYTES[chip.kind] if load.reserve is None else load.reserve
    return Memory(
        weights=found.whole + -(-found.cut // split.tensor),
        experts=-(-found.experts // split.count),
        cache=held,
        kept=snapshots + TEXT_BYTES * load.context * users,
        scratch=layout.scratch_bytes(config, chunk, native=chip.kind == "cpu"),
        reserve=reserve,
        least_experts=min(
            -(-found.experts // split.count),
            config.num_experts_per_tok * expert_bytes(config, load.precision),
        ),
        chunk=chunk,
    )


def settle(load: Load, chip: Chip, split: Split) -> Memory:
    """The roomiest of the usual ways to run that fits, or the tightest where none does.

    All experts in memory first, then with some of them elsewhere.
    """
    assert chip.memory_bytes is not None
    tried = list(_tries(load, chip, split))
    for fits in (_whole_fits, _least_fits):
        for found in tried:
            if fits(found, chip.memory_bytes):
                return found
    return tried[-1]


def _tries(load: Load, chip: Chip, split: Split) -> Iterator[Memory]:
    for chunk in CHUNKS if load.chunk is None else (load.chunk,):
        for least in (False, True):
            yield memory(load, chip, split, chunk, least)


def _whole_fits(found: Memory, have: int) -> bool:
    return found.total <= have


def _least_fits(found: Memory, have: int) -> bool:
    return found.least <= have


def largest_context(load: Load, fits: Callable[[Load], bool]) -> int:
    """The most tokens that `fits` allows, in whole pages, of those that the model has."""
    pages = range(1, load.config.max_position_embeddings // layout.PAGE_TOKENS + 1)

    def refused(count: int) -> bool:
        return not fits(_with(load, count * layout.PAGE_TOKENS, load.users))

    return bisect_left(pages, True, key=refused) * layout.PAGE_TOKENS


def most_users(load: Load, fits: Callable[[Load], bool]) -> int:
    """The most users at this context that `fits` allows, up to MOST_USERS or those asked for."""
    most = max(MOST_USERS, load.users)
    return bisect_left(
        range(1, most + 1), True, key=lambda n: not fits(_with(load, load.context, n))
    )


def _with(load: Load, context: int, users: int) -> Load:
    return Load(
        load.config, context, users, load.precision, load.cache_format, load.chunk, load.reserve
    )
