"""Every tensor of an official checkpoint: name, shape, and how it may be stored.

Not here: reading or writing. The names are the released ones, so this table is the only mapping.
Read next: folder.py (holds files against the table), config.py (the numbers).
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from overleap.config import HCA_RATIO, RATIO_OF_KIND, LayerKind, ModelConfig
from overleap.errors import CheckpointError, ConfigError

FP8_BLOCK = 128  # outputs x inputs that share an FP8 scale
FP4_GROUP = 32  # inputs that share an FP4 scale
MAX_EXPERTS = 1_000_000  # of all layers; a hostile config.json must not fill the memory

# Storage types by their safetensors names.
PLAIN = ("BF16", "F32")
FP8 = ("F8_E4M3",)
FP4 = ("I8",)  # two e2m1 values a byte
SCALE = ("F8_E8M0",)
IDS = ("I32", "I64")


class Role(StrEnum):
    """What a tensor is for; the released form stores each role its own way."""

    LINEAR = "linear"  # attention, shared experts, MTP projections: FP8 when released
    EXPERT = "expert"  # routed experts: FP4 when released, FP8 in -Base
    SCALE = "scale"  # of a packed linear or expert
    MATRIX = "matrix"  # embedding, head, norms, router, compressors: BF16 when released
    SMALL = "small"  # mixing of streams, sinks, biases: F32 always
    IDS = "ids"  # experts of every token id: I32


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as it must be in the files.

    shape     as stored: an FP4 weight [N, K] has K / 2 columns
    storage   safetensors type names that are accepted
    elements  weights it stands for: N * K whatever the packing, 0 for a scale
    """

    role: Role
    shape: tuple[int, ...]
    storage: tuple[str, ...]
    elements: int


@dataclass(frozen=True)
class Found:
    """A tensor as a file's header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte range in the file
    end: int


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint. `tensor` is None where a whole file is meant."""

    file: str
    tensor: str | None
    reason: str

    def __str__(self) -> str:
        # The name comes from a file that is perhaps hostile: keep the terminal out of it.
        tensor = self.tensor
        if tensor is not None and (len(tensor) > 200 or not tensor.isprintable()):
            tensor = ascii(tensor)[:200]
        return ": ".join(part for part in (self.file, tensor, self.reason) if part)


class Damaged(CheckpointError):
    """A checkpoint with problems; the message has the first in full and counts the others."""

    def __init__(self, problems: Sequence[Problem], hint: str | None = None) -> None:
        more = len(problems) - 1
        also = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
        super().__init__(f"{problems[0]}{also}", hint)
        self.problems = tuple(problems)


