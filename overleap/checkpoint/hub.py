"""Where a checkpoint is: a folder, the bundled model, or the hub, told in numbers before fetching.

Not here: reading the files (folder.py). huggingface_hub does the transfer, keeps its cache, and
honours its own settings (offline mode, token, mirror). Read next: load.py.
"""

import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from overleap.checkpoint.folder import read_headers
from overleap.checkpoint.table import FP4, FP8, Role, TensorSpec, tensor_table
from overleap.config import ModelConfig
from overleap.errors import CapacityError, CheckpointError, OverleapError
from overleap.machine import size

BUNDLED = ("mini", "bundled")
_PACKAGE = Path(__file__).parents[1]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What is fetched: weights, settings, tokenizer, and the texts that a manifest names. Never code,
# pickles or other folders, but for the encoder: it tells which effort table the weights know
# (chat/profiles.py) and is read as text, never run.
_ENCODER = "encoding/encoding_dsv4.py"
_WANTED = ["*.safetensors", "*.json", "tokenizer*", "LICENSE*"]
_WANTED += ["*.md", "*.txt", "*.toml", "*.jinja", "*.model"]
_UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]


@dataclass(frozen=True)
class Preflight:
    """What fetching a checkpoint would take. All sizes in bytes.

    download   of files that are not in the cache yet; the disk needs as much
    total      of all files
    ram        of the weights once loaded on a CPU, as they are stored
    disk_free  where the hub's cache is
    """

    hub_id: str
    revision: str
    files: int
    download: int
    total: int
    ram: int
    disk_free: int
    cache: Path

    def __str__(self) -> str:
        return (
            f"{self.hub_id} at {self.revision[:12]}: {self.files} files, {size(self.total)}; "
            f"{size(self.download)} to download to {self.cache} ({size(self.disk_free)} free); "
            f"the weights take {size(self.ram)} of RAM"
        )


def locate(path: str | Path, announce: Callable[[Preflight], None] | None = None) -> Path:
    """The folder meant by a path, `mini`, or a hub id; fetched if need be.

    announce  called before anything is fetched; writes to stderr by default
    Raises CheckpointError if there is no such thing, CapacityError if the disk is too small.
    """
    if path in BUNDLED:
        folder = _PACKAGE / "bundled" / "mini"
        if not folder.is_dir():
            raise CheckpointError(
                "the bundled model is not part of this installation",
                "the released package carries it",
            )
        return folder
    if path != "" and is_folder(Path(path)):
        return Path(path)
    if isinstance(path, Path) or not _HUB_ID.fullmatch(path):
        raise CheckpointError(
            f"{path} is not a checkpoint folder",
            "give a folder with config.json, `mini` for the bundled model, or a hub id org/name",
        )
    return fetch(path, announce or _tell)


def is_folder(path: Path) -> bool:
    """Whether it is one that may be looked into. Raises CheckpointError where that is not known."""
    try:
        return path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error.strerror}") from None


def fetch(hub_id: str, announce: Callable[[Preflight], None]) -> Path:
    """The folder of a hub checkpoint: from the cache if complete, else downloaded.

    Raises CapacityError before the download if the disk cannot take it.
    """
    cached = _cached(hub_id)
    if cached is not None:
        _complete(hub_id, cached)
        return cached
    needed = preflight(hub_id)
    announce(needed)
    if needed.download > needed.disk_free:
        raise CapacityError(
            f"{hub_id} needs {size(needed.download)} of disk for the download, "
            f"{size(needed.disk_free)} is free in {needed.cache}",
            "free some space, or set HF_HOME to a folder on a larger disk",
        )
    try:
        with suppress(RemoteEntryNotFoundError):  # not every repository has one
            huggingface_hub.hf_hub_download(hub_id, _ENCODER, revision=needed.revision)
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=needed.revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # of the library, and of those that it stands on
        raise _unreachable(hub_id, error) from None


def preflight(hub_id: str) -> Preflight:
    """Sizes of a hub checkpoint. Only config.json, a few kilobytes, is fetched for it.

    Raises ConfigError if it is not a DeepSeek-V4 model, CheckpointError if it cannot be reached.
    """
    try:
        infos = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, dry_run=True
        )
        names = {info.filename for info in infos}
        if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{hub_id} has no config.json with *.safetensors beside it")
        revision = infos[0].commit_hash
        config_file = huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision)
    except OverleapError:
        raise
    except Exception as error:
        raise _unreachable(hub_id, error) from None
    config = ModelConfig.from_checkpoint(Path(config_file).parent)
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE).expanduser()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return Preflight(
        hub_id,
        revision,
        len(infos),
        sum(info.file_size or 0 for info in infos if info.will_download),
        sum(info.file_size or 0 for info in infos),
        resident_bytes(tensor_table(config), 4 if config.torch_dtype == "float32" else 2),
        shutil.disk_usage(existing).free,
        cache,
    )


def resident_bytes(table: dict[str, TensorSpec], plain: int) -> int:
    """Memory that load() needs for the weights.

    plain  bytes of a plain weight (4: float32, 2: bf16); packed ones stay as stored
    """
    total = 0
    for spec in table.values():
        packed = spec.role is Role.SCALE or spec.storage in (FP8, FP4)
        width = 1 if packed else 4 if spec.role in (Role.SMALL, Role.IDS) else plain
        total += prod(spec.shape) * width
    return total


def _cached(hub_id: str) -> Path | None:
    """The cached snapshot, if every file that its index names is there."""
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=True
        )
        read_headers(Path(folder))
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return Path(folder)


def _complete(hub_id: str, snapshot: Path) -> None:
    """Add what other programs left out of a snapshot that they cached, where that can be done.

    No network for what is there, nor where the hub has said before that this commit has none. It
    takes at most two seconds to learn that there is no network: the weights are there without it.
    """
    commit = snapshot.name
    with suppress(Exception):  # of the library, and of those that it stands on: without the rest
        for name in (_ENCODER, "tokenizer.json", "tokenizer_config.json"):
            if huggingface_hub.try_to_load_from_cache(hub_id, name, revision=commit) is None:
                with suppress(RemoteEntryNotFoundError):
                    huggingface_hub.hf_hub_download(hub_id, name, revision=commit, etag_timeout=2)


def _unreachable(hub_id: str, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()
    return CheckpointError(
        f"{hub_id} is not in the cache and cannot be fetched: {reason[0] if reason else error!r}",
        "check the name, the network and HF_HUB_OFFLINE, or give the folder of a local copy",
    )


def _tell(needed: Preflight) -> None:
    print(needed, file=sys.stderr)
