"""A checkpoint folder: one file or an index and shards, held against config.json before use.

Not here: digests (manifest.py), other storage forms (convert.py). Read next: table.py.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from torch import Tensor

from overleap.checkpoint.files import (
    DTYPES,
    NAME_OF_DTYPE,
    Header,
    Progress,
    Shard,
    Writer,
    parse_json,
    read_header,
    staged,
)
from overleap.checkpoint.manifest import write_manifest
from overleap.checkpoint.table import (
    Damaged,
    Found,
    Problem,
    check,
    tensor_table,
)
from overleap.config import ModelConfig
from overleap.errors import CheckpointError

GIB = 2**30
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Kind = tuple[str, tuple[int, ...]]  # safetensors type and shape
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", re.ASCII)


class Checkpoint:
    """An opened folder. Every name, shape and type has been checked; no data has been read.

    Raises ConfigError for config.json and CheckpointError for the files, with the file, the
    tensor and the reason.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ModelConfig.from_checkpoint(folder)
        self.table = tensor_table(self.config)
        headers = read_headers(folder)
        self.shards = {header.path.name: Shard(header) for header in headers}
        self.found = {name: found for h in headers for name, found in h.tensors.items()}
        problems = check(self.table, self.found)
        if problems:
            raise Damaged(problems, _hint_for(problems, self.config))

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored, a view of the mapped file."""
        return self.shards[self.found[name].file].tensor(name)

    def read_order(self) -> Iterator[str]:
        """Names of the model's tensors, file by file in the order of their bytes."""
        for shard in self.shards.values():
            yield from (name for name in shard.header.tensors if name in self.table)


def read_headers(folder: Path) -> list[Header]:
    """Headers of the safetensors files of a folder: the single file, or the index's shards.

    Raises CheckpointError for a missing file, a name that is not a plain file name, or a tensor
    that is not where the index says.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder", "give a checkpoint folder, `mini`, or a hub id org/name"
        )
    if single.is_file() and index.is_file():
        raise Damaged([Problem(INDEX, None, f"stands beside {SINGLE}: which one is meant?")])
    if single.is_file():
        return [read_header(single)]
    if not index.is_file():
        raise Damaged([Problem(folder.name, None, f"has neither {SINGLE} nor {INDEX}")])
    try:
        raw = parse_json(index, index.read_bytes())
    except OSError as error:
        raise Damaged([Problem(INDEX, None, f"cannot be read: {error.strerror}")]) from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise Damaged([Problem(INDEX, None, "has no weight_map")])
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            reason = f"is said to be in {str(name)[:100]!r}, which is no plain *.safetensors name"
            raise Damaged([Problem(INDEX, tensor, reason)])
    return _read_shards(weight_map, folder)


def save(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5 * GIB,
    companions: Iterable[Path] = (),
) -> None:
    """Write a checkpoint in the official layout, with config.json and a digest manifest.

    tensors     official names -> tensors stored as `config` says (packed ones with `.scale`)
    folder      appears complete or not at all; must not exist yet, or be empty
    companions  files to copy beside the weights: tokenizer, model card
    Raises CheckpointError if the tensors are not those of the config, before anything is written.
    """
    announced = {name: _announce(name, tensor) for name, tensor in tensors.items()}
    found = {name: Found("to be saved", *kind, 0, 0) for name, kind in announced.items()}
    problems = check(tensor_table(config), found)
    if problems:
        raise Damaged(problems)
    with staged(Path(folder)) as target:
        for source in companions:
            shutil.copyfile(source, target / source.name)
        write_config(target, config)
        write_tensors(target, announced, tensors.__getitem__, max_shard_bytes)
        write_manifest(target)


def write_config(folder: Path, config: ModelConfig) -> None:
    """config.json of a folder that is being written."""
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def write_tensors(
    folder: Path,
    announced: Mapping[str, Kind],
    produce: Callable[[str], Tensor],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write model.safetensors, or shards and their index; one tensor in memory at a time.

    announced  name -> (safetensors type, shape), in reading order
    produce    called once for every name, in an order of the writer's choice
    """
    parts = _split(announced, max_shard_bytes)
    names = [f"model-{k:05}-of-{len(parts):05}.safetensors" for k in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [SINGLE]
    done, total = 0, sum(map(_bytes, announced.values()))
    for file, part in zip(names, parts, strict=True):
        with Writer(folder / file, part) as writer:
            for name in writer.order:
                writer.put(name, produce(name))
                done += _bytes(part[name])
                if progress:
                    progress(done, total)
    if len(parts) > 1:
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(announced: Mapping[str, Kind], limit: int) -> list[dict[str, Kind]]:
    """Consecutive tensors together until the next would pass the limit."""
    parts: list[dict[str, Kind]] = [{}]
    used = 0
    for name, kind in announced.items():
        if parts[-1] and used + _bytes(kind) > limit:
            parts.append({})
            used = 0
        parts[-1][name] = kind
        used += _bytes(kind)
    return parts


def _bytes(kind: Kind) -> int:
    dtype, shape = kind
    return DTYPES[dtype].itemsize * prod(shape)


def _announce(name: str, tensor: Tensor) -> Kind:
    if tensor.dtype not in NAME_OF_DTYPE:
        raise Damaged([Problem("to be saved", name, f"has the type {tensor.dtype}")])
    return NAME_OF_DTYPE[tensor.dtype], tuple(tensor.shape)


def _read_shards(weight_map: Mapping[str, str], folder: Path) -> list[Header]:
    """Headers of all shards; every tensor is in the shard the index names, and in no other."""
    headers = []
    actual: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            first = next(name for name, where in weight_map.items() if where == file)
            raise Damaged([Problem(file, first, f"the file is missing, {INDEX} names it")])
        headers.append(read_header(folder / file))
        for name in headers[-1].tensors:
            if name in actual:
                raise Damaged([Problem(file, name, f"is also in {actual[name]}")])
            actual[name] = file
    for name in sorted(set(weight_map) | set(actual)):
        said, there = weight_map.get(name), actual.get(name)
        if said is None:
            raise Damaged([Problem(str(there), name, f"is not in {INDEX}")])
        if said != there:
            where = f"it is in {there}" if there else "no file has it"
            raise Damaged([Problem(INDEX, name, f"is said to be in {said}, {where}")])
    return headers


def _hint_for(problems: list[Problem], config: ModelConfig) -> str | None:
    """The usual causes, by what is missing or wrong."""
    names = [problem.tensor or "" for problem in problems]
    if config.num_nextn_predict_layers and all(name.startswith("mtp.") for name in names):
        return (
            "without its MTP tensors the model runs with num_nextn_predict_layers 0 "
            "and the last compress_ratios removed"
        )
    return None
