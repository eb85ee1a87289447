"""One safetensors file: a header held to every rule before a byte of data is used, views, writing.

Not here: which tensors a model needs (table.py), folders of files (folder.py). The safetensors
library accepts damage that this reader refuses, and cannot write a file tensor by tensor.
"""

import json
import mmap
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from overleap.checkpoint.table import Damaged, Found, Problem
from overleap.errors import CheckpointError

Progress = Callable[[int, int], None]  # bytes done, bytes in all

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    raw      the file up to the data: length field and JSON, for digests
    tensors  in the order of their bytes, which fill the rest of the file without a gap
    """

    path: Path
    raw: bytes
    size: int
    tensors: dict[str, Found]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file; no data is read.

    Raises CheckpointError naming the file, the tensor where one is to blame, and the reason.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            if len(length) < 8:
                raise _bad(path, f"has {size} bytes, no room for a header")
            (count,) = struct.unpack("<Q", length)
            if count > min(size - 8, MAX_HEADER_BYTES):
                raise _bad(path, f"announces a header of {count} bytes in a file of {size}")
            text = file.read(count)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from None
    if len(text) < count:
        raise _bad(path, "became shorter while it was read")
    raw = _header_object(path, text)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "has a __metadata__ that is not an object of strings")
    tensors = {name: _found(path, name, entry, 8 + count) for name, entry in raw.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_ranges(path, ordered, 8 + count, size)
    return Header(path, length + text, size, ordered, metadata)


def parse_json(path: Path, text: bytes) -> Any:
    """JSON as files of ours must be: UTF-8, no repeated keys, no NaN. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} occurs twice")
        return keys

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"is not JSON that can be read: {error}") from None


class Shard:
    """A safetensors file mapped into memory; tensors are views, pages are read when touched.

    While views are in use the file must not be written in place: replace it by renaming.
    """

    def __init__(self, header: Header) -> None:
        self.header = header

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored. Writing to it never reaches the file (a private mapping)."""
        found = self.header.tensors[name]
        dtype = DTYPES[found.dtype]
        data = self.bytes[found.start : found.end]
        if found.start % dtype.itemsize:
            data = data.clone()  # other tools may place data unaligned; a view cannot be
        return data.view(dtype).view(found.shape)

    @cached_property
    def bytes(self) -> Tensor:
        """u8 [file size]: the whole file."""
        path, size = self.header.path, self.header.size
        try:
            with path.open("rb") as file:
                # Copy-on-write: a view may be trained in place without harm to the file.
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise _bad(path, f"cannot be mapped into memory: {error}") from None
        return torch.frombuffer(mapped, dtype=torch.uint8)


class Writer:
    """Writes a safetensors file tensor by tensor, so that no more than one need be in memory.

    The tensors are announced first and must then come in `order`. Use it as a context manager.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        # Wide types first, so that every tensor starts at a multiple of its item size.
        self.order = sorted(tensors, key=lambda name: -DTYPES[tensors[name][0]].itemsize)
        self._announced, self._written = dict(tensors), 0
        self._file = path.open("xb")

    def __enter__(self) -> Self:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.order:
            dtype, shape = self._announced[name]
            start, end = end, end + DTYPES[dtype].itemsize * prod(shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(struct.pack("<Q", len(text)) + text)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of `order`."""
        assert name == self.order[self._written], f"{name} is out of order"
        dtype, shape = self._announced[name]
        announced = tensor.dtype is DTYPES[dtype] and tensor.shape == shape
        assert announced, f"{name} is not as announced"
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        self._written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                assert self._written == len(self.order), "tensors were announced, not written"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends without an error.

    Nobody ever sees a folder half written. Raises CheckpointError if something is there already.
    """
    try:
        folder = folder.resolve()
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be looked at: {error.strerror}") from None
    if taken:
        raise CheckpointError(
            f"{folder} exists and is not an empty folder", "name a new folder, or remove this one"
        )
    if os.path.ismount(folder):
        raise CheckpointError(
            f"{folder} is a place where a disk is mounted", "name a new folder inside it"
        )
    # Its own name: processes in two containers may have the same number.
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror or error}",
            "is there room on the disk, and may you write there?",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """A small file, complete or not there at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bad(path: Path, reason: str, tensor: str | None = None) -> CheckpointError:
    hint = "the file is damaged or incomplete: fetch or write it again"
    return Damaged([Problem(path.name, tensor, reason)], hint)


def _header_object(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _bad(path, "has a header that does not start with '{'")
    raw = parse_json(path, text)
    assert isinstance(raw, dict)
    return raw


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _found(path: Path, name: str, entry: object, data: int) -> Found:
    """One header entry, checked in itself; `data` is where the data section begins."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "needs dtype, shape and data_offsets in the header", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"has the type {dtype!r}, known are {', '.join(DTYPES)}", name)
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise _bad(path, f"has the shape {str(shape)[:100]}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _bad(path, f"has the data_offsets {str(offsets)[:100]}", name)
    start, end = offsets
    needed = DTYPES[dtype].itemsize * prod(shape)
    if end - start != needed:
        raise _bad(
            path, f"takes {end - start} bytes, {dtype} of shape {shape} is {needed} bytes", name
        )
    return Found(path.name, dtype, tuple(shape), data + start, data + end)


def _check_ranges(path: Path, tensors: Mapping[str, Found], data: int, size: int) -> None:
    """Tensors in the order of their bytes must fill the file from `data` to its end."""
    position = data
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise _bad(path, f"ends at byte {tensor.end}, the file has {size} bytes", name)
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a gap"
            raise _bad(path, f"{kind}: starts at byte {tensor.start}, not {position}", name)
        position = tensor.end
    if position != size:
        raise _bad(path, f"has {size - position} bytes after the last tensor")
