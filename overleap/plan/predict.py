"""The best times a machine can reach, from bytes moved and operations done; what binds them.

Bounds, not forecasts: every resource is taken at its full rate, all overlap, nothing speculates.
What a machine really does comes from records (calibrate.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from overleap.cache import layout
from overleap.config import CSA_RATIO, HCA_RATIO, LayerKind, ModelConfig
from overleap.plan.chips import Chip
from overleap.plan.flops import Flops, read_flops, token_flops
from overleap.plan.memory import Load, Memory, Split, weights_of
from overleap.plan.weights import Precision

# Types of the operands by how weights are held: dense linears, routed experts.
_DENSE = {
    Precision.RELEASE: "fp8", Precision.FP8: "fp8", Precision.INT8: "int8",
    Precision.BF16: "bf16", Precision.F32: "f32",
}  # fmt: skip


@dataclass(frozen=True)
class Time:
    """Seconds at best.

    by       seconds of every resource that is known
    unknown  resources that count here, whose rate is not known: the time is a bound all the same
    """

    by: Mapping[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """The slowest resource's; None where no rate is known."""
        return max(self.by.values()) if self.by else None

    @property
    def binding(self) -> str | None:
        """Its name."""
        return max(self.by, key=lambda name: self.by[name]) if self.by else None


@dataclass(frozen=True)
class Store:
    """Where experts are that are not on the chip.

    resident  share of the experts on the chip
    ram       share in the host's memory, where it is another one
    disk      share on disk; disk_rate its bytes a second
    """

    resident: float = 1.0
    ram: float = 0.0
    disk: float = 0.0
    disk_rate: float = 7e9


def expert_store(
    found: Memory, chip: Chip, split: Split, ram_bytes: int, disk_rate: float
) -> Store | None:
    """Where a chip's experts go: on the chip, then the host's memory, then disk. None: no room.

    ram_bytes  of the host, for all its chips
    """
    assert chip.memory_bytes is not None
    if found.total <= chip.memory_bytes:
        return Store(disk_rate=disk_rate)
    if found.least > chip.memory_bytes:
        return None
    here = (chip.memory_bytes - found.beside_experts) / found.experts
    ram = min(1 - here, ram_bytes / split.count / found.experts) if chip.has_host else 0.0
    return Store(here, ram, 1 - here - ram, disk_rate)


def decode_time(load: Load, chip: Chip, split: Split, store: Store) -> Time:
    """One step that writes a token for every user, each at the end of the context."""
    users = split.users(load.users)
    one = token_flops(load.config, load.context)
    counted = _per_chip(load.config, _times(one, users), _times(one, load.users), users, split)
    cache = users * step_cache_bytes(load, load.context)
    return _time(load, chip, split, store, counted, (users, load.users), 1, cache)


