"""Tiny random checkpoints in every storage form, for any test that needs a model on disk.

    config = tiny_config(seed, form="release")
    write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))

Forms: f32, bf16, release (FP8 linears, FP4 experts), base (FP8 linears and experts).
"""

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from overleap.checkpoint import save, tensor_table
from overleap.checkpoint.table import Role, TensorSpec
from overleap.config import FP8_QUANTIZATION, ModelConfig, Yarn
from overleap.kernels.torch.quant import fp4_weight, fp8_weight

FORMS = ("f32", "bf16", "release", "base")
_PACKED = {"release": "fp4", "base": "fp8"}


def tiny_config(seed: int, form: str = "f32", **changes: Any) -> ModelConfig:
    """A random small config: every layer kind, hash and learned routing, YaRN by a coin, MTP.

    seed     the same seed gives the same config for every form
    changes  fields to fix, for instance `rope_scaling=None` or `num_nextn_predict_layers=0`;
             compress_ratios may leave out the MTP layers
    """
    draw = random.Random(seed)
    ratios = [0, 4, 128] + [draw.choice([0, 4, 128]) for _ in range(draw.randint(0, 2))]
    draw.shuffle(ratios)
    rope = draw.choice([4, 8, 16])
    groups = draw.choice([1, 2])
    fields: dict[str, Any] = {
        "vocab_size": draw.randint(120, 300),
        "hidden_size": draw.choice([32, 64, 96, 160]),
        "num_attention_heads": groups * draw.choice([1, 2, 3]),
        "head_dim": rope + draw.choice([12, 24, 48, 72]),
        "qk_rope_head_dim": rope,
        "q_lora_rank": draw.choice([24, 48, 136]),
        "o_groups": groups,
        "o_lora_rank": draw.choice([16, 24]),
        "compress_ratios": tuple(ratios),
        "index_n_heads": draw.choice([1, 2, 4]),
        "index_head_dim": draw.choice([16, 32, 64]),
        "index_topk": draw.choice([3, 8, 20]),
        "n_routed_experts": draw.choice([4, 6, 9]),
        "num_experts_per_tok": draw.choice([1, 2, 3]),
        "moe_intermediate_size": draw.choice([32, 64]),
        "num_hash_layers": draw.choice([1, 2]),
        "routed_scaling_factor": draw.choice([1.0, 1.5, 2.5]),
        "hc_mult": draw.choice([2, 4]),
        "rope_scaling": Yarn(16.0, draw.choice([64, 256])) if draw.random() < 0.5 else None,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
        "torch_dtype": "float32" if form == "f32" else "bfloat16",
        "expert_dtype": _PACKED.get(form),
        "quantization_config": FP8_QUANTIZATION if form in _PACKED else None,
    }
    fields |= changes
    main = fields.pop("num_hidden_layers", None) or len(fields["compress_ratios"])
    stages = fields["num_nextn_predict_layers"]
    if len(fields["compress_ratios"]) == main:
        fields["compress_ratios"] = (*fields["compress_ratios"], *[0] * stages)
    return ModelConfig(num_hidden_layers=len(fields["compress_ratios"]) - stages, **fields)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Random values for every tensor of the config, stored as it says.

    Sizes are such that activations stay near 1, and none of the parts has no effect.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = torch.float32 if config.torch_dtype == "float32" else torch.bfloat16
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_table(config).items():
        if spec.role is Role.SCALE:
            continue  # comes with its weight
        if spec.role is Role.IDS:
            rows, chosen = spec.shape
            shuffled = torch.rand(rows, config.n_routed_experts, generator=generator).argsort(1)
            tensors[name] = shuffled[:, :chosen].to(torch.int32).contiguous()
        elif "I8" in spec.storage:
            outputs, half = spec.shape
            w = _values(name, (outputs, 2 * half), generator)
            _put_packed(tensors, name, w, spec)
        elif "F8_E4M3" in spec.storage:
            _put_packed(tensors, name, _values(name, spec.shape, generator), spec)
        else:
            dtype = torch.float32 if spec.role is Role.SMALL else plain
            tensors[name] = _values(name, spec.shape, generator).to(dtype)
    return tensors


def write_checkpoint(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor], max_shard_bytes: int = 2**30
) -> Path:
    """Save in the official layout (with a manifest) and return the folder."""
    save(tensors, config, folder, max_shard_bytes=max_shard_bytes)
    return folder


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file with the library's own writer, whatever the tensors are.

    By renaming: tensors that came from the file are still mapped to it.
    """
    save_file(tensors, path.with_suffix(".new"), {"format": "pt"})
    path.with_suffix(".new").replace(path)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    leaf = name.rpartition(".")[2]
    if name.endswith("norm.weight"):
        return 1 + 0.2 * x
    if leaf.endswith("_scale"):  # of the stream mixing
        return 0.5 + 0.2 * x
    if len(shape) == 2 and leaf == "weight" and not name.startswith("embed"):
        return x * shape[1] ** -0.5
    if leaf.endswith("_fn"):
        return x * shape[1] ** -0.5
    return x * (1.0 if name.startswith("embed") or leaf == "attn_sink" else 0.3)


def _put_packed(tensors: dict[str, Tensor], name: str, w: Tensor, spec: TensorSpec) -> None:
    packed = (fp4_weight if "I8" in spec.storage else fp8_weight)(w)
    assert packed.scale is not None
    tensors[name] = packed.data
    tensors[name.removesuffix("weight") + "scale"] = packed.scale
