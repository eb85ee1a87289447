"""Other storage forms of the same checkpoint, and the facts of one: convert() and show().

Not here: the number formats (kernels/torch/quant.py), the layout (table.py, folder.py).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from overleap.cache import layout
from overleap.cache.layout import CacheFormat
from overleap.checkpoint.files import DTYPES, Progress, parse_json, staged
from overleap.checkpoint.folder import GIB, Checkpoint, Kind, write_config, write_tensors
from overleap.checkpoint.load import Verified, open_checkpoint
from overleap.checkpoint.manifest import MANIFEST, write_manifest
from overleap.checkpoint.table import FP4, FP8, Role, TensorSpec, tensor_table
from overleap.config import FP8_QUANTIZATION, LayerKind, ModelConfig
from overleap.errors import CheckpointError
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize, fp4_weight, fp8_weight

Form = Literal["release", "bf16", "f32"]
FORMS: dict[str, dict[str, Any]] = {
    "release": {
        "quantization_config": FP8_QUANTIZATION,
        "expert_dtype": "fp4",
        "torch_dtype": "bfloat16",
    },
    "bf16": {"quantization_config": None, "expert_dtype": None, "torch_dtype": "bfloat16"},
    "f32": {"quantization_config": None, "expert_dtype": None, "torch_dtype": "float32"},
}
_COMPANIONS = {".json", ".md", ".txt", ".toml", ".jinja", ".model"}


def convert(
    source: str | Path,
    target: str | Path,
    form: Form,
    *,
    max_shard_bytes: int = 5 * GIB,
    tokenizer_config: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint again in another form, tensor by tensor, with a manifest.

    source    as for load(); its manifest is checked first if it has one
    target    a new folder; tokenizer, model card and other texts are copied into it
    form      `release` FP8 linears and FP4 experts, the rest bf16; `bf16`; `f32`.
              Streams, sinks and biases stay float32 in every form.
    tokenizer_config  entries to put into the target's tokenizer_config.json: what was told by the
              name of the source, or by a form that it loses, like the chat profile
    progress  called with bytes done and in all; each counts twice, written and read for the digest
    Packed to bf16 or f32 is exact; to `release` rounds to nearest (exact for what came from it).
    Raises CheckpointError and ConfigError; then there is no target.
    """
    if form not in FORMS:
        raise CheckpointError(f"no form is called {form!r}", f"forms are {', '.join(FORMS)}")
    checkpoint, verified = open_checkpoint(source)
    if verified is Verified.HEADERS:  # a large one: the new manifest is to vouch for its bytes
        open_checkpoint(checkpoint.folder, verify=True)
    config = checkpoint.config.with_(**FORMS[form])
    table = tensor_table(config)
    announced = {name: _kind(spec, config) for name, spec in table.items()}
    work = _Conversion(checkpoint, announced)
    with staged(Path(target)) as folder:
        for path in sorted(checkpoint.folder.iterdir()):
            if _is_companion(path):
                shutil.copyfile(path, folder / path.name)
        if tokenizer_config:
            _set(folder / "tokenizer_config.json", tokenizer_config)
        write_config(folder, config)
        write_tensors(folder, announced, work.produce, max_shard_bytes, _half(progress, 0))
        write_manifest(folder, _half(progress, 1))


class _Conversion:
    """Produces tensors in the wanted form; a scale is kept until it is asked for."""

    def __init__(self, checkpoint: Checkpoint, announced: dict[str, Kind]) -> None:
        self.checkpoint, self.announced = checkpoint, announced
        self._scales: dict[str, Tensor] = {}

    def produce(self, name: str) -> Tensor:
        if name in self._scales:
            return self._scales.pop(name)  # its weight came just before
        stored = self.checkpoint.tensor(name)
        wanted = self.announced[name][0]
        scale = name.removesuffix("weight") + "scale"
        packed = scale in self.checkpoint.table
        weight = Weight(stored, self.checkpoint.tensor(scale) if packed else None)
        if wanted not in (*FP8, *FP4):
            return dequantize(weight, DTYPES[wanted])
        if self.checkpoint.found[name].dtype != wanted:
            weight = (fp8_weight if wanted in FP8 else fp4_weight)(dequantize(weight))
        assert weight.scale is not None
        self._scales[scale] = weight.scale
        return weight.data


