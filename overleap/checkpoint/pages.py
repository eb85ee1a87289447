"""Pages of mapped weight files, by hand: read now, let go now; and how a model's weights lie there.

Not here: which to read and which to let go (engine/resident.py). Where the system takes no such
advice (not Linux), reading touches the pages and letting go does nothing.
"""

import ctypes
import errno
import mmap
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from overleap.checkpoint.files import Shard
from overleap.checkpoint.folder import Checkpoint
from overleap.checkpoint.table import Damaged, Problem, Role
from overleap.model.transformer import Transformer
from overleap.plan.mapped import Weights

PAGE = mmap.PAGESIZE
HUGE = 2 * 2**20
_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it
_HUGE_FAULTS = (5, 18)  # from this Linux on, a fault in a huge mapping reads 2 MiB, whatever else
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def _madvise() -> Callable[[int, int, int], int] | None:
    """madvise(address, bytes, advice) of Linux, 0 or an errno; None elsewhere."""
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int

    def advise(address: int, size: int, advice: int) -> int:
        return ctypes.get_errno() if found(address, size, advice) else 0

    return advise


def _whole(start: int, end: int, unit: int) -> tuple[int, int]:
    """Of start..end, what begins and ends at multiples of `unit`; the end first if nothing does."""
    return -(-start // unit) * unit, end // unit * unit


def _reads_huge_pages(release: str | None = None, pages: Path = _HUGE_PAGES) -> bool:
    """Whether this Linux reads a huge page of a file at a time where it is asked to."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release if release is None else release)
    return (
        numbers is not None
        and tuple(map(int, numbers.groups())) >= _HUGE_FAULTS
        and (pages.is_dir())
    )


class Pages:
    """The pages of one mapped file. Any thread may call; a call waits without the interpreter."""

    def __init__(self, shard: Shard) -> None:
        self.path, self._bytes = shard.header.path, shard.bytes
        self._base, self._advise = self._bytes.data_ptr(), _madvise()
        self._huge = self._advise is not None and _reads_huge_pages()
        self._file = os.open(self.path, os.O_RDONLY)
        if self._advise is not None:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        weakref.finalize(self, os.close, self._file)

    @property
    def lets_go(self) -> bool:
        """Whether the system takes advice; else pages stay until it wants them back."""
        return self._advise is not None

    def scatter(self, start: int, end: int, odd: bool = False) -> None:
        """Bytes start..end of the file will be asked for by hand: no reading around a fault.

        odd  of two neighbours one is
        """
        if self._advise is None:
            return
        self._tell(start // PAGE * PAGE, end, mmap.MADV_RANDOM)
        # A fault maps all that the system's cache has around it (Linux 6.18: up to 2 MiB), but
        # stays within memory of one kind. So neighbours, and the page they share, are made of
        # different kinds; whether a core dump has it is one that changes nothing else.
        inner, outer = _whole(start, end, PAGE)
        if outer > inner:
            if self._huge:
                self._tell(inner, outer, mmap.MADV_HUGEPAGE)
            if odd:
                self._tell(inner, outer, mmap.MADV_DONTDUMP)
        for at in {n // PAGE * PAGE for n in (start, end) if n % PAGE}:
            self._tell(at, at + PAGE, mmap.MADV_NOHUGEPAGE)

    def read(self, start: int, end: int, room: bytearray) -> None:
        """Have bytes start..end in memory; returns when they are. Raises CheckpointError.

        room  for bytes on the way; what fits in is asked of the disk at a time
        """
        first, error = start // PAGE * PAGE, 0
        inner, outer = _whole(start, end, HUGE)
        if not self._huge or inner >= outer:
            inner = outer = end
        if self._advise is not None:
            # Whole huge pages come by a fault each: 0.4 ms of a core for 12.75 MiB. All else comes
            # by reading, which costs 8 ms but, unlike a fault or MADV_WILLNEED, goes at the rate of
            # the disk (1.1 GB/s against 0.25); after it the pages are only mapped.
            try:
                self._fill(first, inner, room)
                self._fill(outer, end, room)
            except OSError as failed:
                raise self._unreadable(start, failed.strerror) from None
            error = self._tell(first, end, _POPULATE_READ)
            if error == errno.EFAULT:
                raise self._unreadable(start, "the disk or the file failed")
        if self._advise is None or error:  # a Linux before 5.14
            self._bytes[first:end:PAGE].max()

    def _fill(self, first: int, end: int, room: bytearray) -> None:
        for at in range(first, end, len(room)):
            os.preadv(self._file, [memoryview(room)[: end - at]], at)

    def _unreadable(self, start: int, reason: str | None) -> Damaged:
        return Damaged([Problem(self.path.name, None, f"not readable at byte {start}: {reason}")])

    def unmap(self, start: int, end: int) -> None:
        """Take the memory of start..end off this process; the system's cache may keep it."""
        if self._advise is not None:
            self._tell(start // PAGE * PAGE, end, mmap.MADV_DONTNEED)

    def drop(self, start: int, end: int) -> None:
        """As unmap, and the system's cache gives it back too."""
        if self._advise is not None:
            self.unmap(start, end)
            os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_DONTNEED)

    def _tell(self, first: int, end: int, advice: int) -> int:
        if self._advise is None:
            return 0
        return self._advise(self._base + first, end - first, advice)


@dataclass(frozen=True)
class Extent:
    """Bytes start..end of a mapped file, read and let go together."""

    pages: Pages
    start: int
    end: int

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes, in whole pages."""
        return self.end + -self.end % PAGE - self.start // PAGE * PAGE


@dataclass(frozen=True)
class Placed:
    """How the weights of a built model lie in memory.

    weights  for the budget: what becomes resident as the model runs
    experts  by layer (MTP last) and number: where each routed expert lies in the files, if all do
    """

    weights: Weights
    experts: tuple[tuple[tuple[Extent, ...], ...], ...]


def placed(checkpoint: Checkpoint, model: Transformer) -> Placed:
    """Which weights are views of mapped files, and where the routed experts are among them.

    Rows of the embedding are told to be read one by one from here on, and the mapped bytes of what
    was converted are no longer resident.
    """
    pages = {name: Pages(shard) for name, shard in checkpoint.shards.items()}
    fixed, row = 0, 0
    parts: dict[str, list[Extent]] = {}
    views = dict(_views(checkpoint, model))
    for name in checkpoint.table.keys() - views.keys():  # copied, and not looked at again
        found = checkpoint.found[name]
        pages[found.file].unmap(found.start, found.end)
    for name, tensor in views.items():
        found = checkpoint.found[name]
        extent = Extent(pages[found.file], found.start, found.end)
        owner, inside, rest = name.partition(".ffn.experts.")
        if inside:
            parts.setdefault(f"{owner}.{rest.partition('.')[0]}", []).append(extent)
        elif name == "embed.weight":
            extent.pages.scatter(extent.start, extent.end)
            row = tensor.shape[1] * tensor.itemsize
        else:
            fixed += extent.end - extent.start
    config = checkpoint.config
    owners = [f"layers.{n}" for n in range(config.num_hidden_layers)]
    owners += [f"mtp.{n}" for n in range(config.num_nextn_predict_layers)]
    numbers = range(config.n_routed_experts)
    whole = sum(1 for name, spec in checkpoint.table.items() if _of_expert(name, spec.role))
    if sum(map(len, parts.values())) < whole:  # some were copied, and are resident already
        left = sum(e.end - e.start for extents in parts.values() for e in extents)
        return Placed(Weights(fixed + left, row, config.vocab_size * row), ())
    experts = tuple(tuple(_joined(parts[f"{o}.{n}"]) for n in numbers) for o in owners)
    sizes = [[sum(e.memory for e in extents) for extents in layer] for layer in experts]
    weights = Weights(
        fixed_bytes=fixed,
        row_bytes=row,
        table_bytes=config.vocab_size * row,
        expert_bytes=sum(map(sum, sizes)),
        layer_bytes=max(map(sum, sizes)),
        least_bytes=config.num_experts_per_tok * max(map(max, sizes)),
    )
    return Placed(weights, experts)


def _of_expert(name: str, role: Role) -> bool:
    return ".ffn.experts." in name and role in (Role.EXPERT, Role.SCALE)


def _views(checkpoint: Checkpoint, model: Transformer) -> Iterable[tuple[str, Tensor]]:
    """The parameters that lie in mapped files, by name."""
    bases = {name: shard.bytes.data_ptr() for name, shard in checkpoint.shards.items()}
    for name, parameter in model.named_parameters():
        found = checkpoint.found.get(name)
        if found is None or parameter.device != torch.device("cpu"):
            continue
        if parameter.data_ptr() == bases[found.file] + found.start:
            yield name, parameter


def _joined(extents: list[Extent]) -> tuple[Extent, ...]:
    """Neighbours as one."""
    made: list[Extent] = []
    for extent in sorted(extents, key=lambda e: (str(e.pages.path), e.start)):
        if made and made[-1].pages is extent.pages and made[-1].end == extent.start:
            extent = Extent(extent.pages, made.pop().start, extent.end)
        made.append(extent)
    return tuple(made)
