"""The MTP block against two other formulations: dense.py, and a block of transformers.

transformers ignores the MTP weights, so its model is given them as its only layer, with that
layer's input replaced by the sum of the two projections (section 3.8). The package
nano-deepseek-v4 has an MTP module too, but its hyper-connections are not the released ones (no
factor 2 on post, sigmoid instead of exp before Sinkhorn), so equal logits cannot be asked of it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from overleap.cache.layout import CacheFormat
from overleap.config import ModelConfig
from overleap.model.transformer import Batch, Transformer
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.oracles.dense import Dense
from tests.oracles.running import build, distance, draw_ids, room, start
from tests.oracles.watch import clear_text, watched

TOLERANCE = 1e-4
CLEAR = 1e-5


def our_draft(
    model: Transformer, config: ModelConfig, ids: list[int], following: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams after the main layers, draft logits [T, V], draft streams; wide cache."""
    cache = room(config, len(ids), CacheFormat.WIDE, slots=1)
    batch = Batch.of([(start(cache, len(ids)), ids)], cache, "none")
    streams = model(batch, cache).streams
    return streams, *model.draft(streams, torch.tensor(following), cache, batch.spans)


def clear_following(
    config: ModelConfig, tensors: dict[str, Tensor], ids: list[int], generator: torch.Generator
) -> list[int]:
    """Tokens that follow `ids`, such that the draft block's choice of experts is clear."""
    ops, margins = watched()
    model = build(config, tensors, ops)
    following = [*ids[1:], *draw_ids(config, 1, generator)]
    for _ in range(10 + len(ids)):
        margins.clear()
        our_draft(model, config, ids, following)
        unclear = (margins[-1] < CLEAR).nonzero()  # the last choice is the draft block's
        if not unclear.numel():
            return following
        following[int(unclear[0])] = draw_ids(config, 1, generator)[0]
    raise AssertionError("no text whose choices are clear")


@pytest.mark.parametrize("length", [1, 63, 127, 129, 301])
def test_draft_equals_the_equations(length: int, seed: int) -> None:
    config = tiny_config(seed, index_n_heads=16)
    tensors = random_tensors(config, seed)
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, tensors, length, generator, CLEAR)
    following = clear_following(config, tensors, ids, generator)
    streams, logits, out = our_draft(build(config, tensors), config, ids, following)

    dense = Dense(config, tensors)
    their_main, their_streams = dense.forward(ids)
    their_logits, their_out = dense.draft(their_streams, following)
    print(f"distance {distance(logits, their_logits):.1e}")
    assert distance(streams, their_streams) <= TOLERANCE
    assert distance(logits, their_logits) <= TOLERANCE
    assert distance(out, their_out) <= TOLERANCE
    # It is a prediction of its own, not the main model's.
    assert distance(logits, their_main) > 100 * TOLERANCE


def test_draft_equals_a_block_of_transformers(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, index_n_heads=16)
    tensors = random_tensors(config, seed)
    generator = torch.Generator().manual_seed(seed)
    ids, _ = clear_text(config, tensors, 151, generator, CLEAR)
    following = clear_following(config, tensors, ids, generator)
    streams, logits, _ = our_draft(build(config, tensors), config, ids, following)

    # x = e_proj(enorm(embed(ids))) to every stream + h_proj(hnorm(streams))
    eps = config.rms_norm_eps
    token = nn.functional.rms_norm(
        tensors["embed.weight"][torch.tensor(following)],
        (config.hidden_size,),
        tensors["mtp.0.enorm.weight"],
        eps,
    )
    past = nn.functional.rms_norm(
        streams, (config.hidden_size,), tensors["mtp.0.hnorm.weight"], eps
    )
    joined = (token @ tensors["mtp.0.e_proj.weight"].t())[:, None]
    joined = joined + past @ tensors["mtp.0.h_proj.weight"].t()

    model = only_the_draft_block(config, tensors, tmp_path)

    def instead(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (joined[None], *arguments[1:])

    model.model.layers[0].register_forward_pre_hook(instead)
    with torch.no_grad():
        theirs = model(torch.tensor([following]), use_cache=False).logits[0]
    print(f"distance {distance(logits, theirs):.1e}")
    assert distance(logits, theirs) <= TOLERANCE


def only_the_draft_block(config: ModelConfig, tensors: dict[str, Tensor], folder: Path) -> Any:
    """transformers' model whose one layer, final norm and stream head are the MTP block's."""
    alone = config.with_(
        num_hidden_layers=1, compress_ratios=(0,), num_nextn_predict_layers=0, num_hash_layers=0
    )
    own = {name: tensors[name] for name in ("embed.weight", "head.weight")}
    for name, tensor in tensors.items():
        part = name.removeprefix("mtp.0.")
        if part == name or part.split(".")[0] in ("enorm", "hnorm", "e_proj", "h_proj"):
            continue
        at_the_end = part.startswith(("hc_head", "norm."))
        own[part if at_the_end else f"layers.0.{part}"] = tensor
    write_checkpoint(folder / "model", alone, own)
    transformers.utils.logging.disable_progress_bar()
    return transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
