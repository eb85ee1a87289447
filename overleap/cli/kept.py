"""Prefixes on disk: where ask, chat and demo keep what they read, and commands to look after it.

Not here: the store (cache/store.py) or how it is used (cache/disk.py).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from overleap.cli import screen
from overleap.cli.app import CacheDir, Json, app
from overleap.errors import CapacityError
from overleap.machine import size

kept = typer.Typer(no_args_is_help=True, help="Look after what was read and kept on disk.")
app.add_typer(kept, name="cache")

_NO_LIMIT = 2**60  # looking after a store evicts nothing


def default_folder() -> Path:
    """Where prefixes are kept unless --cache-dir says otherwise."""
    import platformdirs

    return platformdirs.user_cache_path("overleap") / "prefix"


@dataclass(frozen=True)
class Keeping:
    """Where what is read is to be kept, and how much: a folder that was asked for, or None."""

    folder: Path | None
    space_bytes: int

    @classmethod
    def of(cls, keep: bool, folder: Path | None, space: str) -> "Keeping | None":
        """From options as they were typed. Raises CapacityError for a bad `space`."""
        from overleap.engine.budget import parse_bytes

        return cls(folder, parse_bytes(space)) if keep else None


def open_disk(context: typer.Context, digest: str, keeping: Keeping) -> Any:
    """The disk tier for one command, closed when that ends; None, and a note why, without one.

    Raises CapacityError for a folder that was asked for and cannot be used.
    """
    from overleap.cache.disk import DiskTier

    if not digest:
        screen.note(
            "nothing is kept on disk, because no manifest names these weights; "
            "`overleap models verify --write-manifest` makes one"
        )
        return None
    try:
        tier = DiskTier(keeping.folder or default_folder(), space_bytes=keeping.space_bytes)
    except CapacityError as error:
        if keeping.folder is not None:
            raise
        screen.note(error.message)
        return None
    return context.with_resource(tier)


def note_trouble(engine: Any) -> None:
    """What could not be kept or was dropped, if anything."""
    disk = engine.stats().disk
    if disk is None:
        return
    if disk.errors:
        screen.note(f"keeping on disk failed {disk.errors} times, the last: {disk.problem}")
    if disk.dropped:
        screen.note(f"{disk.dropped} damaged files were dropped from {disk.folder}")
    if disk.refused:
        screen.note(
            f"not everything was kept: {size(disk.bytes)} of {size(disk.space_bytes)} are in use "
            "(--cache-space), or the disk is nearly full"
        )


@contextmanager
def _store(folder: Path | None) -> Iterator[Any]:
    """The store in a folder, to look after; None where there is no such folder."""
    from overleap.cache.index import ERRORS
    from overleap.cache.store import open_store

    where = folder or default_folder()
    try:
        there = where.exists()
    except OSError as error:
        raise CapacityError(f"{where} cannot be looked at: {error.strerror}") from None
    if not there:
        yield None
        return
    store = open_store(where, _NO_LIMIT)
    try:
        yield store
    except (OSError, *ERRORS) as error:
        raise CapacityError(f"{where} cannot be looked after: {error}") from None
    finally:
        store.close()


@kept.command()
def stats(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Texts, tokens and bytes that are kept on disk.

    Example: `overleap cache stats`
    """
    folder = cache_dir or default_folder()
    with _store(cache_dir) as store:
        found = None if store is None else store.stats()
    facts: dict[str, Any] = {"folder": str(folder), "texts": 0, "tokens": 0, "units": 0, "bytes": 0}
    if found is not None:
        facts |= {key: value for key, value in asdict(found).items() if key in facts}
        facts |= {"folder": str(folder), "disk_free_bytes": shutil.disk_usage(folder).free}
    if as_json:
        screen.put_json(facts)
        return
    rows = [(name, f"{facts[name]:,}") for name in ("texts", "tokens", "units")]
    rows.append(("size", size(facts["bytes"])))
    if found is not None:
        rows.append(("free on disk", size(facts["disk_free_bytes"])))
    screen.put_table(str(folder), ("kept", ""), rows)


@kept.command()
def verify(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Read every byte that is kept and remove what is damaged; status 1 if anything was.

    Example: `overleap cache verify`
    """
    with _store(cache_dir) as store, screen.bar("reading", "B") as bar:
        found = [] if store is None else store.verify(bar)
        there = None if store is None else store.stats()
    units, total = (there.units, there.bytes) if there else (0, 0)
    if as_json:
        screen.put_json({"removed": found, "units": units, "bytes": total})
    else:
        for sentence in found:
            print(f"removed: {sentence}")
        print(f"{units} units, {size(total)}: sound")
    if found:
        raise typer.Exit(1)


@kept.command()
def clear(cache_dir: CacheDir = None) -> None:
    """Remove everything that is kept on disk.

    Example: `overleap cache clear`
    """
    freed = 0
    with _store(cache_dir) as store:
        if store is not None:
            freed = store.stats().bytes
            store.clear()
    print(f"{size(freed)} removed")
