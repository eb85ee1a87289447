"""The weights of a model as the planner counts them: how many, in how many bytes, used how often.

One list of matrices gives parameters, bytes and the FLOPs of linears alike (flops.py). It is held
against the checkpoint's own table of tensors by the tests. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from overleap.config import RATIO_OF_KIND, LayerKind, ModelConfig

FP8_BLOCK = 128  # outputs x inputs that share a scale byte
FP4_GROUP = 32  # inputs that share a scale byte


class Part(StrEnum):
    """What a weight belongs to."""

    EXPERTS = "routed experts"
    SHARED = "shared experts"
    ATTENTION = "attention"
    COMPRESSOR = "compressors"
    INDEXER = "indexers"
    ROUTER = "routers"
    STREAMS = "stream mixing"
    NORMS = "norms"
    EMBEDDING = "embedding"
    HEAD = "head"


class Role(StrEnum):
    """How a weight is stored, as in the checkpoint's table."""

    LINEAR = "linear"
    EXPERT = "expert"
    MATRIX = "matrix"
    SMALL = "small"
    IDS = "ids"


class Precision(StrEnum):
    """In what weights are held. `release`: as config.json says, the others: all of them so."""

    RELEASE = "release"  # FP4 experts, FP8 linears, BF16 matrices in the instruct releases
    FP8 = "fp8"  # experts and linears FP8 with 128 x 128 scales (the -Base releases)
    INT8 = "int8"  # W8A8: a byte a weight, a float32 scale an output
    BF16 = "bf16"
    F32 = "f32"


