"""A unit of the disk tier: pages of a text that follow each other, and a snapshot at their end.

What one is, and what a file's header claims of it. No torch: the index and the commands that look
after a store need none. Not here: its bytes (packing.py). Read next: store.py.
"""

import json
import struct
from dataclasses import dataclass

FORMAT = "overleap.prefix/1"  # to be raised as well when the meaning of a stored row changes
UNIT_PAGES = 32  # of a unit at most: 18 MB for V4-Flash, what a read or a write takes in memory
KEY_BYTES = MAC_BYTES = 32
MAX_HEADER_BYTES = 2**20
LENGTH = struct.Struct("<Q")  # of the header, before it


class Unsound(Exception):
    """A file that is not, to the last bit, what it must be. It is never used."""


@dataclass(frozen=True)
class Unit:
    """What a file holds.

    name         hex digest of the text up to its end; the file's name
    parent       that of the text up to its start, "" where it starts with the text
    first, last  pages first .. last - 1 of the text
    snapshot     whether a sequence can continue at its end
    """

    name: str
    parent: str
    first: int
    last: int
    snapshot: bool


def header_bytes(start: bytes, size: int) -> int:
    """Bytes of the header after the 8 that say so. Raises Unsound for what cannot be."""
    if len(start) < LENGTH.size:
        raise Unsound(f"has {size} bytes, no room for a header")
    (count,) = LENGTH.unpack(start)
    if not 2 <= count <= min(size - LENGTH.size - MAC_BYTES, MAX_HEADER_BYTES):
        raise Unsound(f"announces a header of {count} bytes in a file of {size}")
    return int(count)


def unit_of(text: bytes) -> Unit:
    """What a header says its file holds, where there is no index to ask. Raises Unsound.

    A claim only: whoever uses the file compares all of the header, and the mac.
    """
    try:
        said = json.loads(text)["__metadata__"]
        if said["format"] != FORMAT:
            raise Unsound(f"is of the format {said['format']!r:.40}")
        unit = Unit(
            said["name"], said["parent"], int(said["first"]), int(said["last"]),
            bool(int(said["snapshot"])),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unsound("has no header of ours") from None
    if not is_sensible(unit):
        raise Unsound("has a header that contradicts itself")
    return unit


def is_sensible(unit: Unit) -> bool:
    """Whether a unit that somebody else wrote down can be one."""
    pages = 0 <= unit.first < unit.last <= unit.first + UNIT_PAGES
    return (
        pages and is_name(unit.name) and (is_name(unit.parent) if unit.first else not unit.parent)
    )


def is_name(text: str) -> bool:
    """Whether a text can be a unit's name: 64 hex digits. Nothing else becomes part of a path."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
