"""The recipe of the bundled model: its configuration, its stages, and the command that runs them.

    python -m overleap.train.mini FOLDER

Not a framework: another model is another recipe. Read next: loop.py, bundled/mini/MODEL_CARD.md.
"""

import sys
from pathlib import Path

from overleap.config import ModelConfig, Yarn
from overleap.train.data import VOCABULARY, corpus, train_tokenizer
from overleap.train.loop import Recipe, Stage, run


def configuration() -> ModelConfig:
    """V4 with every layer kind, small enough to train on two CPU cores.

    YaRN by 256 from 4,096: pairs slower than the training length turn as slowly at a million
    tokens as the others let it learn at 4,096.
    """
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=160,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        compress_ratios=(0, 4, 128, 4, 0),
        index_n_heads=4,
        index_head_dim=64,
        index_topk=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        rope_scaling=Yarn(factor=256.0, original_max_position_embeddings=4096),
    )


def recipe() -> Recipe:
    """Short dense samples first, then longer ones, then sparse and rounded as released.

    Fast at first: where facts stand and their attributes are found within a hundred steps. Slower
    then: telling entities apart wants small steps.
    """
    return Recipe(
        config=configuration(),
        stages=(
            Stage(200, 512, 8, facts=12, turns=12, share=(0.3, 0.6)),
            Stage(150, 512, 8, facts=12, turns=12, rate=0.5),
            Stage(100, 1024, 4, facts=20, turns=20, rate=0.5),
            Stage(120, 2048, 2, facts=32, turns=32, rate=0.5, mtp=0.3),
            Stage(230, 4096, 1, 48, 48, sparse=True, rounding=True, rate=0.5, mtp=0.3),
        ),
        matrix_rate=0.02,
        other_rate=3e-3,
        seed=1,
    )


def main(folder: Path) -> None:
    """Tokenizer, then training; continues where an earlier run in `folder` stopped."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_tokenizer(corpus()[0], tokenizer)
    run(recipe(), folder, tokenizer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
