"""The GGUF file read back by a reader of its own, and its numbers held against ours."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from overleap.checkpoint import Checkpoint
from overleap.errors import CheckpointError
from overleap.eval.peers.gguf import BF16, F32, I32, MXFP4, Q8_0, write_gguf
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate((E2M1, -E2M1))


def text(file: BinaryIO) -> str:
    [length] = struct.unpack("<Q", file.read(8))
    return file.read(length).decode()


def value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return text(file)
    if kind == 9:
        inner, count = struct.unpack("<IQ", file.read(12))
        return [value(file, inner) for _ in range(count)]
    form, size = {4: ("<I", 4), 5: ("<i", 4), 6: ("<f", 4), 7: ("<?", 1)}[kind]
    return struct.unpack(form, file.read(size))[0]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, np.ndarray]]]:
    """Header values, and name -> (type, values in float32 or int32)."""
    with path.open("rb") as file:
        magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
        assert (magic, version) == (b"GGUF", 3)
        facts = {}
        for _ in range(pairs):
            key = text(file)
            facts[key] = value(file, struct.unpack("<I", file.read(4))[0])
        infos = []
        for _ in range(tensors):
            name = text(file)
            [dims] = struct.unpack("<I", file.read(4))
            shape = struct.unpack(f"<{dims}Q", file.read(8 * dims))[::-1]
            infos.append((name, shape, *struct.unpack("<IQ", file.read(12))))
        file.seek(-(-file.tell() // 32) * 32)
        data = file.read()
    found = {}
    for name, shape, kind, offset in infos:
        assert offset % 32 == 0
        found[name] = kind, decoded(data[offset:], shape, kind)
    return facts, found


def decoded(data: bytes, shape: tuple[int, ...], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    if kind in (F32, I32):
        return np.frombuffer(data, "<f4" if kind == F32 else "<i4", count).reshape(shape)
    if kind == BF16:
        bits = np.frombuffer(data, "<u2", count).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    if kind == Q8_0:
        blocks = np.frombuffer(data, np.uint8, count // 32 * 34).reshape(-1, 34)
        step = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        return (step * blocks[:, 2:].copy().view(np.int8)).reshape(shape)
    assert kind == MXFP4
    blocks = np.frombuffer(data, np.uint8, count // 32 * 17).reshape(-1, 17)
    scale = np.exp2(blocks[:, :1].astype(np.float32) - 127)
    codes = np.concatenate((blocks[:, 1:] & 15, blocks[:, 1:] >> 4), 1)
    return (scale * E2M1[codes]).reshape(shape)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("form", ["bf16", "release", "base"])
def test_values_survive(form: str, exact: bool, seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, form, hc_mult=4, num_nextn_predict_layers=1)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))
    write_gguf(folder, tmp_path / "x.gguf", exact=exact)
    facts, found = read_gguf(tmp_path / "x.gguf")
    assert facts["general.architecture"] == "deepseek4"
    assert facts["deepseek4.block_count"] == config.num_hidden_layers
    assert facts["deepseek4.attention.compress_ratios"] == [
        *config.compress_ratios[: config.num_hidden_layers]
    ]
    assert len(facts["tokenizer.ggml.tokens"]) == config.vocab_size
    yarn = config.rope_scaling is not None
    assert ("deepseek4.rope.scaling.factor" in facts) == yarn
    checkpoint = Checkpoint(folder)

    def ours(name: str) -> np.ndarray:
        tensor, scale = checkpoint.tensor(name), name.removesuffix("weight") + "scale"
        packed = scale in checkpoint.table
        whole = Weight(tensor, checkpoint.tensor(scale) if packed else None)
        return dequantize(whole, torch.float32).numpy()

    last = config.num_hidden_layers - 1
    for number in range(config.n_routed_experts):
        kind, values = found[f"blk.{last}.ffn_down_exps.weight"]
        expert = ours(f"layers.{last}.ffn.experts.{number}.w2.weight")
        if exact or form != "base":
            assert np.array_equal(values[number], expert)
        assert kind == (F32 if exact else {"bf16": BF16, "release": MXFP4, "base": Q8_0}[form])
    for ours_name, theirs in (
        ("layers.0.attn.wq_a.weight", "blk.0.attn_q_a.weight"),
        ("head.weight", "output.weight"),
        ("layers.0.hc_attn_fn", "blk.0.hc_attn_fn.weight"),
        ("layers.0.attn_norm.weight", "blk.0.attn_norm.weight"),
    ):
        kind, values = found[theirs]
        expected = ours(ours_name)
        # A step is 1 / 127 of the largest of 32: half of one off, and the step's own rounding.
        near = 0.0 if exact or kind != Q8_0 else float(np.abs(expected).max()) / 220
        np.testing.assert_allclose(values, expected, rtol=0, atol=near)
    assert not any("mtp" in name or name.startswith(f"blk.{last + 1}.") for name in found)
    kind, table = found["blk.0.ffn_gate_tid2eid.weight"]
    assert kind == I32 and np.array_equal(table, ours_ids(checkpoint))


def ours_ids(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.tensor("layers.0.ffn.gate.tid2eid").to(torch.int32).numpy()


def test_other_numbers_of_streams_are_refused(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, hc_mult=2)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))
    with pytest.raises(CheckpointError, match="hc_mult is 2"):
        write_gguf(folder, tmp_path / "x.gguf")
