"""The model that speed is compared on: its size, its two forms, and that it is not degenerate."""

from pathlib import Path

import torch

from overleap.cache.layout import CacheFormat
from overleap.checkpoint import Checkpoint, load, tensor_table
from overleap.checkpoint.convert import parameters
from overleap.eval.bench_model import BENCH_MODELS, bench_config, random_weights, write_model
from overleap.eval.logits import all_logits
from overleap.eval.speed import open_folder
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize, fp4_weight
from tests.checkpoints import tiny_config


def test_it_has_122_million_weights_of_every_kind() -> None:
    config = bench_config()
    count = parameters(config, tensor_table(config))
    assert count["total"] == 121_984_597 and count["mtp"] == 0
    assert set(config.layer_kinds) == {"sliding", "csa", "hca"}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert set(BENCH_MODELS.values()) == {"bf16", "release"}


def test_both_forms_hold_the_same_values(seed: int, tmp_path: Path) -> None:
    config = tiny_config(seed, num_nextn_predict_layers=0)
    plain = config.with_(torch_dtype="bfloat16")
    for form in ("bf16", "release"):
        write_model(tmp_path / form, form, plain, seed)
    wide, packed = Checkpoint(tmp_path / "bf16"), Checkpoint(tmp_path / "release")
    assert packed.config.expert_dtype == "fp4" and wide.config.quantization_config is None
    name = "layers.1.ffn.experts.1.w2.weight"
    expected = fp4_weight(wide.tensor(name).float())
    found = Weight(packed.tensor(name), packed.tensor(name.replace("weight", "scale")))
    assert torch.equal(dequantize(found, torch.float32), dequantize(expected, torch.float32))
    assert torch.equal(wide.tensor("embed.weight"), packed.tensor("embed.weight"))
    again = random_weights(plain, seed)
    assert all(torch.equal(again[name], wide.tensor(name)) for name in again)


def test_its_logits_are_those_of_no_degenerate_model(seed: int, tmp_path: Path) -> None:
    # Two layers of each kind are enough; the widths are the bench model's.
    config = bench_config().with_(num_hidden_layers=3, compress_ratios=(0, 4, 128))
    write_model(tmp_path / "model", "bf16", config, seed)
    ids = torch.randint(config.vocab_size, (256,)).tolist()
    logits = all_logits(load(tmp_path / "model"), ids, CacheFormat.RELEASE, 128)
    assert logits.isfinite().all()
    assert 0.3 < float(logits.std()) < 3
    best = logits.argmax(-1).unique()
    assert len(best) > 100, "other tokens follow other texts"


def test_its_folder_is_there_as_long_as_it_is_used() -> None:
    with open_folder("bench-122m-release", 1) as (folder, name, digest):
        assert name == "bench-122m-release" and digest
        assert Checkpoint(folder).config.num_hidden_layers == 8
    assert not folder.exists()
