"""A V4 of all layer kinds that trains in milliseconds. Shared by the tests of this room."""

import torch
from torch import Tensor

from overleap.config import ModelConfig, Yarn
from overleap.train.data import Row, Tasks, Text
from overleap.train.initial import initial_weights
from overleap.train.passes import Pass
from overleap.train.recipe import Recipe, Stage


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


def small_recipe(seed: int, steps: int, **changes: object) -> Recipe:
    """Facts in text, then a last step that is sparse, rounded, longer and has a draft loss."""
    mixture = (Tasks(0.5, "fact", 4, 4), Text(0.5))
    stages = (
        Stage(steps - 1, 256, 2, mixture, language=0.3),
        Stage(1, 384, 2, mixture, sparse=True, rounding=True, mtp=0.3),
    )
    fields: dict[str, object] = {
        "config": small_config(index_topk=16),
        "stages": stages,
        "seed": seed,
        "vocabulary": 4096,
        "warmup_steps": 1,
        "group_tokens": 256,
        "compiled": False,
    }
    return Recipe(**(fields | changes))  # type: ignore[arg-type]


def lively_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """First values, moved so that no part of the model is without effect."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.3 * tensor.abs().mean().clamp(min=0.3) * _noise(tensor, generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in initial_weights(config, seed).items()
    }


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator)


def pass_of(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype, **changes: object
) -> Pass:
    recipe = small_recipe(0, 2, config=config, **changes)
    return Pass(recipe, {n: t.clone() for n, t in weights.items()}, dtype)


def random_row(counts: list[int], seed: int, vocabulary: int = 4096) -> Row:
    """Documents of random tokens, everything learned, nothing asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (sum(counts),), generator=generator).tolist()
    learn, end = [True] * len(ids), 0
    for count in counts:
        end += count
        learn[end - 1] = False
    return Row(ids, counts, learn, [], [])


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
