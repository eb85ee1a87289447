"""Models with random weights, for measuring speed where no checkpoint is: same shapes, no sense.

Not for training: first values that learn are in train/initial.py. Read next: speed.py.
"""

import torch
from torch import Tensor

from overleap.checkpoint import tensor_table
from overleap.checkpoint.table import FP4, FP8, Role
from overleap.config import ModelConfig
from overleap.devices import find
from overleap.kernels import select
from overleap.kernels.torch.quant import fp4_weight, fp8_weight
from overleap.model.transformer import Transformer


def random_model(
    config: ModelConfig, seed: int = 0, *, backend: str = "auto", device: str = "cpu"
) -> Transformer:
    """A model of this shape with random weights, packed where the config says so."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, spec in tensor_table(config).items():
        if spec.role is Role.SCALE:
            continue  # comes with its weight
        if spec.role is Role.IDS:
            order = torch.rand(spec.shape[0], config.n_routed_experts, generator=generator)
            tensors[name] = order.argsort(1)[:, : spec.shape[1]].to(torch.int32)
            continue
        rows, *rest = spec.shape
        width = rest[0] * (2 if spec.storage == FP4 else 1) if rest else 1
        values = torch.randn((rows, width) if rest else (rows,), generator=generator)
        values *= width**-0.5 if rest else 0.1
        if name.endswith("norm.weight"):
            values += 1
        if spec.storage not in (FP4, FP8):
            tensors[name] = values
            continue
        weight = (fp4_weight if spec.storage == FP4 else fp8_weight)(values)
        assert weight.scale is not None
        tensors[name] = weight.data
        tensors[name.removesuffix("weight") + "scale"] = weight.scale
    where = find(device)
    model = Transformer(config, select(backend, where.type))
    model.assign({name: tensor.to(where) for name, tensor in tensors.items()})
    return model


def small_config() -> ModelConfig:
    """Every kind of layer at a size that two cores read at thousands of tokens a second."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=160,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        compress_ratios=(0, 4, 128, 4),
        index_n_heads=4,
        index_head_dim=64,
        index_topk=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=2,
        num_nextn_predict_layers=0,
        routed_scaling_factor=1.5,
    )
