"""What a model is: the official config.json, checked once and frozen.

Not here: how it runs. Options of a run live with the engine; byte counts in cache/layout.py.
Read next: cache/layout.py (what a token costs), model/transformer.py (what the fields mean).
"""

import json
import math
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from overleap.errors import ConfigError


class LayerKind(StrEnum):
    """What a layer attends to beside its sliding window (report section 2.3)."""

    SLIDING = "sliding"  # ratio 0: nothing
    CSA = "csa"  # ratio 4: the top-k entries the indexer picks
    HCA = "hca"  # ratio 128: every entry


CSA_RATIO = 4
HCA_RATIO = 128
_KIND_OF_RATIO = {0: LayerKind.SLIDING, CSA_RATIO: LayerKind.CSA, HCA_RATIO: LayerKind.HCA}
RATIO_OF_KIND = {kind: ratio for ratio, kind in _KIND_OF_RATIO.items()}


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the rotary frequencies; used by layers with a compressor only."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer: base, and YaRN or None. No mscale (report code)."""

    theta: float
    yarn: Yarn | None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The official config.json of a DeepSeek-V4 model. Field names are its keys.

    `compress_ratios` has one entry per main layer, then one per MTP layer.
    Raises ConfigError for values that contradict each other or the architecture.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    sliding_window: int = 128
    n_shared_experts: int = 1
    num_key_value_heads: int = 1
    num_nextn_predict_layers: int = 1
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    expert_dtype: str | None = None  # "fp4" in instruct releases, "fp8" in -Base, None when plain
    quantization_config: tuple[tuple[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        _check(self)

    # Derived once; nothing else in the package looks at compress_ratios.

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each main layer."""
        ratios = self.compress_ratios[: self.num_hidden_layers]
        return tuple(_KIND_OF_RATIO[ratio] for ratio in ratios)

    @cached_property
    def all_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each main layer, then of each MTP layer (always sliding)."""
        return self.layer_kinds + (LayerKind.SLIDING,) * self.num_nextn_predict_layers

    def rope(self, kind: LayerKind) -> Rope:
        """Rotary settings of a layer: its own base and YaRN where it has a compressor."""
        if kind is LayerKind.SLIDING:
            return Rope(self.rope_theta, None)
        return Rope(self.compress_rope_theta, self.rope_scaling)

    def is_hash_layer(self, layer: int) -> bool:
        """True where a fixed table routes by token id instead of the learned router."""
        return layer < self.num_hash_layers

    # Files.

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> Self:
        """From the official keys. `source` names the origin in errors."""
        return cls(**_fields_from(raw, source))

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> Self:
        """From the config.json in a checkpoint folder."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist", "a checkpoint folder holds config.json and *.safetensors"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds {type(raw).__name__}, not an object")
        return cls.from_dict(raw, str(path))

    @classmethod
    def preset(cls, name: str) -> Self:
        """A released model by name: v4-flash, v4-pro, v4-flash-base, v4-pro-base."""
        if name not in PRESETS:
            raise ConfigError(
                f"no preset is called {name!r}", f"presets are {', '.join(sorted(PRESETS))}"
            )
        return cls.from_dict(PRESETS[name], f"preset {name}")

    def to_dict(self) -> dict[str, Any]:
        """The official config.json, ready for json.dumps."""
        raw: dict[str, Any] = dict(_FIXED)
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "rope_scaling":
                raw[field.name] = {"type": "yarn"} | vars(value)
            elif field.name == "compress_ratios":
                raw[field.name] = list(value)
            elif field.name == "quantization_config":
                raw[field.name] = {
                    key: list(item) if isinstance(item, tuple) else item for key, item in value
                }
            else:
                raw[field.name] = value
        return raw

    def with_(self, **changes: Any) -> Self:
        """A checked copy with some fields changed."""
        return replace(self, **changes)


# Facts of the architecture that config.json repeats. Any other value is another architecture.
_FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# Keys that other tools write and that say nothing about the forward pass.
_IGNORED = {
    "attention_dropout",
    "dtype",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "_name_or_path",
}
_FP8_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": (128, 128),
}
FP8_QUANTIZATION = tuple(_FP8_QUANTIZATION.items())


def _fields_from(raw: dict[str, Any], source: str) -> dict[str, Any]:
    if any(key.startswith("dspark_") for key in raw):
        raise ConfigError(
            f"{source} has a DSpark drafter ({raw.get('dspark_block_size')} tokens a block), "
            "which is not supported yet",
            "to run without a drafter: remove the dspark_* keys, set num_nextn_predict_layers to 0 "
            "and keep the first num_hidden_layers of compress_ratios",
        )
    for key, value in _FIXED.items():
        if key in raw and raw[key] != value:
            raise ConfigError(
                f"{source}: {key} is {raw[key]!r}, this architecture has {value!r}",
                "Overleap runs DeepSeek-V4 models only" if key == "model_type" else None,
            )
    known = {field.name: field for field in fields(ModelConfig)}
    unknown = sorted(set(raw) - set(known) - set(_FIXED) - _IGNORED)
    if unknown:
        raise ConfigError(
            f"{source}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            "a key that is not understood may change the model, so it is refused",
        )
    values = {key: value for key, value in raw.items() if key in known}
    if "compress_ratios" in values:
        ratios = values["compress_ratios"]
        if not isinstance(ratios, list) or any(type(ratio) is not int for ratio in ratios):
            raise ConfigError(f"{source}: compress_ratios is {ratios!r}, no list of numbers")
        values["compress_ratios"] = tuple(values["compress_ratios"])
    if values.get("rope_scaling") is not None:
        values["rope_scaling"] = _yarn(values["rope_scaling"], source)
    if values.get("quantization_config") is not None:
        values["quantization_config"] = _quantization(values["quantization_config"], source)
    required = [name for name, field in known.items() if _is_required(field)]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{source}: {', '.join(missing)} missing")
    for name, value in values.items():
        values[name] = _typed(name, value, str(known[name].type), source)
    return values


def _is_required(field: Any) -> bool:
    return "MISSING" in repr(field.default)


def _typed(name: str, value: Any, wanted: str, source: str) -> Any:
    """The value as its declared type; bool is not a number, 1.0 is not an int."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted == "<class 'float'>" and number:
        return float(value)
    expected = {"<class 'float'>": float, "<class 'int'>": int, "<class 'str'>": str}.get(wanted)
    if expected is not None and (isinstance(value, bool) or not isinstance(value, expected)):
        raise ConfigError(f"{source}: {name} is {value!r}, expected {expected.__name__}")
    return value


def _yarn(raw: Any, source: str) -> Yarn:
    if not isinstance(raw, dict) or raw.get("type", raw.get("rope_type")) != "yarn":
        raise ConfigError(f"{source}: rope_scaling is {raw!r}, only type 'yarn' is known")
    rest = {key: value for key, value in raw.items() if key not in ("type", "rope_type")}
    allowed = {field.name for field in fields(Yarn)}
    if set(rest) - allowed:
        names = ", ".join(sorted(set(rest) - allowed))
        raise ConfigError(f"{source}: rope_scaling has unknown {names}")
    for key, value in rest.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ConfigError(f"{source}: rope_scaling {key} is {value!r}, no number above zero")
    try:
        return Yarn(**rest)
    except TypeError:
        raise ConfigError(
            f"{source}: rope_scaling needs factor and original_max_position_embeddings"
        ) from None


def _quantization(raw: Any, source: str) -> tuple[tuple[str, Any], ...]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: quantization_config is {raw!r}, not an object")
    for key, value in raw.items():
        value = tuple(value) if isinstance(value, list) else value
        if key not in _FP8_QUANTIZATION:
            raise ConfigError(f"{source}: quantization_config has unknown {key}")
        if value != _FP8_QUANTIZATION[key]:
            raise ConfigError(
                f"{source}: quantization_config {key} is {value!r}, "
                f"the released format has {_FP8_QUANTIZATION[key]!r}"
            )
    return FP8_QUANTIZATION


_POSITIVE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups "
    "o_lora_rank index_n_heads index_head_dim index_topk n_routed_experts num_experts_per_tok "
    "moe_intermediate_size sliding_window hc_mult hc_sinkhorn_iters max_position_embeddings"
).split()


def _check(c: ModelConfig) -> None:
    """Refuse what cannot be a V4 model, in one sentence with the numbers."""
    for field in fields(c):
        value = getattr(c, field.name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise ConfigError(f"{field.name} is {value}, below zero")
        if isinstance(value, float) and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{field.name} is {value}, it must be above zero and finite")
    for name in _POSITIVE:
        if getattr(c, name) < 1:
            raise ConfigError(f"{name} is {getattr(c, name)}, it must be at least 1")
    expected = c.num_hidden_layers + c.num_nextn_predict_layers
    if len(c.compress_ratios) != expected:
        raise ConfigError(
            f"compress_ratios has {len(c.compress_ratios)} entries, {c.num_hidden_layers} layers "
            f"and {c.num_nextn_predict_layers} MTP layers need {expected}"
        )
    strange = ", ".join(sorted({str(r) for r in c.compress_ratios if r not in _KIND_OF_RATIO}))
    last = c.compress_ratios[c.num_hidden_layers :]
    rules: list[tuple[bool, str]] = [
        (not strange, f"compress_ratios holds {strange}; V4 has 0, 4 and 128"),
        (not any(last), f"MTP layers have ratio {max(last, default=0)}, V4 has 0 there"),
        (c.num_key_value_heads == 1, f"num_key_value_heads is {c.num_key_value_heads}, V4 has 1"),
        (c.n_shared_experts == 1, f"n_shared_experts is {c.n_shared_experts}, V4 has 1"),
        (c.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {c.qk_rope_head_dim} is odd"),
        (
            0 < c.qk_rope_head_dim <= min(c.head_dim, c.index_head_dim),
            f"qk_rope_head_dim {c.qk_rope_head_dim} must be in 1..head_dim {c.head_dim} "
            f"and index_head_dim {c.index_head_dim}",
        ),
        (
            c.num_attention_heads % c.o_groups == 0,
            f"{c.num_attention_heads} attention heads do not divide into {c.o_groups} o_groups",
        ),
        (
            c.index_head_dim & (c.index_head_dim - 1) == 0,
            f"index_head_dim {c.index_head_dim} is not a power of two (Hadamard transform)",
        ),
        (
            c.num_experts_per_tok <= c.n_routed_experts,
            f"{c.num_experts_per_tok} experts a token, only {c.n_routed_experts} experts",
        ),
        (
            c.num_hash_layers <= c.num_hidden_layers,
            f"{c.num_hash_layers} hash layers, only {c.num_hidden_layers} layers",
        ),
        (c.sliding_window == 128, f"sliding_window is {c.sliding_window}, V4 has 128"),
        (c.expert_dtype in (None, "fp4", "fp8"), f"expert_dtype is {c.expert_dtype!r}"),
        (c.torch_dtype in ("bfloat16", "float32"), f"torch_dtype is {c.torch_dtype!r}"),
        (
            c.quantization_config is not None or c.expert_dtype is None,
            f"expert_dtype is {c.expert_dtype!r} but there is no quantization_config",
        ),
        (
            max(c.bos_token_id, c.eos_token_id) < c.vocab_size,
            "bos or eos is outside the vocabulary",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise ConfigError(sentence)


def _released(**own: Any) -> dict[str, Any]:
    """The keys that Flash and Pro share (config.json of the releases)."""
    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    shared: dict[str, Any] = {
        "vocab_size": 129280,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "rope_scaling": yarn | {"beta_fast": 32, "beta_slow": 1},
        "expert_dtype": "fp4",
        "quantization_config": dict(_FP8_QUANTIZATION),
    }
    return shared | own


_FLASH = _released(
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    q_lora_rank=1024,
    o_groups=8,
    compress_ratios=[0, 0] + [4, 128] * 20 + [4, 0],
    index_topk=512,
    n_routed_experts=256,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
)
_PRO = _released(
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=[128, 128] + [4, 128] * 29 + [4, 0],
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)
PRESETS: dict[str, dict[str, Any]] = {
    "v4-flash": _FLASH,
    "v4-pro": _PRO,
    "v4-flash-base": _FLASH | {"expert_dtype": "fp8"},
    "v4-pro-base": _PRO | {"expert_dtype": "fp8"},
}
