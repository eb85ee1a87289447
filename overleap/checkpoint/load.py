"""From a name to a model: find the folder, check it, map it, put the tensors in place.

Not here: what is read and how it is checked (folder.py, manifest.py), fetching (hub.py).
Read next: model/transformer.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from overleap.checkpoint import manifest as digests
from overleap.checkpoint.files import Progress
from overleap.checkpoint.folder import Checkpoint
from overleap.checkpoint.hub import Preflight, locate
from overleap.checkpoint.placing import SPARE_BYTES, experts_at, is_routed, tensor_bytes
from overleap.checkpoint.table import Damaged, Problem, Role
from overleap.devices import find as find_device
from overleap.errors import CheckpointError, OverleapError
from overleap.kernels import select
from overleap.kernels.mixed import mixed
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize
from overleap.model.transformer import Transformer

_DAMAGE_HINT = (
    "fetch the file again from where it came; if the change was meant, make a new manifest"
)


class Verified(StrEnum):
    """How far a checkpoint was held against its manifest when it was opened."""

    FULL = "every byte matches the manifest"
    REMEMBERED = "matched the manifest earlier, no file has changed its size, time or inode since"
    HEADERS = "sizes and headers match the manifest, tensor data was not read"
    NONE = "unverified: there is no manifest"


@dataclass(frozen=True)
class Report:
    """What `overleap models verify` found. `problems` is empty for a sound checkpoint."""

    folder: Path
    problems: tuple[Problem, ...]
    has_manifest: bool
    files: int
    tensors: int
    bytes: int

    @property
    def ok(self) -> bool:
        """True if nothing is wrong (without a manifest: as far as names and shapes can tell)."""
        return not self.problems


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    wide: bool = False,
    backend: str = "auto",
    verify: bool | None = None,
    progress: Progress | None = None,
    announce: Callable[[Preflight], None] | None = None,
) -> Transformer:
    """A model ready to run, from a checkpoint in the official layout.

    path      a folder, `mini` for the bundled model, or a hub id `org/name`
    device    as devices.find() takes it: `cpu`, `auto`, a kind, `npu:1`, ... Where it has not the
              memory for all weights, the routed experts stay on the CPU and are computed there
    dtype     of plain weights and activations; None: that of the embedding as stored (bf16 in
              releases), so that nothing is converted, or f32 with `wide`. Packed weights stay
              packed; on the CPU what keeps its type is a view of the mapped files
    wide      unpack FP8 and FP4 weights to `dtype`: nothing is rounded, and memory grows
    verify    True reads every byte against the manifest, False sizes and headers only; None reads
              every byte up to 4 GiB, so that larger ones start in seconds (`overleap models verify`
              reads them whole, and is remembered until a file changes size, time or inode)
    progress  called with bytes verified so far and in all
    announce  called with the sizes before anything is fetched from the hub
    Raises ConfigError, CheckpointError (file, tensor, reason), CapacityError, BackendError.
    """
    checkpoint, _ = open_checkpoint(path, verify=verify, progress=progress, announce=announce)
    return build(checkpoint, device=device, dtype=dtype, wide=wide, backend=backend)


def open_checkpoint(
    path: str | Path,
    *,
    verify: bool | None = None,
    progress: Progress | None = None,
    announce: Callable[[Preflight], None] | None = None,
    cache: Path | None = None,
) -> tuple[Checkpoint, Verified]:
    """The checked checkpoint and how far it was verified; arguments as for load().

    cache  folder that remembers full checks of large checkpoints; the user's cache by default
    """
    folder = locate(path, announce)
    manifest = digests.read_manifest(folder)
    if manifest is None:
        if verify:
            raise CheckpointError(
                f"{folder} has no {digests.MANIFEST}, so its bytes cannot be verified",
                "make one while you trust the files, or load without verify",
            )
        return Checkpoint(folder), Verified.NONE
    _raise(digests.check_small(folder, manifest, everything=False))
    checkpoint = Checkpoint(folder)
    large = manifest.tensor_bytes > digests.FULL_CHECK_BYTES
    remembered = large and verify is None and digests.is_remembered(folder, manifest, cache)
    full = not large if verify is None else verify
    _raise(digests.check_tensors(folder, manifest, full, progress))
    if full and large:
        digests.remember(folder, manifest, cache)
    if full:
        return checkpoint, Verified.FULL
    return checkpoint, Verified.REMEMBERED if remembered else Verified.HEADERS


def build(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    wide: bool = False,
    backend: str = "auto",
    spare_bytes: int = SPARE_BYTES,
    memory_bytes: int | None = None,
) -> Transformer:
    """A model from an opened checkpoint; arguments as for load() and placing.experts_at()."""
    if dtype is None:
        dtype = torch.float32 if wide else checkpoint.tensor("embed.weight").dtype
    packed = checkpoint.config.quantization_config is not None and not wide
    where = find_device(str(device), packed)
    sizes = tensor_bytes(checkpoint, dtype, wide)
    experts = experts_at(sizes, where, spare_bytes, memory_bytes)
    ops = select(backend, where.type)
    if experts != where:
        ops = mixed(ops, select("auto", experts.type))
    model = Transformer(checkpoint.config, ops)
    tensors = _placed(checkpoint, dtype, wide)
    model.assign({n: t.to(experts if is_routed(n) else where) for n, t in tensors})
    return model


def verify(
    folder: str | Path, progress: Progress | None = None, cache: Path | None = None
) -> Report:
    """Read every byte of a checkpoint folder and list all that is wrong with it.

    Without a manifest only headers, names, types and shapes can be checked. Raises nothing for a
    damaged checkpoint: the report names file, tensor and reason.
    """
    folder = Path(folder)
    problems: list[Problem] = []
    manifest, checkpoint = None, None
    has_manifest = (folder / digests.MANIFEST).is_file()
    try:
        manifest = digests.read_manifest(folder)
        if manifest is not None:
            problems += digests.check_small(folder, manifest, everything=True)
        if all(problem.file != "config.json" for problem in problems):
            checkpoint = Checkpoint(folder)
    except Damaged as error:
        problems += error.problems
    except OverleapError as error:
        problems.append(Problem("config.json", None, error.message))
    if manifest is not None:
        problems += digests.check_tensors(folder, manifest, True, progress)
        if not problems and manifest.tensor_bytes > digests.FULL_CHECK_BYTES:
            digests.remember(folder, manifest, cache)
    shards = checkpoint.shards.values() if checkpoint else ()
    return Report(
        folder=folder,
        problems=tuple(dict.fromkeys(problems)),
        has_manifest=has_manifest,
        files=len(shards),
        tensors=sum(len(shard.header.tensors) for shard in shards),
        bytes=sum(shard.header.size for shard in shards),
    )


def _raise(problems: list[Problem]) -> None:
    if problems:
        raise Damaged(problems, _DAMAGE_HINT)


def _placed(checkpoint: Checkpoint, dtype: torch.dtype, wide: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the form the model takes it."""
    for name in checkpoint.read_order():
        spec, tensor = checkpoint.table[name], checkpoint.tensor(name)
        scale = name.removesuffix("weight") + "scale"
        if spec.role is Role.SCALE:
            if not wide:
                yield name, tensor
        elif spec.role is Role.IDS:
            _check_experts(checkpoint, name, tensor)
            yield name, tensor.to(torch.int32)
        elif spec.role is Role.SMALL:
            yield name, tensor.to(torch.float32)
        elif scale in checkpoint.table:
            weight = Weight(tensor, checkpoint.tensor(scale))
            yield name, dequantize(weight, dtype) if wide else tensor
        else:
            yield name, tensor.to(dtype)


def _check_experts(checkpoint: Checkpoint, name: str, table: Tensor) -> None:
    low, high = (int(value) for value in table.aminmax())
    count = checkpoint.config.n_routed_experts
    if low < 0 or high >= count:
        reason = f"holds experts {low}..{high}, the model has 0..{count - 1}"
        raise Damaged([Problem(checkpoint.found[name].file, name, reason)])
