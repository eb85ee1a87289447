"""Logits against transformers' DeepseekV4ForCausalLM, both loaded from the folder our save wrote.

Random configurations and texts, float32, nothing rounded. transformers leaves out the Hadamard
transform and all rounding, which changes nothing here. What it lacks (FP8, FP4, the MTP block)
is held against dense.py. Read next: test_release.py, test_mtp.py.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.checkpoint import load
from overleap.config import Yarn
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles.running import distance, feed, room, start
from tests.oracles.watch import clear_text

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
# Scores closer than this relative to the largest are not used: see watch.py. Both sides agree to
# about 1e-6, so ten times that leaves no choice to chance.
CLEAR = 1e-5
ALL, SMALL = 4096, (3, 8, 20)  # index_topk beyond every visible entry, or below

# Each case: what it fixes; the rest of the configuration and the text come from the seed.
CASES: dict[str, dict[str, Any]] = {
    "one token": {"length": 1, "yarn": True},
    "before the first entry": {"length": 3, "yarn": False, "num_hash_layers": 0},
    "inside the window": {"length": (61, 127), "yarn": True},
    "one step over the window": {"length": 129, "yarn": False},
    "all entries chosen": {"length": (201, 399), "yarn": True, "index_topk": ALL},
    "every layer hashed": {"length": (201, 399), "yarn": False, "hashed": True},
    "no layer hashed": {"length": (257, 511), "yarn": True, "num_hash_layers": 0},
    "stored in bfloat16": {"length": (257, 511), "yarn": False, "form": "bf16"},
    "six streams, one group": {"length": (131, 301), "yarn": True, "hc_mult": 6, "o_groups": 1},
    "Flash's order of layers": {
        "length": (401, 599),
        "yarn": True,
        "compress_ratios": (0, 0, 4, 128, 4),
        "num_hash_layers": 3,
    },
    "Pro's order of layers": {
        "length": (599, 699),
        "yarn": True,
        "compress_ratios": (128, 128, 4, 128, 4),
        "num_hash_layers": 3,
    },
    "head sizes of the releases": {
        "length": (131, 301),
        "yarn": True,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_n_heads": 64,
        "index_head_dim": 128,
    },
    "the longest": {"length": 699, "yarn": False},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal(case: str, seed: int, tmp_path: Path) -> None:
    fixed = dict(CASES[case])
    draw = random.Random(seed)
    length = fixed.pop("length")
    if isinstance(length, tuple):
        length = draw.randrange(length[0], length[1] + 1, 2)  # odd
    yarn = Yarn(draw.choice([4.0, 16.0]), draw.choice([64, 256])) if fixed.pop("yarn") else None
    form, hashed = fixed.pop("form", "f32"), fixed.pop("hashed", False)
    # Many heads: with few, scores of exactly 0 are common, and any of them is a right choice.
    fixed.setdefault("index_n_heads", draw.choice([16, 24]))
    fixed.setdefault("index_topk", draw.choice(SMALL))
    config = tiny_config(seed, form, rope_scaling=yarn, **fixed)
    if hashed:
        config = config.with_(num_hash_layers=config.num_hidden_layers)

    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, tensors, length, generator, CLEAR)

    with torch.no_grad():
        cache = room(config, length, CacheFormat.WIDE, slots=1)
        ours = feed(load(folder, wide=True), cache, start(cache, length), ids)
        theirs = their_logits(folder, ids)
    largest = distance(ours, theirs)
    print(f"{case}: {length} tokens, ratios {config.compress_ratios}, distance {largest:.1e}")
    assert ours.shape == theirs.shape == (length, config.vocab_size)
    assert largest <= TOLERANCE


def their_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits f32 [T, V] of transformers."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits
