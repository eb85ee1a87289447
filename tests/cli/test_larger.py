"""Weights larger than the memory that is given: a run is bounded, not refused."""

import json
import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from overleap.checkpoint import locate, tensor_table, write_manifest
from overleap.checkpoint.files import DTYPES
from overleap.cli.room import Front, Room, open_front
from overleap.config import ModelConfig
from overleap.engine.budget import parse_bytes
from overleap.errors import CapacityError
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

GIB, MIB = 2**30, 2**20


def test_a_released_model_needs_its_dense_part_only(tmp_path: Path) -> None:
    """Known from config.json and the sizes of the files, before torch is imported."""
    config = ModelConfig.preset("v4-flash")
    table = tensor_table(config)
    stored = sum(DTYPES[s.storage[0]].itemsize * prod(s.shape) for s in table.values())
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(stored)  # a hole: nobody reads it
    mini = open_front("mini")
    front = Front(tmp_path, config, mini.tokenizer, mini.profile)
    assert stored > 140 * GIB
    Room.of("release", "12GiB", False).expect(front, 2000)
    with pytest.raises(CapacityError) as caught:
        Room.of("release", "6GiB", False).expect(front, 2000)
    found = re.search(r"([\d.]+) GiB of weights at least\), 6\.0 GiB may", caught.value.message)
    assert found and 5 < float(found[1]) < 11
    assert caught.value.hint == "no context fits beside the weights"
    with pytest.raises(CapacityError, match="may be used"):
        Room.of("wide", "12GiB", False).fit(config, 2000, 20 * GIB)


def test_without_a_limit_a_part_of_what_is_free_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from overleap import machine
    from overleap.plan.mapped import mapped_weights

    config = ModelConfig.preset("v4-flash")
    weights = mapped_weights(config, 150 * GIB)
    monkeypatch.setattr(machine, "free_bytes", lambda: 40 * GIB)
    now = machine.resident_bytes()
    fits = Room.of("release", None, False).fit(config, 2000, weights=weights, native=True)
    assert 0 < fits.expert_bytes < weights.expert_bytes
    assert 35 * GIB < fits.peak_bytes - now <= 36 * GIB + MIB
    assert fits.chunk_tokens == 512
    monkeypatch.setattr(machine, "free_bytes", lambda: 400 * GIB)
    fits = Room.of("release", None, False).fit(config, 2000, weights=weights, native=True)
    assert fits.expert_bytes == weights.expert_bytes
    assert fits.weight_bytes == weights.dense_bytes(2000)


def said(folder: Path, *options: str) -> tuple[Any, str]:
    """What `generate` says in a process of its own: JSON, and its talk."""
    code = "from overleap.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "def main(", "--model", str(folder)]
    fixed = ["--max-tokens", "12", "--seed", "5", "--json"]
    done = subprocess.run(
        [*command, *fixed, *options], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_the_same_text_in_less_memory(seed: int, tmp_path: Path) -> None:
    config = tiny_config(
        seed, "release", vocab_size=4096, hidden_size=256, moe_intermediate_size=512,
        n_routed_experts=64, num_experts_per_tok=2, compress_ratios=(0, 4, 128),
        num_hidden_layers=3, num_hash_layers=1,
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "m", config, random_tensors(config, seed))
    shutil.copy(locate("mini") / "tokenizer.json", folder)
    write_manifest(folder)
    free, talk = said(folder)
    assert free["experts"] is None and "experts" not in talk
    now = re.search(r"predicted peak memory .*?: ([\d.]+ MiB) now, ([\d.]+ MiB) weights", talk)
    assert now, talk
    spare = 6 * MIB + sum(
        parse_bytes(size)
        for size in re.findall(r"([\d.]+ [KM]iB) (?:now|cache|snapshots|scratch)", talk)
    )
    assert parse_bytes(now[2]) > 50 * MIB
    tight, talk = said(folder, "--memory", f"{spare}B")
    assert tight["text"] == free["text"] and tight["usage"]["generated_tokens"] == 12
    experts = tight["experts"]
    assert experts["kept"] + experts["ahead"] + experts["missed"] > 0
    assert 0 < experts["resident_bytes"] <= experts["bound_bytes"] < 20 * MIB
    assert re.search(r"[\d.]+ MiB for [\d.]+ MiB of experts", talk)
    assert re.search(r"experts: \d+% in memory, \d+% read ahead .* waited for", talk)
