"""The official config.json: released models, round trips, and every refusal in one sentence."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from overleap.config import PRESETS, LayerKind, ModelConfig, Yarn
from overleap.errors import ConfigError

VECTOR = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "config-v4-pro.json"


def test_flash_and_pro_have_the_published_layers() -> None:
    flash, pro = ModelConfig.preset("v4-flash"), ModelConfig.preset("v4-pro")
    count = [[c.layer_kinds.count(kind) for kind in LayerKind] for c in (flash, pro)]
    assert count == [[2, 21, 20], [0, 30, 31]]
    assert len(flash.compress_ratios) == 44
    assert len(pro.compress_ratios) == 62
    assert flash.layer_kinds[:3] == (LayerKind.SLIDING, LayerKind.SLIDING, LayerKind.CSA)
    assert pro.layer_kinds[:3] == (LayerKind.HCA, LayerKind.HCA, LayerKind.CSA)
    assert flash.all_kinds[-1] is LayerKind.SLIDING  # the MTP layer
    assert [flash.is_hash_layer(n) for n in range(5)] == [True, True, True, False, False]


def test_rope_differs_by_layer_kind() -> None:
    flash = ModelConfig.preset("v4-flash")
    assert flash.rope(LayerKind.SLIDING).theta == 10000
    assert flash.rope(LayerKind.SLIDING).yarn is None
    for kind in (LayerKind.CSA, LayerKind.HCA):
        assert flash.rope(kind).theta == 160000
        assert flash.rope(kind).yarn == Yarn(16, 65536, 32, 1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_a_round_trip(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.expert_dtype == ("fp8" if name.endswith("base") else "fp4")


@pytest.mark.skipif(not VECTOR.exists(), reason="the official config is not beside the project")
def test_the_official_file_is_the_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(VECTOR.read_text("utf-8"), "utf-8")
    assert ModelConfig.from_checkpoint(tmp_path) == ModelConfig.preset("v4-pro")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"attention_sinks": 4}, "unknown key attention_sinks"),
    ({"dspark_block_size": 5}, "DSpark drafter (5 tokens a block)"),
    ({"hidden_size": None}, "hidden_size is None, expected int"),
    ({"hidden_size": "4096"}, "hidden_size is '4096', expected int"),
    ({"hidden_size": True}, "hidden_size is True, expected int"),
    ({"hidden_size": -1}, "hidden_size is -1, below zero"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, it must be above zero"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"compress_ratios": 4}, "compress_ratios is 4, no list"),
    ({"compress_ratios": [[0], 4]}, "compress_ratios is [[0], 4], no list of numbers"),
    ({"rope_scaling": {"type": "yarn", "factor": "16"}}, "rope_scaling factor is '16'"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 9}},
        "factor is 0, no number above zero",
    ),
    ({"index_topk": 0}, "index_topk is 0, it must be at least 1"),
    ({"compress_ratios": [0, 4]}, "has 2 entries, 43 layers and 1 MTP layers need 44"),
    ({"compress_ratios": [0, 0] + [4, 8] * 20 + [4, 0]}, "compress_ratios holds 8"),
    ({"compress_ratios": [0, 0] + [4, 128] * 20 + [4, 4]}, "MTP layers have ratio 4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8, V4 has 1"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 is odd"),
    ({"qk_rope_head_dim": 256}, "must be in 1..head_dim 512 and index_head_dim 128"),
    ({"o_groups": 7}, "64 attention heads do not divide into 7 o_groups"),
    ({"index_head_dim": 96}, "index_head_dim 96 is not a power of two"),
    ({"num_experts_per_tok": 300}, "300 experts a token, only 256 experts"),
    ({"num_hash_layers": 44}, "44 hash layers, only 43 layers"),
    ({"sliding_window": 256}, "sliding_window is 256, V4 has 128"),
    ({"expert_dtype": "int4"}, "expert_dtype is 'int4'"),
    ({"torch_dtype": "float16"}, "torch_dtype is 'float16'"),
    ({"quantization_config": None}, "there is no quantization_config"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ({"quantization_config": {"bits": 4}}, "unknown bits"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "only type 'yarn' is known"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1}}, "unknown mscale"),
    ({"eos_token_id": 129280}, "bos or eos is outside the vocabulary"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_say_what_is_wrong(change: dict[str, Any], sentence: str) -> None:
    raw = ModelConfig.preset("v4-flash").to_dict() | change
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_key_is_named(seed: int) -> None:
    raw = ModelConfig.preset("v4-pro").to_dict()
    name = random.Random(seed).choice(["hidden_size", "index_topk", "compress_ratios", "o_groups"])
    del raw[name]
    with pytest.raises(ConfigError, match=f"{name} missing"):
        ModelConfig.from_dict(raw)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.from_checkpoint(tmp_path)
    for content, reason in [("{", "cannot be read"), ("[]", "holds list"), ("\xff", "cannot be")]:
        (tmp_path / "config.json").write_text(content, "latin-1")
        with pytest.raises(ConfigError, match=reason):
            ModelConfig.from_checkpoint(tmp_path)


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="v5") as caught:
        ModelConfig.preset("v5")
    assert "v4-flash" in (caught.value.hint or "")
