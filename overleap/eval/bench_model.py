"""The model that speed is compared on: 122M weights of every kind, drawn from a seed.

Too small to know anything, large enough that its weights do not fit a core's caches. The same
values in two storage forms, so that other programs can be given them too (peers/).
Not for training (train/recipes.py). Read next: random_model.py (in memory), checkpoint/convert.py.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from overleap.checkpoint import convert, save, tensor_table
from overleap.checkpoint.convert import Form
from overleap.checkpoint.manifest import read_manifest
from overleap.checkpoint.table import Role
from overleap.config import ModelConfig

BENCH_MODELS: dict[str, Form] = {"bench-122m-bf16": "bf16", "bench-122m-release": "release"}
# A router's bias moves which experts are chosen; more than this, and a few get all the tokens.
_ROUTER_BIAS = 0.02


def bench_config() -> ModelConfig:
    """Every kind of layer and of routing; bf16. No MTP block: not every program has one."""
    return ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
        index_n_heads=8,
        index_head_dim=64,
        index_topk=128,
        n_routed_experts=32,
        num_experts_per_tok=6,
        moe_intermediate_size=256,
        num_hash_layers=3,
        num_nextn_predict_layers=0,
        routed_scaling_factor=1.5,
    )


def write_bench_model(name: str, folder: Path, seed: int = 0) -> str:
    """Write one of BENCH_MODELS; returns the digest of its weights. It takes seconds."""
    write_model(folder, BENCH_MODELS[name], bench_config(), seed)
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.digest


def write_model(folder: Path, form: Form, config: ModelConfig, seed: int = 0) -> None:
    """A checkpoint in the official layout with random weights; `folder` must not exist yet.

    form  `bf16`, or `release`: the same values, rounded to FP8 and FP4 as convert() does
    """
    tensors = random_weights(config.with_(torch_dtype="bfloat16"), seed)
    if form == "bf16":
        save(tensors, config, folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        save(tensors, config, Path(scratch) / "plain")
        convert(Path(scratch) / "plain", folder, form)


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Official name -> tensor of an unpacked model; activations stay near 1 through all layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_table(config).items():
        if spec.role is Role.IDS:
            order = torch.rand(spec.shape[0], config.n_routed_experts, generator=generator)
            tensors[name] = order.argsort(1)[:, : spec.shape[1]].to(torch.int32)
            continue
        values = torch.randn(spec.shape, generator=generator) * _spread(name, spec.shape)
        if name.endswith("norm.weight"):
            values += 1
        elif name.endswith("_scale"):
            values += 0.5
        tensors[name] = values if spec.role is Role.SMALL else values.to(torch.bfloat16)
    return tensors


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation: 1 / sqrt(inputs) for a matrix, little around the middle for the rest."""
    if name.endswith((".weight", "_fn")) and len(shape) == 2 and not name.startswith("embed"):
        return float(shape[1] ** -0.5)
    if name.endswith(".gate.bias"):
        return _ROUTER_BIAS
    return 1.0 if name.startswith("embed") else 0.2
