"""What a run needs in memory, known before it starts; what does not fit is refused with numbers.

Not here: byte formulas (cache/layout.py), what is free (machine.py).
"""

from dataclasses import dataclass, replace

from overleap import machine
from overleap.cache import layout
from overleap.cache.layout import PAGE_TOKENS, CacheFormat
from overleap.config import ModelConfig
from overleap.errors import CapacityError
from overleap.plan.mapped import Weights

CHUNKS = (512, 256, 128, 64)  # tokens of a step, the largest that fits is taken
SNAPSHOT_BYTES = 256 * 2**20  # that an engine keeps of snapshots at most, if not told otherwise
LEAST_SNAPSHOTS = 4  # ends of prompt and answer, a branch, and one that is being taken
TEXT_BYTES = 48  # of a token: its id in three lists on the way to the engine, its characters twice
NO_WEIGHTS = Weights()
SPARE_PAGES = 2  # for the page a new answer opens while a kept prefix still holds its own


@dataclass(frozen=True)
class Budget:
    """A run that fits.

    pages, slots, chunk_tokens, snapshot_bytes  for the engine
    resident_bytes  the process as it is now, weights read so far included
    cache_bytes     of pages and slots
    kept_bytes      of snapshots, and of the text as characters and ids
    scratch_bytes   of temporaries, whatever the context
    weight_bytes    of weights that are still to be read, the experts left out
    expert_bytes    of routed experts that are in memory at a time
    """

    pages: int
    slots: int
    chunk_tokens: int
    snapshot_bytes: int
    resident_bytes: int
    cache_bytes: int
    kept_bytes: int
    scratch_bytes: int
    weight_bytes: int = 0
    expert_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of resident memory."""
        weights = self.weight_bytes + self.expert_bytes
        beside = self.cache_bytes + self.kept_bytes + self.scratch_bytes
        return self.resident_bytes + weights + beside


def budget(
    config: ModelConfig,
    tokens: int,
    cache_format: CacheFormat,
    *,
    memory_bytes: int | None = None,
    slots: int = 2,
    resident_bytes: int | None = None,
    kept: bool = True,
    native: bool = False,
    weights: Weights = NO_WEIGHTS,
) -> Budget:
    """Room for one text of `tokens` tokens within memory_bytes, or within what is free.

    Where not all routed experts fit, they get what is left; chunks are then the largest that leave
    room for a whole layer of experts, because a chunk reads most of those.

    memory_bytes    for the whole process; None: what it has now and what is free
    resident_bytes  the process as it is now; measured when not given
    kept            an engine will keep ids, and snapshots for later requests (fewer if tight)
    native          as for layout.scratch_bytes
    weights         that are mapped and not resident yet
    Raises CapacityError naming the largest context that fits.
    """
    if cache_format is CacheFormat.WIDE:  # of models whose activations are wide too
        config = replace(config, torch_dtype="float32")
    now = machine.resident_bytes() if resident_bytes is None else resident_bytes
    if memory_bytes is None:
        free = machine.free_bytes()
        memory_bytes = now + free if free is not None else 1 << 62
    fixed = slots * layout.slot_bytes(config, cache_format).total
    page = layout.page_bytes(config, cache_format)
    pages = layout.pages_for(tokens) + SPARE_PAGES
    snapshot = layout.snapshot_bytes(config, cache_format)
    fewest = LEAST_SNAPSHOTS * snapshot * kept
    often = fewest + tokens // layout.SNAPSHOT_TOKENS * snapshot * kept
    text_bytes, dense = TEXT_BYTES * kept, weights.dense_bytes(tokens)
    for experts in _enough(weights):
        for chunk in CHUNKS:
            scratch = layout.scratch_bytes(config, chunk, native)
            for snapshots in (max(fewest, min(often, SNAPSHOT_BYTES)), fewest):
                beside, cache = snapshots + text_bytes * tokens, fixed + pages * page
                found = Budget(
                    pages, slots, chunk, snapshots, now, cache, beside, scratch, dense, experts
                )
                spare = memory_bytes - found.peak_bytes
                if spare >= 0:
                    experts = min(experts + spare, weights.expert_bytes)
                    return replace(found, expert_bytes=experts)
    dense += weights.least_bytes
    least = now + dense + fixed + fewest + layout.scratch_bytes(config, CHUNKS[-1], native)
    page_and_text = page + text_bytes * PAGE_TOKENS
    spare = memory_bytes - least - SPARE_PAGES * page
    whole, rest = divmod(max(0, spare), page_and_text)
    # The last page need not be full: what its text would take may go to a page begun.
    begun = (rest - page) // text_bytes if text_bytes and rest > page else 0
    largest = whole * PAGE_TOKENS + begun
    mapped = f", {machine.size(dense)} of weights at least" if dense else ""
    needed = least + pages * page + text_bytes * tokens
    raise CapacityError(
        f"a context of {tokens} tokens needs {machine.size(needed)} of memory "
        f"({machine.size(pages * page)} of cache{mapped}), "
        f"{machine.size(memory_bytes)} may be used",
        f"a context of {largest} tokens fits" if largest else "no context fits beside the weights",
    )


def _enough(weights: Weights) -> list[int]:
    """Bytes of experts that will do, the best first: all, those of a layer, those of a token."""
    return [weights.expert_bytes, weights.layer_bytes, weights.least_bytes]


def pages_in(config: ModelConfig, memory_bytes: int, slots: int, cache_format: CacheFormat) -> int:
    """Pages that fit into memory_bytes beside the slots. CapacityError when none does."""
    page = layout.page_bytes(config, cache_format)
    fixed = slots * layout.slot_bytes(config, cache_format).total
    if memory_bytes < fixed + page:
        raise CapacityError(
            f"a cache of {slots} slots and one page needs {fixed + page} bytes, "
            f"{memory_bytes} are given",
            "give the cache more memory or fewer slots",
        )
    return (memory_bytes - fixed) // page


def parse_bytes(text: str) -> int:
    """`8GiB`, `512 MiB`, `2e9` or `2GB` as bytes. Raises CapacityError for anything else."""
    number = text.strip().lower()
    scale = 1.0
    for unit, factor in _UNITS.items():
        if number.endswith(unit):
            number, scale = number.removesuffix(unit), factor
            break
    try:
        value = float(number) * scale
    except ValueError:
        value = -1.0
    if not 1 <= value < 1 << 60:
        raise CapacityError(f"{text!r} is no amount of memory", "write it like 8GiB or 512MiB")
    return int(value)


_UNITS = {
    "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
    "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1.0,
}  # fmt: skip
