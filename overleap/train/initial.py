"""First values of every tensor of a small model. Small models want fan-in scale, not 0.02.

Not a checkpoint: see checkpoint.py. Read next: loop.py (what happens to them), mini.py (sizes).
"""

import math

import torch
from torch import Tensor

from overleap.config import ModelConfig
from overleap.errors import TrainingError
from overleap.model.transformer import Transformer

GATE_LEAN = 1.1  # a stream's logit of sigmoid: one stream is favoured, the others get a quarter
IDENTITY_LEAN = 4.0  # diagonal of the mixing logits: streams start nearly separate
GATING = 0.1  # how far the input moves the connections at first ("starts small", eqs 3-5)


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Official name -> float32 tensor (hash tables: i32), reproducible from the seed.

    Linears: normal, 1 / sqrt(inputs); what writes to the streams: half of that. The head starts
    as the embedding, so that copying a token is near from the start. A compressor's values start
    as the window's values, so that what attention learns of one helps the other.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        out[name] = _first(name, shape, config, generator)
    out["head.weight"] = out["embed.weight"] * config.hidden_size**-0.5
    for name in shapes:
        if name.endswith(".attn.compressor.wkv.weight"):
            window = out[name.replace("compressor.wkv", "wkv")]
            out[name] = window.repeat(shapes[name][0] // window.shape[0], 1)
    return out


def _first(name: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    streams = config.hc_mult
    if leaf == "tid2eid":
        return _hash_table(shape, config.n_routed_experts, generator)
    if leaf in ("attn_sink", "ape", "bias"):
        return torch.zeros(shape)
    if leaf.endswith("_scale"):
        return torch.full(shape, GATING)
    if leaf.endswith("_base"):
        base = torch.zeros(shape)
        base[:streams] = -GATE_LEAN
        if leaf != "hc_head_base":
            number = int(name.split(".")[1]) * 2 + (leaf == "hc_ffn_base")
            base[number % streams] = GATE_LEAN
            base[2 * streams :] = (torch.eye(streams) * IDENTITY_LEAN).flatten()
        return base
    if leaf == "weight" and len(shape) == 1:
        return torch.ones(shape)
    if len(shape) != 2:
        raise TrainingError(f"no first values are known for {name} of shape {tuple(shape)}")
    noise = torch.randn(shape, generator=generator)
    if name == "embed.weight":
        return noise
    if name.endswith((".wo_b.weight", ".w2.weight")):
        return noise * 0.5 / math.sqrt(shape[1])
    return noise / math.sqrt(shape[1])


def _hash_table(shape: torch.Size, experts: int, generator: torch.Generator) -> Tensor:
    """Different experts for every token id, drawn evenly."""
    order = torch.rand(shape[0], experts, generator=generator).argsort(dim=-1)
    return order[:, : shape[1]].to(torch.int32)
