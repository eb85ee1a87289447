"""Bytes of weights, told by the config and the size of the files, are those of the files."""

import random
from math import prod
from pathlib import Path

import pytest

from overleap.checkpoint import Checkpoint, tensor_table
from overleap.checkpoint.files import DTYPES
from overleap.config import ModelConfig
from overleap.plan.mapped import PAGE_BYTES, Weights, mapped_weights
from overleap.plan.weights import expert_bytes
from tests.checkpoints import FORMS, random_tensors, tiny_config, write_checkpoint


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_is_its_tensors(form: str, seed: int) -> None:
    config = tiny_config(seed, form)
    tensors = {n: t for n, t in tensor_table(config).items() if ".0.ffn.experts.1." in n}
    plain = "F32" if form == "f32" else "BF16"
    stored = [plain if plain in spec.storage else spec.storage[0] for spec in tensors.values()]
    sizes = [DTYPES[kind].itemsize for kind in stored]
    found = sum(n * prod(s.shape) for n, s in zip(sizes, tensors.values(), strict=True))
    layers = sum(1 for name in tensors if name.endswith("w1.weight"))
    assert found == layers * expert_bytes(config)


def test_released_experts() -> None:
    assert expert_bytes(ModelConfig.preset("v4-flash")) == 12.75 * 2**20
    flash = ModelConfig.preset("v4-flash-base")
    assert expert_bytes(flash) == 3 * (4096 * 2048 + 32 * 16)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_whole(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form)
    folder = write_checkpoint(tmp_path / "m", config, random_tensors(config, seed))
    header = next(iter(Checkpoint(folder).shards.values())).header
    told = mapped_weights(config, header.size)
    every = len(config.all_kinds) * config.n_routed_experts
    files = told.fixed_bytes + told.table_bytes + every * expert_bytes(config)
    assert files == header.size
    assert told.expert_bytes == every * (expert_bytes(config) + 2 * PAGE_BYTES)
    assert told.expert_bytes == len(config.all_kinds) * told.layer_bytes
    assert (
        told.least_bytes * config.n_routed_experts == told.layer_bytes * config.num_experts_per_tok
    )


def test_rows_of_the_embedding_come_as_they_are_read(seed: int) -> None:
    draw = random.Random(seed)
    row, rows = draw.randrange(1, 20_000), draw.randrange(100, 10_000)
    weights = Weights(fixed_bytes=1000, row_bytes=row, table_bytes=row * rows)
    assert weights.dense_bytes(0) == 1000
    few = weights.dense_bytes(3) - 1000
    assert few == min(row * rows, 3 * 4096 * (-(-row // 4096) + 1)) >= min(3 * row, row * rows)
    assert weights.dense_bytes(10**9) == 1000 + row * rows
