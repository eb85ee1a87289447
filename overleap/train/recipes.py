"""Our recipes: the bundled model, and one that is done in minutes.

    overleap train mini FOLDER --text PATH ...
    overleap train examples FOLDER

Not a framework: another model is another function. Read next: recipe.py, loop.py,
bundled/mini/MODEL_CARD.md.
"""

import sysconfig
from collections.abc import Callable

from overleap.config import ModelConfig, Yarn
from overleap.train.data import Tasks, Text
from overleap.train.recipe import Recipe, Stage

VOCABULARY = 8192


def mini_config() -> ModelConfig:
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
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        rope_scaling=Yarn(factor=256.0, original_max_position_embeddings=4096),
    )


def mini() -> Recipe:
    """Short dense rows first, then longer ones, then sparse and rounded as released.

    Fast at first: where facts stand and their attributes are found within a hundred steps. Slower
    then: telling entities apart wants small steps.
    """

    def mixed(text: float, planted: int, values: float = 0.1) -> tuple[Text | Tasks, ...]:
        facts = Tasks(1 - text - values, "fact", planted, planted)
        several = Tasks(values, "values", planted // 3, planted // 3)
        return (facts, several, Text(text)) if text else (facts, several)

    first = Tasks(1.0, "fact", 12, 12, alike=(0.3, 0.6))
    return Recipe(
        config=mini_config(),
        stages=(
            Stage(110, 512, 16, (first,), language=0.3),
            Stage(140, 512, 16, mixed(0.25, 12), language=0.5, rate=0.5, mtp=0.3),
            Stage(150, 1024, 8, mixed(0.5, 20), rate=0.5, mtp=0.3),
            Stage(520, 4096, 2, mixed(0.6, 48), rate=0.5, mtp=0.3),
            Stage(15, 4096, 2, mixed(0.5, 48), indexer_only=True, rate=0.5),
            Stage(60, 16384, 1, mixed(0.6, 64), sparse=True, rate=0.5, mtp=0.1),
            Stage(8, 32768, 1, mixed(0.6, 64), sparse=True, rounding=True, rate=0.5, mtp=0.1),
            Stage(120, 4096, 2, mixed(0.5, 48), sparse=True, rounding=True, rate=0.5, mtp=0.1),
        ),
        seed=1,
        vocabulary=VOCABULARY,
    )


def examples() -> Recipe:
    """Mini with a smaller vocabulary and fewer experts, from the standard library alone.

    Short, to find planted facts at all: mini's first stages. Its checkpoints serve as they are.
    """
    early = Tasks(1.0, "fact", 12, 12, alike=(0.3, 0.6))
    later = Tasks(1.0, "fact", 20, 20)
    return Recipe(
        config=mini_config().with_(vocab_size=4096, n_routed_experts=8),
        stages=(
            Stage(150, 512, 8, (early,), language=0.2),
            Stage(190, 512, 8, (Tasks(1.0, "fact", 12, 12),), language=0.2, rate=0.5),
            Stage(30, 1024, 4, (later,), language=0.2, sparse=True, rounding=True, rate=0.5),
        ),
        seed=1,
        text=(sysconfig.get_paths()["stdlib"],),
        vocabulary=4096,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"mini": mini, "examples": examples}
