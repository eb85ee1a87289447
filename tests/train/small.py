"""A V4 of all layer kinds that trains in milliseconds. Shared by the tests of this room."""

import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.config import ModelConfig, Yarn
from overleap.kernels.spec import Ops
from overleap.model.indexer import IndexerTap
from overleap.model.transformer import Batch, Output, Transformer
from overleap.train.initial import initial_weights


def small_config(**changes: object) -> ModelConfig:
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=80,
        qk_rope_head_dim=16,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=16,
        compress_ratios=(0, 4, 128, 4, 0),
        index_n_heads=2,
        index_head_dim=32,
        index_topk=1024,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        rope_scaling=Yarn(factor=256.0, original_max_position_embeddings=4096),
    )
    return config.with_(**changes)


def trained_model(config: ModelConfig, ops: Ops | None, seed: int) -> Transformer:
    model = Transformer(config, ops)
    model.assign(initial_weights(config, seed))
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    return model


def step(model: Transformer, ids: Tensor) -> tuple[Output, list[IndexerTap], Batch, Cache]:
    """All logits of [B, L] tokens from position 0 in a fresh wide cache."""
    sequences, length = ids.shape
    pages = sequences * length // 128
    cache = Cache(model.config, pages=pages, slots=sequences, format=CacheFormat.WIDE)
    parts = []
    for row in ids.tolist():
        sequence = cache.open()
        cache.reserve(sequence, length)
        parts.append((sequence, row))
    batch = Batch.of(parts, cache, "all")
    taps: list[IndexerTap] = []
    return model(batch, cache, taps), taps, batch, cache


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def random_ids(sequences: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4096, (sequences, length), generator=generator)
