"""The planner's list of weights is the checkpoint's, in number and in bytes, whatever the shape."""

from math import prod

import pytest

from overleap.checkpoint import locate, tensor_table
from overleap.checkpoint.table import Role
from overleap.config import FP8_QUANTIZATION, PRESETS, ModelConfig
from overleap.plan import parameters
from overleap.plan.weights import Part, Precision, matrices, weight_bytes
from tests.checkpoints import tiny_config

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1, "F8_E8M0": 1, "I32": 4}


def table_bytes(config: ModelConfig, experts: bool | None = None) -> int:
    """What the checkpoint's own table comes to, tensor by tensor, in its first storage type."""
    return sum(
        prod(spec.shape) * BYTES[spec.storage[0]]
        for name, spec in tensor_table(config).items()
        if experts is None or experts == (".experts." in name)
    )


def table_parameters(config: ModelConfig) -> int:
    """Of the main model; ids of the routing tables are no parameters."""
    return sum(
        spec.elements
        for name, spec in tensor_table(config).items()
        if not name.startswith("mtp.") and spec.role is not Role.IDS
    )


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_released_shapes(name: str) -> None:
    config = ModelConfig.preset(name)
    assert parameters(config)["total"] == table_parameters(config)
    for experts in (None, True, False):
        assert weight_bytes(config, experts=experts) == table_bytes(config, experts)


def test_published_parameters() -> None:
    """284.33B in all and 13.27B active (Flash), 1573.0B and 48.85B (Pro)."""
    found = {name: parameters(ModelConfig.preset(name)) for name in ("v4-flash", "v4-pro")}
    assert {
        name: (round(each["total"] / 1e9, 2), round(each["active"] / 1e9, 2))
        for name, each in found.items()
    } == {"v4-flash": (284.33, 13.27), "v4-pro": (1573.0, 48.85)}


def test_other_shapes(seed: int) -> None:
    for number in range(5):
        plain = tiny_config(seed + number).with_(torch_dtype="bfloat16")
        packed = plain.with_(quantization_config=FP8_QUANTIZATION, expert_dtype="fp8")
        for config in (plain, packed):
            assert parameters(config)["total"] == table_parameters(config)
            assert weight_bytes(config) == table_bytes(config)
    wide = plain.with_(torch_dtype="float32")
    linear = [each for each in matrices(wide) if each.part is Part.ATTENTION][1]
    assert linear.nbytes(wide, Precision.RELEASE) == 4 * prod(linear.shape)


def test_the_bundled_model_takes_what_its_files_hold() -> None:
    folder = locate("mini")
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    predicted = weight_bytes(ModelConfig.from_checkpoint(folder))
    assert 0 < held - predicted < 0.02 * held  # the rest is the header


def test_other_precisions_of_flash() -> None:
    """By hand, from one expert: 3 matrices of 4096 x 2048, 25,165,824 weights, 44 x 256 of them."""
    flash, count, weights = ModelConfig.preset("v4-flash"), 44 * 256, 3 * 4096 * 2048
    by_hand = {
        Precision.RELEASE: count * (weights // 2 + weights // 32),
        Precision.FP8: count * (weights + weights // 128**2),
        Precision.INT8: count * (weights + 4 * (2048 + 2048 + 4096)),
        Precision.BF16: count * weights * 2,
        Precision.F32: count * weights * 4,
    }
    assert {each: weight_bytes(flash, each, experts=True) for each in Precision} == by_hand
    base = ModelConfig.preset("v4-flash-base")
    assert weight_bytes(base, experts=True) == by_hand[Precision.FP8]