def tensor_table(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of this model holds, in reading order.

    Whether weights are packed follows from quantization_config and expert_dtype.
    Raises ConfigError where FP4 experts do not divide into groups of 32 inputs, and for more
    experts than any file could hold (the largest release has 24,000).
    """
    experts = len(config.all_kinds) * config.n_routed_experts
    if experts > MAX_EXPERTS:
        raise ConfigError(f"config.json means {experts} experts in all, at most {MAX_EXPERTS} do")
    return dict(_tensors(config))


def is_duplicate(name: str) -> bool:
    """True for the copies of embedding and head that released MTP layers carry; not read."""
    stage, _, rest = name.partition(".")[2].partition(".")
    copies = ("emb.tok_emb.weight", "embed.weight", "head.weight")
    return name.startswith("mtp.") and stage.isdigit() and rest in copies


def check(table: Mapping[str, TensorSpec], found: Mapping[str, Found]) -> list[Problem]:
    """What is wrong with the names, types and shapes of a set of tensors; empty if nothing."""
    missing = [name for name in table if name not in found]
    drafts = any(name.startswith("mtp.") for name in table)
    extra = [
        name
        for name in found
        if name not in table
        and not is_duplicate(name)
        # Drafting stages, of whatever kind, that the config leaves out.
        and (drafts or not name.startswith("mtp."))
    ]
    problems: list[Problem] = []
    for name in extra:
        # With everything misnamed a full search would take minutes; the first names tell enough.
        near = difflib.get_close_matches(name, itertools.islice(missing, 500), 1, 0.8)
        if len(problems) > 20:
            near = []
        guess = f"; did you mean {near[0]}?" if near else ""
        problems.append(Problem(found[name].file, name, f"is not part of this model{guess}"))
        missing = [other for other in missing if other not in near]
    files = {tensor.file for tensor in found.values()}
    home = next(iter(files)) if len(files) == 1 else "checkpoint"
    problems += [Problem(home, name, "is missing") for name in missing]
    for name, spec in table.items():
        if name in found:
            problems += _misfits(name, spec, found[name])
    return problems


def _misfits(name: str, spec: TensorSpec, found: Found) -> Iterator[Problem]:
    if found.dtype not in spec.storage:
        wanted = " or ".join(spec.storage)
        yield Problem(found.file, name, f"is stored as {found.dtype}, config.json means {wanted}")
    elif found.shape != spec.shape:
        shapes = f"{list(found.shape)}, config.json means {list(spec.shape)}"
        yield Problem(found.file, name, f"has shape {shapes}")


def _tensors(c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    width, streams = c.hidden_size, c.hc_mult
    yield "embed.weight", _matrix(c.vocab_size, width)
    yield "norm.weight", _matrix(width)
    yield "head.weight", _matrix(c.vocab_size, width)
    yield from _hyper("hc_head", streams, 1, c)
    for layer, kind in enumerate(c.layer_kinds):
        yield from _block(f"layers.{layer}", kind, c.is_hash_layer(layer), c)
    for stage in range(c.num_nextn_predict_layers):
        name = f"mtp.{stage}"
        for projection in ("e_proj", "h_proj"):
            yield from _linear(f"{name}.{projection}", width, width, Role.LINEAR, c)
        for norm in ("enorm", "hnorm", "norm"):
            yield f"{name}.{norm}.weight", _matrix(width)
        yield from _hyper(f"{name}.hc_head", streams, 1, c)
        yield from _block(name, LayerKind.SLIDING, False, c)


def _block(
    name: str, kind: LayerKind, hashed: bool, c: ModelConfig
) -> Iterator[tuple[str, TensorSpec]]:
    for part in ("attn", "ffn"):
        yield f"{name}.{part}_norm.weight", _matrix(c.hidden_size)
        yield from _hyper(f"{name}.hc_{part}", (2 + c.hc_mult) * c.hc_mult, 3, c)
    yield from _attention(f"{name}.attn", kind, c)
    yield from _experts(f"{name}.ffn", hashed, c)


def _attention(name: str, kind: LayerKind, c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    width, heads, latent = c.hidden_size, c.num_attention_heads, c.q_lora_rank
    all_heads, grouped = heads * c.head_dim, c.o_groups * c.o_lora_rank
    yield f"{name}.attn_sink", _small(heads)
    yield from _linear(f"{name}.wq_a", latent, width, Role.LINEAR, c)
    yield f"{name}.q_norm.weight", _matrix(latent)
    yield from _linear(f"{name}.wq_b", all_heads, latent, Role.LINEAR, c)
    yield from _linear(f"{name}.wkv", c.head_dim, width, Role.LINEAR, c)
    yield f"{name}.kv_norm.weight", _matrix(c.head_dim)
    yield from _linear(f"{name}.wo_a", grouped, all_heads // c.o_groups, Role.LINEAR, c)
    yield from _linear(f"{name}.wo_b", width, grouped, Role.LINEAR, c)
    if kind is not LayerKind.SLIDING:
        yield from _compressor(f"{name}.compressor", kind, c.head_dim, c)
    if kind is LayerKind.CSA:
        indexer = f"{name}.indexer"
        outputs = c.index_n_heads * c.index_head_dim
        yield from _linear(f"{indexer}.wq_b", outputs, latent, Role.LINEAR, c)
        yield f"{indexer}.weights_proj.weight", _matrix(c.index_n_heads, width)
        yield from _compressor(f"{indexer}.compressor", kind, c.index_head_dim, c)


def _compressor(
    name: str, kind: LayerKind, entry: int, c: ModelConfig
) -> Iterator[tuple[str, TensorSpec]]:
    ratio = RATIO_OF_KIND[kind]
    series = entry if ratio == HCA_RATIO else 2 * entry  # CSA: previous and current block
    yield f"{name}.ape", _small(ratio, series)
    yield f"{name}.wkv.weight", _matrix(series, c.hidden_size)
    yield f"{name}.wgate.weight", _matrix(series, c.hidden_size)
    yield f"{name}.norm.weight", _matrix(entry)


def _experts(name: str, hashed: bool, c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    count, width, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    yield f"{name}.gate.weight", _matrix(count, width)
    if hashed:
        shape = (c.vocab_size, c.num_experts_per_tok)
        yield f"{name}.gate.tid2eid", TensorSpec(Role.IDS, shape, IDS, prod(shape))
    else:
        yield f"{name}.gate.bias", _small(count)
    owners = [(f"experts.{number}", Role.EXPERT) for number in range(count)]
    for owner, role in [("shared_experts", Role.LINEAR), *owners]:
        for part, outputs, inputs in (("w1", inner, width), ("w2", width, inner)):
            yield from _linear(f"{name}.{owner}.{part}", outputs, inputs, role, c)
        yield from _linear(f"{name}.{owner}.w3", inner, width, role, c)


def _hyper(name: str, rows: int, scales: int, c: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    yield f"{name}_fn", _small(rows, c.hc_mult * c.hidden_size)
    yield f"{name}_base", _small(rows)
    yield f"{name}_scale", _small(scales)


def _linear(
    name: str, outputs: int, inputs: int, role: Role, c: ModelConfig
) -> Iterator[tuple[str, TensorSpec]]:
    """A weight [outputs, inputs], and its scale where the model is packed."""
    shape, elements = (outputs, inputs), outputs * inputs
    if c.quantization_config is None:
        yield f"{name}.weight", TensorSpec(role, shape, PLAIN, elements)
    elif role is Role.EXPERT and c.expert_dtype == "fp4":
        if inputs % FP4_GROUP:
            raise ConfigError(
                f"{name} has {inputs} inputs, FP4 experts need a multiple of {FP4_GROUP}",
                "change hidden_size or moe_intermediate_size, or keep the weights in bf16",
            )
        yield f"{name}.weight", TensorSpec(role, (outputs, inputs // 2), FP4, elements)
        yield f"{name}.scale", TensorSpec(Role.SCALE, (outputs, inputs // FP4_GROUP), SCALE, 0)
    else:
        blocks = (-(-outputs // FP8_BLOCK), -(-inputs // FP8_BLOCK))
        yield f"{name}.weight", TensorSpec(role, shape, FP8, elements)
        yield f"{name}.scale", TensorSpec(Role.SCALE, blocks, SCALE, 0)


def _matrix(*shape: int) -> TensorSpec:
    return TensorSpec(Role.MATRIX, shape, PLAIN, prod(shape))


def _small(*shape: int) -> TensorSpec:
    # Some tools cast a whole checkpoint to bf16; the values are still usable.
    return TensorSpec(Role.SMALL, shape, ("F32", "BF16"), prod(shape))
