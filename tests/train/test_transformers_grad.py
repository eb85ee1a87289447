"""Gradients against transformers' DeepseekV4ForCausalLM, float32, on the parts that both have.

transformers has no draft block and no rounding. Read next: tests/oracles/test_transformers.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.train.recipe import Stage
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.train.small import pass_of, random_row

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("length", [128, 384])
def test_gradients_equal_transformers(seed: int, length: int, tmp_path: Path) -> None:
    config = tiny_config(seed, "f32", index_topk=4096, index_n_heads=16, rope_scaling=None)
    tensors = random_tensors(config, seed)
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    row = random_row([length], seed, config.vocab_size)
    work = pass_of(config, tensors, torch.float32, distillation=0.0, balance=0.0, language_rows=1.0)
    total, _, _ = work.losses(Stage(1, length, 1, ()), [row], "seed")
    total.backward()
    ours = {n: p.grad for n, p in work.model.named_parameters() if p.grad is not None}

    transformers.utils.logging.disable_progress_bar()
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    logits = model(torch.tensor([row.ids]), use_cache=False).logits[0]
    loss = F.cross_entropy(logits[:-1], torch.tensor(row.ids[1:]))
    loss.backward()
    assert float(total.detach()) == pytest.approx(float(loss.detach()), abs=1e-4)
    theirs = {
        name: grad
        for their_name, p in model.named_parameters()
        if p.grad is not None
        for name, grad in our_names(their_name, p.grad)
    }
    compared, scale = 0, float(torch.cat([g.flatten() for g in ours.values()]).norm())
    for name, grad in ours.items():
        if name.startswith("mtp.") or ".indexer." in name:
            continue
        compared += 1
        assert name in theirs, name
        distance = float((grad - theirs[name]).norm())
        assert distance <= 1e-4 * float(theirs[name].norm()) + 1e-6 * scale, name
    assert compared > 40


NAMES = (
    ("model.embed_tokens", "embed"), ("lm_head", "head"), ("model.", ""),
    ("hc_head.hc_", "hc_head_"), ("attn_hc.", "hc_attn_"), ("ffn_hc.", "hc_ffn_"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("compressor.kv_norm", "compressor.norm"), ("position_bias", "ape"),
    ("compressor.gate_proj", "compressor.wgate"), ("self_attn.", "attn."), ("mlp.", "ffn."),
    ("sinks", "attn_sink"), ("q_a_proj", "wq_a"), ("q_a_norm", "q_norm"), ("q_b_proj", "wq_b"),
    ("kv_proj", "wkv"), ("o_a_proj", "wo_a"), ("o_b_proj", "wo_b"),
    ("shared_experts.gate_proj", "shared_experts.w1"),
    ("shared_experts.down_proj", "shared_experts.w2"),
    ("shared_experts.up_proj", "shared_experts.w3"),
)  # fmt: skip


def our_names(name: str, grad: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The official name of a gradient of theirs; their experts lie in one tensor."""
    for before, after in NAMES:
        name = name.replace(before, after)
    owner, _, part = name.partition(".experts.")
    if part == "gate_up_proj":
        for number, both in enumerate(grad):
            for leaf, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                yield f"{owner}.experts.{number}.{leaf}.weight", half
    elif part == "down_proj":
        for number, one in enumerate(grad):
            yield f"{owner}.experts.{number}.w2.weight", one
    else:
        yield name, grad
