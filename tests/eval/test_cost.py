"""Counts of the model against counting one by one."""

import random
from pathlib import Path

import pytest

from overleap.cache.layout import CacheFormat, entry_bytes, key_bytes
from overleap.checkpoint import Checkpoint, tensor_table
from overleap.config import ModelConfig
from overleap.eval.bench_model import bench_config
from overleap.eval.cost import _capped, decode_bytes, prefill_flops
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


def test_sums_of_rows(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        tokens, ratio = draw.randint(1, 900), draw.choice([1, 4, 128])
        most = draw.randint(1, 300)
        expected = sum(min(t // ratio, most) for t in range(1, tokens + 1))
        assert _capped(tokens, ratio, most) == expected, (tokens, ratio, most)


def naive_flops(config: ModelConfig, tokens: int) -> int:
    total, width = 0, config.num_attention_heads * config.head_dim
    for name, spec in tensor_table(config).items():
        if name.startswith(("embed", "mtp")) or not spec.elements or name.endswith("tid2eid"):
            continue
        uses = 1.0 if name.startswith("head.") else float(tokens)
        if ".experts." in name:
            uses *= config.num_experts_per_tok / config.n_routed_experts
        total += 2 * spec.elements * uses
    for kind in config.layer_kinds:
        for t in range(1, tokens + 1):
            rows = min(t, 128)
            if kind == "csa":
                rows += min(t // 4, config.index_topk)
                total += 2 * (t // 4) * config.index_n_heads * config.index_head_dim
            rows += t // 128 if kind == "hca" else 0
            total += 2 * 2 * rows * width
    return round(total)


@pytest.mark.parametrize("tokens", [1, 127, 700])
def test_operations_of_reading(tokens: int, seed: int) -> None:
    config = tiny_config(seed)
    assert prefill_flops(config, tokens) == pytest.approx(naive_flops(config, tokens), rel=1e-9)


@pytest.mark.parametrize("form", ["bf16", "f32", "release", "base"])
def test_bytes_of_a_step_where_all_experts_are_chosen(form: str, seed: int, tmp_path: Path) -> None:
    config = tiny_config(
        seed, form, n_routed_experts=4, num_experts_per_tok=4, num_nextn_predict_layers=0
    )
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config, seed))
    found = Checkpoint(folder).found
    weights = sum(one.end - one.start for one in found.values())
    tables = [n for n in found if n == "embed.weight" or n.endswith("tid2eid")]
    weights -= sum(found[n].end - found[n].start for n in tables)
    weights += (4 if form == "f32" else 2) * config.hidden_size + 4 * 4 * config.num_hash_layers
    entry = entry_bytes(config.head_dim, config.qk_rope_head_dim, CacheFormat.RELEASE)
    key = key_bytes(config.index_head_dim, CacheFormat.RELEASE)
    kinds = config.layer_kinds
    cache = 128 * entry * len(kinds) + kinds.count("hca") * 8 * entry
    cache += kinds.count("csa") * (config.index_topk * entry + 256 * key)
    assert decode_bytes(config, 1024, CacheFormat.RELEASE) == weights + cache


def test_few_experts_are_a_share_of_the_bytes() -> None:
    config = bench_config()
    every = config.with_(num_experts_per_tok=32)
    part = decode_bytes(config, 1, CacheFormat.RELEASE)
    experts = 8 * 32 * 3 * 512 * 256 * 2
    whole = decode_bytes(every, 1, CacheFormat.RELEASE)
    tables = 3 * 4 * (32 - 6)
    assert whole - part - tables == experts * 26 // 32