def prefill_time(
    load: Load, chip: Chip, split: Split, store: Store, chunk: int, texts: int = 1
) -> Time:
    """Reading whole contexts chunk by chunk, one in each of `texts` groups at the same time."""
    tokens = load.context
    steps = -(-tokens // chunk)
    read = read_flops(load.config, 0, tokens)
    counted = _per_chip(load.config, read, _times(read, texts), 1, split)
    each = min(chunk, tokens)
    # A chunk reads at least what one query reads; on average half of what the last one does.
    cache = steps * step_cache_bytes(load, tokens) / 2
    return _time(load, chip, split, store, counted, (each, each * texts), steps, cache)


def step_cache_bytes(load: Load, context: int) -> float:
    """Cache bytes that one query reads: keys scanned, rows attended."""
    config, form = load.config, load.cache_format
    entry = layout.entry_bytes(config.head_dim, config.qk_rope_head_dim, form)
    key = layout.key_bytes(config.index_head_dim, form)
    window = min(config.sliding_window, context)
    chosen = min(config.index_topk, context // CSA_RATIO)
    of = {
        LayerKind.SLIDING: entry * window,
        LayerKind.CSA: entry * (window + chosen) + key * (context // CSA_RATIO),
        LayerKind.HCA: entry * (window + context // HCA_RATIO),
    }
    return sum(of[kind] for kind in config.layer_kinds)


def experts_touched(config: ModelConfig, tokens: int) -> float:
    """Of a layer's experts, how many so many tokens use, if all are equally liked."""
    count, chosen = config.n_routed_experts, config.num_experts_per_tok
    return float(count * (1 - (1 - chosen / count) ** tokens))


def _per_chip(config: ModelConfig, group: Flops, whole: Flops, heads: int, split: Split) -> Flops:
    """What one chip does: its cut of its group's tokens, its experts of everybody's.

    heads  times that logits are made. The head is cut; compressors, routers and stream mixing run
           on every chip of a group.
    """
    tensor = split.tensor
    head = 2 * config.vocab_size * config.hidden_size * heads
    return Flops(
        group.dense / tensor,
        whole.experts / split.count,
        group.wide - head + head / tensor,
        group.core / tensor,
        group.index / tensor,
    )


def _time(
    load: Load,
    chip: Chip,
    split: Split,
    store: Store,
    counted: Flops,
    tokens: tuple[int, int],  # of a step: of the fullest group, of all
    steps: int,
    cache: float,
) -> Time:
    config = load.config
    found, layers = weights_of(config, load.precision), config.num_hidden_layers
    main = layers / (layers + config.num_nextn_predict_layers)  # no speculation: MTP rests
    embedding = config.vocab_size * config.hidden_size * 2 // split.tensor  # looked up, not read
    dense = found.whole + found.cut / split.tensor - embedding
    share = experts_touched(config, tokens[1]) / config.n_routed_experts
    experts = steps * main * found.experts / split.count * share
    by: dict[str, float] = {}
    unknown: list[str] = []

    def take(name: str, amount: float, rate: float | None) -> None:
        if amount <= 0:
            return
        if rate is None:
            unknown.append(name)
        else:
            by[name] = amount / rate

    take("memory bandwidth", steps * dense + experts * store.resident + cache, chip.bandwidth)
    _matmuls(load, chip, counted, by, unknown)
    take("RAM to chip", experts * store.ram, chip.host)
    take("disk", experts * store.disk * split.count, store.disk_rate)  # one for all chips
    if split.count > 1:
        width = config.hidden_size
        own = tokens[1] * steps / split.count
        routed = 3 * width * config.num_experts_per_tok * own  # FP8 out, BF16 back
        summed = 4 * width * tokens[0] * steps * (split.tensor - 1) / split.tensor
        take("link between chips", layers * (routed + summed), chip.link)
    return Time(by, tuple(unknown))


def _matmuls(
    load: Load, chip: Chip, counted: Flops, by: dict[str, float], unknown: list[str]
) -> None:
    """The time of all operations, each at the rate of its type or the next wider one."""
    dense = _dense(load)
    wide = "f32" if dense == "f32" else "bf16"
    wanted = [
        (counted.dense + counted.experts, dense),
        (counted.wide + counted.core, wide),
        (counted.index, "fp4"),
    ]
    seconds = 0.0
    for amount, dtype in wanted:
        rate = chip.rate(dtype)
        if rate is None:
            unknown.append(f"{dtype} matmul")
        else:
            seconds += amount / rate
    if seconds:
        by["matmul"] = seconds


def _dense(load: Load) -> str:
    """Type of the operands of the dense linears; a release that is not packed has its own."""
    if load.precision is Precision.RELEASE and load.config.quantization_config is None:
        return "f32" if load.config.torch_dtype == "float32" else "bf16"
    return _DENSE[load.precision]


def _times(flops: Flops, count: int) -> Flops:
    return Flops(
        flops.dense * count,
        flops.experts * count,
        flops.wide * count,
        flops.core * count,
        flops.index * count,
    )