@dataclass(frozen=True)
class Matrix:
    """Weights of one shape.

    shape   (outputs, inputs), or (length,) of a vector
    count   how many there are
    used    how many of them a token passes through
    main    False for those of MTP blocks
    """

    part: Part
    role: Role
    shape: tuple[int, ...]
    count: int
    used: int
    main: bool

    @property
    def elements(self) -> int:
        """Weights, all `count` of them; ids of a routing table are counted as bytes only."""
        return 0 if self.role is Role.IDS else self.count * self._each

    @property
    def used_elements(self) -> int:
        """Weights that a token is multiplied with."""
        return 0 if self.role is Role.IDS else self.used * self._each

    @property
    def _each(self) -> int:
        outputs, *inputs = self.shape
        return outputs * (inputs[0] if inputs else 1)

    def nbytes(self, config: ModelConfig, precision: Precision) -> int:
        """Bytes of one of them, its scales included."""
        outputs, inputs = (*self.shape, 1)[:2]
        if self.role is Role.IDS:
            return 4 * self._each
        if precision is Precision.F32 or self.role is Role.SMALL:
            return 4 * self._each
        packed = config.quantization_config is not None or precision is not Precision.RELEASE
        if precision is Precision.RELEASE and not packed and config.torch_dtype == "float32":
            return 4 * self._each
        linear = self.role in (Role.LINEAR, Role.EXPERT)
        if not linear or not packed or precision is Precision.BF16:
            return 2 * self._each
        if precision is Precision.INT8:
            return self._each + 4 * outputs
        fp4 = self.role is Role.EXPERT and config.expert_dtype == "fp4"
        if precision is Precision.RELEASE and fp4:
            return self._each // 2 + outputs * (inputs // FP4_GROUP)
        return self._each + -(-outputs // FP8_BLOCK) * -(-inputs // FP8_BLOCK)


def matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """Every weight of the model, MTP blocks included, in reading order."""
    return tuple(_matrices(config))


def total(found: tuple[Matrix, ...]) -> int:
    """Parameters of the main model."""
    return sum(each.elements for each in found if each.main)


def active(found: tuple[Matrix, ...]) -> int:
    """Parameters a token is multiplied with; the embedding is looked up, not multiplied."""
    return sum(
        each.used_elements for each in found if each.main and each.part is not Part.EMBEDDING
    )


def weight_bytes(
    config: ModelConfig, precision: Precision = Precision.RELEASE, *, experts: bool | None = None
) -> int:
    """Bytes of all weights, MTP blocks included.

    experts  True: of the routed experts alone, False: of all the others, None: of both
    """
    return sum(
        each.count * each.nbytes(config, precision)
        for each in _matrices(config)
        if experts is None or experts == (each.part is Part.EXPERTS)
    )


@cache
def expert_bytes(config: ModelConfig, precision: Precision = Precision.RELEASE) -> int:
    """Bytes of one routed expert: 12.75 MiB for V4-Flash as it was released."""
    blocks = len(config.all_kinds)
    return weight_bytes(config, precision, experts=True) // (blocks * config.n_routed_experts)


def _matrices(c: ModelConfig) -> Iterator[Matrix]:
    yield Matrix(Part.EMBEDDING, Role.MATRIX, (c.vocab_size, c.hidden_size), 1, 0, True)
    yield Matrix(Part.NORMS, Role.MATRIX, (c.hidden_size,), 1, 1, True)
    yield Matrix(Part.HEAD, Role.MATRIX, (c.vocab_size, c.hidden_size), 1, 1, True)
    yield from _mixing(c, c.hc_mult, 1, True)
    for layer, kind in enumerate(c.layer_kinds):
        yield from _layer(c, kind, c.is_hash_layer(layer), True)
    for _ in range(c.num_nextn_predict_layers):
        square = (c.hidden_size, c.hidden_size)
        yield Matrix(Part.ATTENTION, Role.LINEAR, square, 2, 2, False)
        yield Matrix(Part.NORMS, Role.MATRIX, (c.hidden_size,), 3, 3, False)
        yield from _mixing(c, c.hc_mult, 1, False)
        yield from _layer(c, LayerKind.SLIDING, False, False)


def _mixing(c: ModelConfig, rows: int, scales: int, main: bool) -> Iterator[Matrix]:
    shape = (rows, c.hc_mult * c.hidden_size)
    yield Matrix(Part.STREAMS, Role.SMALL, shape, 1, 1, main)
    yield Matrix(Part.STREAMS, Role.SMALL, (rows,), 1, 1, main)
    yield Matrix(Part.STREAMS, Role.SMALL, (scales,), 1, 1, main)


def _layer(c: ModelConfig, kind: LayerKind, hashed: bool, main: bool) -> Iterator[Matrix]:
    width, latent, heads = c.hidden_size, c.q_lora_rank, c.num_attention_heads
    wide, grouped = heads * c.head_dim, c.o_groups * c.o_lora_rank

    def one(part: Part, role: Role, *shape: int) -> Matrix:
        return Matrix(part, role, shape, 1, 1, main)

    yield Matrix(Part.NORMS, Role.MATRIX, (width,), 2, 2, main)
    for _ in ("attention", "experts"):
        yield from _mixing(c, (2 + c.hc_mult) * c.hc_mult, 3, main)
    yield one(Part.ATTENTION, Role.SMALL, heads)
    yield one(Part.NORMS, Role.MATRIX, latent)
    yield one(Part.NORMS, Role.MATRIX, c.head_dim)
    for shape in ((latent, width), (wide, latent), (c.head_dim, width), (width, grouped)):
        yield one(Part.ATTENTION, Role.LINEAR, *shape)
    yield one(Part.ATTENTION, Role.LINEAR, grouped, wide // c.o_groups)
    if kind is not LayerKind.SLIDING:
        yield from _compressor(c, kind, c.head_dim, Part.COMPRESSOR, main)
    if kind is LayerKind.CSA:
        yield one(Part.INDEXER, Role.LINEAR, c.index_n_heads * c.index_head_dim, latent)
        yield one(Part.INDEXER, Role.MATRIX, c.index_n_heads, width)
        yield from _compressor(c, kind, c.index_head_dim, Part.INDEXER, main)
    count, inner, chosen = c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok
    yield one(Part.ROUTER, Role.MATRIX, count, width)
    if hashed:
        yield one(Part.ROUTER, Role.IDS, c.vocab_size, chosen)
    else:
        yield one(Part.ROUTER, Role.SMALL, count)
    for shape, each in (((inner, width), 2), ((width, inner), 1)):
        yield Matrix(Part.SHARED, Role.LINEAR, shape, each, each, main)
        yield Matrix(Part.EXPERTS, Role.EXPERT, shape, each * count, each * chosen, main)


def _compressor(
    c: ModelConfig, kind: LayerKind, entry: int, part: Part, main: bool
) -> Iterator[Matrix]:
    series = 2 * entry if kind is LayerKind.CSA else entry  # CSA: previous and current block
    yield Matrix(part, Role.SMALL, (RATIO_OF_KIND[kind], series), 1, 1, main)
    yield Matrix(part, Role.MATRIX, (series, c.hidden_size), 2, 2, main)
    yield Matrix(part, Role.MATRIX, (entry,), 1, 1, main)
