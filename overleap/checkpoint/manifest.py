"""Digests of a checkpoint folder, since safetensors does not notice a flipped bit.

`overleap.manifest.json` holds the size and BLAKE3 of every file, and the type, shape and BLAKE3 of
every tensor. Not here: whether the tensors make a model (folder.py).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from blake3 import blake3

from overleap.checkpoint.files import (
    Header,
    Progress,
    parse_json,
    read_header,
    write_atomically,
)
from overleap.checkpoint.table import Damaged, Found, Problem
from overleap.errors import CheckpointError

MANIFEST = "overleap.manifest.json"
FORMAT = "overleap.manifest/1"
FULL_CHECK_BYTES = 4 * 2**30  # up to here, loading reads every byte (seconds)
_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class TensorDigest:
    """A tensor as it was when the manifest was made."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class FileDigest:
    """A file as it was. `header` (bytes before the data) and `tensors` are for safetensors."""

    size: int
    digest: str
    header: str | None
    tensors: dict[str, TensorDigest]


@dataclass(frozen=True)
class Manifest:
    """All files of a folder. `digest` is that of the manifest itself."""

    files: dict[str, FileDigest]
    digest: str

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the safetensors files."""
        return sum(file.size for file in self.files.values() if file.header is not None)


def write_manifest(folder: str | Path, progress: Progress | None = None) -> Path:
    """Read every file of the folder and write its manifest, replacing an older one.

    Hidden files and folders within are left out. Raises CheckpointError for a damaged
    safetensors file: a manifest must not vouch for one.
    """
    folder = Path(folder)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not _skipped(path)]
    count = _counter(progress, sum(path.stat().st_size for path in files))
    entries = {path.name: _entry(path, count) for path in files}
    body: dict[str, Any] = {"format": FORMAT, "algorithm": "blake3", "files": entries}
    body["digest"] = _digest_of(body)
    path = folder / MANIFEST
    try:
        write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
    return path


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None. Raises CheckpointError for one that is damaged."""
    path = folder / MANIFEST
    try:
        raw = parse_json(path, path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged([Problem(MANIFEST, None, f"cannot be read: {error.strerror}")]) from None
    hint = "restore it, or check the files by other means and make a new one"
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise Damaged([Problem(MANIFEST, None, f"is not of the format {FORMAT}")], hint)
    digest = raw.pop("digest", None)
    if digest != _digest_of(raw):
        raise Damaged([Problem(MANIFEST, None, "does not match its own digest")], hint)
    try:
        files = {name: _file_digest(entry) for name, entry in raw["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise Damaged([Problem(MANIFEST, None, "has a file entry of another form")]) from None
    if any(Path(name).name != name for name in files):
        raise Damaged([Problem(MANIFEST, None, "names a file outside its folder")])
    return Manifest(files, digest)


def check_small(folder: Path, manifest: Manifest, everything: bool) -> list[Problem]:
    """Hold the files without tensors against the manifest.

    everything  also files that no loading reads, such as the model card
    """
    problems = []
    for name, wanted in manifest.files.items():
        if wanted.header is None and (everything or name.endswith(".json")):
            problems += _same_file(folder / name, wanted, lambda _: None)
    for path in sorted(folder.iterdir()):
        matters = path.suffix in (".json", ".safetensors") and not _skipped(path)
        if matters and path.name not in manifest.files:
            problems.append(Problem(path.name, None, f"is not in {MANIFEST}"))
    return problems


def check_tensors(
    folder: Path, manifest: Manifest, full: bool, progress: Progress | None = None
) -> list[Problem]:
    """Hold the safetensors files against the manifest: sizes and headers; all bytes if `full`."""
    count = _counter(progress, manifest.tensor_bytes)
    problems = []
    for name, wanted in manifest.files.items():
        if wanted.header is not None:
            problems += _same_tensors(folder / name, wanted, full, count)
    return problems


def is_remembered(folder: Path, manifest: Manifest, cache: Path | None = None) -> bool:
    """True if this folder passed a full check and no file has changed its size, time or inode."""
    return _remembered(_state_path(cache)).get(str(folder.resolve())) == _state(folder, manifest)


def remember(folder: Path, manifest: Manifest, cache: Path | None = None) -> None:
    """Note that this folder passed a full check just now."""
    path = _state_path(cache)
    known = _remembered(path)
    known[str(folder.resolve())] = _state(folder, manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known).encode())
    except OSError:
        return  # only a convenience: the next load reads everything again


def _skipped(path: Path) -> bool:
    return path.name == MANIFEST or path.name.startswith(".")


def _digest_of(body: Mapping[str, Any]) -> str:
    """Of the meaning, not of the text: spaces and order do not matter."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest()


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    return count


def _entry(path: Path, count: Callable[[int], None]) -> dict[str, Any]:
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"size": size, "digest": _hash_file(path, count)}
    whole = blake3(max_threads=blake3.AUTO)
    header = read_header(path)
    whole.update(header.raw)
    count(len(header.raw))
    entry: dict[str, Any] = {"size": size, "header": blake3(header.raw).hexdigest()}
    entry["tensors"] = {
        name: {"dtype": found.dtype, "shape": list(found.shape), "digest": digest}
        for name, found, digest in _hash_tensors(path, header.tensors, whole, count)
    }
    entry["digest"] = whole.hexdigest()
    return entry


def _hash_file(path: Path, count: Callable[[int], None]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            count(len(chunk))
    return hasher.hexdigest()


def _hash_tensors(
    path: Path, tensors: Mapping[str, Found], whole: blake3 | None, count: Callable[[int], None]
) -> Iterator[tuple[str, Found, str]]:
    """Digest of every tensor in the order of the bytes; `whole` sees the bytes too."""
    # Reading, not mapping: a disk that fails raises an error here instead of killing the process.
    with path.open("rb", buffering=0) as file:
        for name, found in tensors.items():
            hasher = blake3(max_threads=blake3.AUTO)
            file.seek(found.start)
            left = found.end - found.start
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise Damaged([Problem(path.name, name, "the file ends within it")])
                hasher.update(chunk)
                if whole is not None:
                    whole.update(chunk)
                left -= len(chunk)
                count(len(chunk))
            yield name, found, hasher.hexdigest()


def _file_digest(entry: Mapping[str, Any]) -> FileDigest:
    tensors = {
        name: TensorDigest(tensor["dtype"], tuple(tensor["shape"]), tensor["digest"])
        for name, tensor in entry.get("tensors", {}).items()
    }
    return FileDigest(entry["size"], entry["digest"], entry.get("header"), tensors)


def _same_file(path: Path, wanted: FileDigest, count: Callable[[int], None]) -> list[Problem]:
    try:
        size = path.stat().st_size
        if size != wanted.size:
            reason = f"has {size} bytes, {MANIFEST} says {wanted.size}"
        elif _hash_file(path, count) != wanted.digest:
            reason = f"is not the file that {MANIFEST} describes"
        else:
            return []
    except FileNotFoundError:
        reason = f"is missing, {MANIFEST} names it"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    return [Problem(path.name, None, reason)]


def _same_tensors(
    path: Path, wanted: FileDigest, full: bool, count: Callable[[int], None]
) -> list[Problem]:
    try:
        header = read_header(path)
        problems = list(_same_header(path.name, header, wanted))
        if problems or not full:
            return problems
        count(len(header.raw))
        return [
            Problem(path.name, name, f"its bytes are not those that {MANIFEST} describes")
            for name, _, digest in _hash_tensors(path, header.tensors, None, count)
            if digest != wanted.tensors[name].digest
        ]
    except Damaged as error:
        return list(error.problems)
    except OSError as error:
        return [Problem(path.name, None, f"cannot be read: {error.strerror}")]


def _same_header(file: str, header: Header, wanted: FileDigest) -> Iterator[Problem]:
    for name, tensor in wanted.tensors.items():
        found = header.tensors.get(name)
        if found is None:
            yield Problem(file, name, f"is missing, {MANIFEST} names it")
        elif (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            then, now = (f"{t.dtype} {list(t.shape)}" for t in (tensor, found))
            yield Problem(file, name, f"is {now}, {MANIFEST} says {then}")
    for name in header.tensors.keys() - wanted.tensors.keys():
        yield Problem(file, name, f"is not in {MANIFEST}")
    if header.size != wanted.size or blake3(header.raw).hexdigest() != wanted.header:
        yield Problem(file, None, f"its header is not the one that {MANIFEST} describes")


def _state_path(cache: Path | None) -> Path:
    return (cache or platformdirs.user_cache_path("overleap")) / "verified.json"


def _remembered(path: Path) -> dict[str, Any]:
    try:
        known = parse_json(path, path.read_bytes())
    except (OSError, CheckpointError):
        return {}
    return known if isinstance(known, dict) else {}


def _state(folder: Path, manifest: Manifest) -> list[Any]:
    """What changes when a file is replaced or written to, short of reading it."""
    stats = [(name, (folder / name).stat()) for name in manifest.files if (folder / name).exists()]
    files = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]
    return [manifest.digest, *sorted(files)]
