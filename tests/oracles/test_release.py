"""The release format against dense.py: FP8 and FP4 weights, activations and cache entries.

Tolerance. We compute in float32, dense.py in float64. Where a value lies within a float32 ulp of
the middle between two codes (about one in 10^6 does), the sides take neighbouring codes, and all
behind that place differs by far more than an ulp: a code is 6 % (FP8) or 33 % (FP4) of a value,
and may turn the choice of an entry or an expert. No bound on such a difference is both safe and
useful. But most texts meet no such place, and those agree to 1e-4 at every position, which
nothing but the right rounding everywhere brings about: a mistake in one rounding shows in every
text. So texts and models are drawn until a few agree in full, and the number drawn is limited.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.checkpoint import load
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles.dense import Dense, weight_values
from tests.oracles.running import build, distance, draw_ids, feed, room, start
from tests.oracles.steady import Steady
from tests.oracles.watch import clear_text

TOLERANCE = 1e-4
CLEAR = 1e-5
LENGTH = 133
WANTED, DRAWN = 3, 80  # texts that agree in full, of so many at most; half or more do


def draw_until_some_agree(
    seed: int, length: int, form: str, tolerance: float = TOLERANCE, **changes: Any
) -> None:
    largest: list[float] = []
    while sum(d <= tolerance for d in largest) < WANTED:
        assert len(largest) < DRAWN, f"of {DRAWN} texts too few agree: {sorted(largest)}"
        text = seed + len(largest)
        config = tiny_config(text, form, **{"index_n_heads": 16} | changes)
        tensors = random_tensors(config, text)
        ids = draw_ids(config, length, torch.Generator().manual_seed(text))
        cache = room(config, length, CacheFormat.RELEASE, slots=1)
        with torch.no_grad(), Steady():
            ours = feed(build(config, tensors), cache, start(cache, length), ids)
        theirs, _ = Dense(config, tensors, release=True).forward(ids)
        largest.append(distance(ours, theirs))
    without, _ = Dense(config, tensors, release=False).forward(ids)
    print(f"distances {', '.join(f'{d:.0e}' for d in sorted(largest))}")
    print(f"without rounding {distance(without, theirs):.0e}")
    assert distance(ours, without) > 10 * tolerance, "the rounding makes no difference here"


@pytest.mark.parametrize("form", ["f32", "release", "base"])
def test_release_logits(form: str, seed: int) -> None:
    draw_until_some_agree(seed, LENGTH, form)


def test_entries_of_the_releases(seed: int) -> None:
    """512 dims, 64 of them rotary: seven groups of 64. Every entry is attended to.

    Ten times the values of the other cases, so half of the texts meet a flipped code; with all
    entries attended it moves no choice but the logits alone, by 1e-4 to 1e-3.
    """
    changes = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 64, "index_topk": 4096}
    draw_until_some_agree(seed, LENGTH, "f32", 1e-3, **changes)


def test_index_keys_of_the_releases(seed: int) -> None:
    """64 heads of 128 dims, four groups of FP4 each, with three of eleven entries chosen."""
    draw_until_some_agree(seed, 45, "f32", index_head_dim=128, index_n_heads=64, index_topk=3)


@pytest.mark.parametrize("form", ["release", "base"])
def test_wide_rounds_nothing(form: str, seed: int, tmp_path: Path) -> None:
    """Packed weights unpacked on load, and a float32 cache: float32 precision, always."""
    config = tiny_config(seed, form, index_n_heads=16)
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))
    model = load(folder, wide=True)
    values = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, values, LENGTH, generator, CLEAR)
    cache = room(config, LENGTH, CacheFormat.WIDE, slots=1)
    ours = feed(model, cache, start(cache, LENGTH), ids)
    stored = weight_values(random_tensors(config, seed))
    tables = {name: t for name, t in values.items() if not t.is_floating_point()}
    theirs, _ = Dense(config, stored | tables).forward(ids)
    assert distance(ours, theirs) <= TOLERANCE
