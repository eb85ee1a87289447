"""A unit's file as bytes: safetensors, with a header that follows to the byte from the unit, the
cache and the model, so that a reader compares it and never parses.

The last tensor, `mac`, is a keyed BLAKE3 of all before it. Page numbers of a pool do not occur.
Not here: files (store.py), what is kept (disk.py).
"""

import hmac
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from blake3 import blake3
from torch import Tensor

from overleap.cache.layout import PAGE_TOKENS
from overleap.cache.state import Cache, Snapshot
from overleap.cache.unit import FORMAT, LENGTH, MAC_BYTES, Unit, Unsound
from overleap.config import CSA_RATIO

_NAMES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Form:
    """The file that a unit must be: its header, every tensor's place, its size in bytes."""

    header: bytes
    places: Mapping[str, Place]
    size: int


def form_of(unit: Unit, cache: Cache, model_digest: str) -> Form:
    """The form of a unit's file; shapes come from the cache, never from a file."""
    shapes = dict(_shapes(unit, cache))
    # Wide types first, so that every tensor starts at a multiple of its item size.
    ordered = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)
    shapes["mac"] = (torch.uint8, (MAC_BYTES,))
    metadata = {
        "cache": str(cache.format),
        "first": str(unit.first),
        "format": FORMAT,
        "last": str(unit.last),
        "model": model_digest,
        "name": unit.name,
        "parent": unit.parent,
        "snapshot": str(int(unit.snapshot)),
    }
    entries: dict[str, object] = {"__metadata__": metadata}
    relative, end = {}, 0
    for name in (*ordered, "mac"):
        dtype, shape = shapes[name]
        start, end = end, end + dtype.itemsize * prod(shape)
        relative[name] = Place(dtype, shape, start, end)
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = LENGTH.pack(len(text)) + text
    base = len(header)
    places = {
        name: Place(place.dtype, place.shape, base + place.start, base + place.end)
        for name, place in relative.items()
    }
    return Form(header, places, base + end)


def _shapes(unit: Unit, cache: Cache) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Every tensor of the unit but the mac."""
    count = unit.last - unit.first
    near = min(unit.last * PAGE_TOKENS, cache.config.sliding_window)
    for number, layer in enumerate(cache.layers):
        for kind, pool in (("entries", layer.entries), ("keys", layer.keys)):
            if pool is not None:
                yield f"{number}.{kind}", (pool.rows.dtype, (count, *pool.rows.shape[1:]))
        if unit.snapshot:
            ring = layer.ring.rows
            yield f"{number}.window", (ring.dtype, (near, *ring.shape[2:]))
            if layer.tail is not None and layer.index_tail is not None:
                for kind, tail in (("tail", layer.tail), ("index_tail", layer.index_tail)):
                    yield f"{number}.{kind}", (tail.dtype, (CSA_RATIO, *tail.shape[2:]))


def pack(
    form: Form, key: bytes, cache: Cache, pages: Sequence[int], snapshot: Snapshot | None
) -> bytearray:
    """The file of a unit: the rows of its pages and, where it has one, its snapshot."""
    data = bytearray(form.size)
    data[: len(form.header)] = form.header
    into = torch.frombuffer(data, dtype=torch.uint8)
    for name, tensor in _values(cache, pages, snapshot):
        place = form.places[name]
        assert tensor.dtype is place.dtype and tensor.shape == place.shape, name
        flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        into[place.start : place.end] = flat
    data[-MAC_BYTES:] = blake3(memoryview(data)[:-MAC_BYTES], key=key).digest()
    return data


def _values(
    cache: Cache, pages: Sequence[int], snapshot: Snapshot | None
) -> Iterator[tuple[str, Tensor]]:
    numbers = torch.tensor(pages, device=cache.device)
    tails = iter(snapshot.tails if snapshot else ())
    for number, layer in enumerate(cache.layers):
        for kind, pool in (("entries", layer.entries), ("keys", layer.keys)):
            if pool is not None:
                yield f"{number}.{kind}", pool.rows[numbers]
        if snapshot is not None:
            yield f"{number}.window", snapshot.windows[number]
            if layer.index_tail is not None:
                main, index = next(tails)
                yield f"{number}.tail", main
                yield f"{number}.index_tail", index


def unpack(data: bytearray, form: Form, key: bytes) -> dict[str, Tensor]:
    """The tensors of a file, as views of `data`. Raises Unsound unless every bit is as written."""
    if len(data) != form.size:
        raise Unsound(f"has {len(data)} bytes, not {form.size}")
    if not data.startswith(form.header):
        raise Unsound("is not the unit of this name, model and cache")
    found = blake3(memoryview(data)[:-MAC_BYTES], key=key).digest()
    if not hmac.compare_digest(found, data[-MAC_BYTES:]):
        raise Unsound("does not have the bytes that were written")
    whole = torch.frombuffer(data, dtype=torch.uint8)
    return {
        name: whole[place.start : place.end].view(place.dtype).view(place.shape)
        for name, place in form.places.items()
    }


def put_pages(cache: Cache, tensors: Mapping[str, Tensor], skip: int, pages: Sequence[int]) -> None:
    """Write a unit's rows, all but those of its first `skip` pages, into these pages."""
    if not pages:
        return
    numbers = torch.tensor(pages, device=cache.device)
    for number, layer in enumerate(cache.layers):
        for kind, pool in (("entries", layer.entries), ("keys", layer.keys)):
            if pool is not None:
                pool.rows[numbers] = tensors[f"{number}.{kind}"][skip:].to(cache.device)


def snapshot_of(cache: Cache, unit: Unit, tensors: Mapping[str, Tensor]) -> Snapshot:
    """The snapshot in a unit's tensors, copied: it must not keep the whole file in memory."""
    windows, tails = [], []
    for number, layer in enumerate(cache.layers):
        windows.append(tensors[f"{number}.window"].clone().to(cache.device))
        if layer.tail is not None and layer.index_tail is not None:
            main, index = (tensors[f"{number}.{kind}"] for kind in ("tail", "index_tail"))
            tails.append((main.clone().to(cache.device), index.clone().to(cache.device)))
    return Snapshot(unit.last * PAGE_TOKENS, tuple(windows), tuple(tails))