def show(path: str | Path) -> dict[str, Any]:
    """Facts of a checkpoint from its headers, for `overleap models show`; sizes in bytes."""
    checkpoint, verified = open_checkpoint(path, verify=False)
    config, table = checkpoint.config, checkpoint.table
    stored: dict[str, int] = {}
    for name in checkpoint.read_order():
        found = checkpoint.found[name]
        stored[found.dtype] = stored.get(found.dtype, 0) + found.end - found.start
    kinds = {kind.value: config.layer_kinds.count(kind) for kind in LayerKind}
    return {
        "folder": str(checkpoint.folder),
        "manifest": (checkpoint.folder / MANIFEST).is_file(),
        "checked": verified.value,
        "layers": {
            "total": config.num_hidden_layers,
            **kinds,
            "hash_routed": config.num_hash_layers,
            "mtp": config.num_nextn_predict_layers,
        },
        "parameters": parameters(config, table),
        "weight_bytes": {"total": sum(stored.values()), **dict(sorted(stored.items()))},
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "cache": {form.value: _cache_facts(config, form) for form in CacheFormat},
    }


def parameters(config: ModelConfig, table: dict[str, TensorSpec]) -> dict[str, int]:
    """Weights in all and per token, of the main model; those of the MTP layers apart.

    A token uses its experts, everything shared, and of the embedding one row, which is not
    counted as active.
    """
    total = active = mtp = 0
    for name, spec in table.items():
        if spec.role in (Role.IDS, Role.SCALE):
            continue
        if name.startswith("mtp."):
            mtp += spec.elements
            continue
        total += spec.elements
        if spec.role is Role.EXPERT:
            active += spec.elements * config.num_experts_per_tok
        elif name != "embed.weight":
            active += spec.elements * config.n_routed_experts
    return {"total": total, "active": active // config.n_routed_experts, "mtp": mtp}


def _cache_facts(config: ModelConfig, form: CacheFormat) -> dict[str, float]:
    return {
        "bytes_per_token": layout.bytes_per_token(config, form),
        "bytes_per_sequence": layout.slot_bytes(config, form).total,
        "bytes_at_full_context": layout.cache_bytes(
            config, config.max_position_embeddings, form
        ).total,
    }


def _half(progress: Progress | None, before: int) -> Progress | None:
    """Progress of one of two passes over the same bytes, `before` of which are done."""
    if progress is None:
        return None
    return lambda done, total: progress(before * total + done, 2 * total)


def _set(path: Path, entries: Mapping[str, str]) -> None:
    """Put entries into a JSON object in a file, which is made where there is none."""
    found = parse_json(path, path.read_bytes()) if path.is_file() else {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds a {type(found).__name__}, expected an object")
    text = json.dumps(found | dict(entries), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _kind(spec: TensorSpec, config: ModelConfig) -> Kind:
    """How a tensor is stored in a new checkpoint: the first choice of its role."""
    if spec.role is Role.SMALL:
        return "F32", spec.shape
    if len(spec.storage) == 1 or spec.role is Role.IDS:
        return spec.storage[0], spec.shape
    return ("F32" if config.torch_dtype == "float32" else "BF16"), spec.shape


def _is_companion(path: Path) -> bool:
    own = ("config.json", "model.safetensors.index.json", MANIFEST)
    texts = path.suffix in _COMPANIONS or path.name.startswith(("LICENSE", "tokenizer"))
    return path.is_file() and texts and path.name not in own and not path.name.startswith(".")
