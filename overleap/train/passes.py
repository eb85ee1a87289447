"""One pass: rows become packed documents, go through the model, and come back as losses.

Not the loop (loop.py), nor the formulas (losses.py). Read next: losses.py, ops.py.
"""

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from overleap import devices
from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.checkpoint.table import Role, tensor_table
from overleap.config import LayerKind
from overleap.kernels.spans import Spans
from overleap.kernels.torch.quant import dequantize, fp4_weight, fp8_weight
from overleap.model.block import Block
from overleap.model.draft import MTPBlock
from overleap.model.indexer import Indexer, IndexerTap
from overleap.model.layers import Linear
from overleap.model.transformer import Transformer
from overleap.train import losses
from overleap.train.data import Row
from overleap.train.initial import initial_weights
from overleap.train.kept import read_weights
from overleap.train.losses import Asked
from overleap.train.ops import Seen, TrainingOps
from overleap.train.recipe import Recipe, Stage
from overleap.train.shards import PAD_ID
from overleap.train.spread import Spread

FAR_BITS = 20  # questions are moved up to a million tokens further from their facts


def best_device() -> torch.device:
    """What devices.find takes for `auto`; of several, each rank has its own."""
    device = devices.find()
    if device.type == "cpu":
        return device
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device(device.type, rank % devices.count(devices.kind_of(device)))


def best_dtype() -> torch.dtype:
    """bf16 where this machine multiplies it, else float32."""
    return torch.bfloat16 if devices.multiplies_bf16(devices.find()) else torch.float32


def trainable(recipe: Recipe) -> dict[str, Tensor]:
    """First values of every tensor: of the base model, or drawn."""
    if recipe.base:
        return read_weights(Path(recipe.base), recipe.config)
    return initial_weights(recipe.config, recipe.seed)


def peak_flops(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of one large product on this rank: what MFU is a share of."""
    a = torch.randn(size, size, dtype=dtype, device=best_device())
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@dataclass(frozen=True)
class Packed:
    """Rows of one pass, flat.

    ids_T, next_T  i64 [T]  tokens and the tokens after them (padding where there is none)
    real_T         bool [T] where a token is no padding
    learn_T        bool [T] where the next token is learned
    counts         documents' lengths
    asked          answers, all of them; `seen` those of which it is known where they stand
    """

    ids_T: Tensor
    next_T: Tensor
    real_T: Tensor
    learn_T: Tensor
    counts: tuple[int, ...]
    at_N: Tensor
    seen: Asked


def packed(rows: list[Row], device: torch.device | None = None) -> Packed:
    """Rows one after another; the CPU unless a device is named."""
    ids = torch.tensor([i for row in rows for i in row.ids])
    counts = tuple(n for row in rows for n in row.counts)
    learn = torch.tensor([i for row in rows for i in row.learn])
    ends = torch.tensor(counts).cumsum(0)
    following = F.pad(ids[1:], (0, 1), value=PAD_ID)
    following[ends - 1] = PAD_ID
    at, gold, offset = [], [], 0
    for row in rows:
        at += [offset + i for i in row.answers]
        gold += [offset + i if i >= 0 else -1 for i in row.gold]
        offset += len(row.ids)
    at_N, gold_N = torch.tensor(at, dtype=torch.int64), torch.tensor(gold, dtype=torch.int64)
    known = gold_N >= 0
    document = torch.searchsorted(ends, at_N[known], right=True)
    begins = ends - torch.tensor(counts)
    where = (at_N[known], gold_N[known], begins[document], ends[document])
    seen = Asked(*(t.to(device) for t in where))
    ids, following, learn = ids.to(device), following.to(device), learn.to(device)
    return Packed(ids, following, ids != PAD_ID, learn, counts, at_N.to(device), seen)


class Pass:
    """A model with the ops that it is trained by."""

    def __init__(
        self,
        recipe: Recipe,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        spread: Spread | None = None,
    ) -> None:
        self.recipe, config = recipe, recipe.config
        self.ops = TrainingOps(
            key_width=config.index_head_dim,
            rope=config.qk_rope_head_dim,
            compiled=recipe.compiled,
            dtype=dtype,
        )
        self.device = best_device()
        self.model = Transformer(config, self.ops)
        self.model.assign(weights)
        self.model.to(self.device)
        self.ops.spread = spread
        for name, p in self.model.named_parameters():
            if spread is not None and spread.is_elsewhere(name):
                p.data = p.new_empty(0)
            wanted = p.is_floating_point() and p.numel() and not name.endswith("gate.bias")
            p.requires_grad_(bool(wanted))
        self._roles = {
            name: spec.role
            for name, spec in tensor_table(config).items()
            if spec.role in (Role.LINEAR, Role.EXPERT)
        }
        self.ops.packed = frozenset(
            id(module.weight)
            for name, module in self.model.named_modules()
            if isinstance(module, Linear) and not module.exact and f"{name}.weight" in self._roles
        )

    def losses(
        self, stage: Stage, rows: list[Row], seed: str
    ) -> tuple[Tensor, dict[str, float], list[tuple[Tensor, Tensor]]]:
        """The weighted sum of all losses of one pass, its parts, and the experts' loads."""
        recipe, model, ops = self.recipe, self.model, self.ops
        draw = torch.Generator().manual_seed(random.Random(seed).randrange(2**31))
        ops.rounding = stage.rounding
        for module in model.modules():
            if isinstance(module, Indexer):
                module.topk = self._topk(stage)
        step = packed(rows, self.device)
        cache, spans = self._room(step.counts)
        streams, taps, seen = self._trunk(step.ids_T, cache, spans)
        picked = _some(step.learn_T.cpu(), recipe.language_rows, draw).to(self.device)
        asked = len(step.at_N)
        wanted = torch.cat((step.at_N, picked))
        nll = losses.token_losses(model, streams, wanted, step.next_T[wanted])
        language = nll[asked:].mean() if len(picked) else nll.new_zeros(())
        total = stage.language * language
        record = {"language": language}
        if asked:
            record["answer"] = nll[:asked].mean()
            record["certain"] = (nll[:asked] < 0.693).float().mean()
            total = total + record["answer"]
        attention, parts = self._attention_losses(stage, step, taps, seen, spans, draw)
        total, record = total + attention, record | parts
        total = total + recipe.balance * losses.balance_loss(seen, ops.tiles(spans), step.real_T)
        loads = losses.load_of(seen, step.real_T)
        if stage.mtp and model.mtp:
            draft, seen = self._draft(step, streams, picked, cache, spans)
            total = total + stage.mtp * draft
            uneven = losses.balance_loss(seen, ops.tiles(spans), step.real_T)
            total = total + recipe.balance * uneven
            loads += losses.load_of(seen, step.real_T)
            record["mtp"] = draft
        return total, {n: float(value.detach()) for n, value in record.items()}, loads

    def _topk(self, stage: Stage) -> int:
        """Entries that a token attends to at most."""
        return self.recipe.config.index_topk if stage.sparse else 1 << 30

    def _trunk(
        self, ids_T: Tensor, cache: Cache, spans: Spans
    ) -> tuple[Tensor, list[IndexerTap], Seen]:
        """Streams after the last layer. A long pass keeps each layer's input only."""
        model, ops = self.model, self.ops
        ops.take()
        taps: list[IndexerTap] = []
        x_TMD = model.embed(ids_T)[:, None].expand(-1, self.recipe.config.hc_mult, -1)
        for block, layer in zip(model.layers, cache.layers, strict=False):
            if len(ids_T) > self.recipe.kept_tokens:
                x_TMD = checkpoint(block, x_TMD, ids_T, layer, spans, taps, use_reentrant=False)
            else:
                x_TMD = block(x_TMD, ids_T, layer, spans, taps)
        self._keys = [ops.rows_of(tap.keys) for tap in taps]
        return x_TMD, list(taps), ops.take()

    def _attention_losses(
        self,
        stage: Stage,
        step: Packed,
        taps: list[IndexerTap],
        seen: Seen,
        spans: Spans,
        draw: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What CSA layers learn of where to look: retrieval, guidance, distillation."""
        recipe, kinds = self.recipe, self.recipe.config.layer_kinds
        total, record = torch.zeros((), device=self.device), dict[str, Tensor]()
        csa = [number for number, kind in enumerate(kinds) if kind is LayerKind.CSA]
        known = len(step.seen.at_N)
        far = _distances(known, draw).to(self.device)
        real = step.real_T.nonzero()[:, 0]
        some = torch.randint(len(real), (recipe.distilled,), generator=draw).to(self.device)
        rows = torch.cat((step.at_N, real[some]))
        tiles, k = self.ops.tiles(spans), self._topk(stage)
        for layer, tap, keys, sight in zip(csa, taps, self._keys, seen.attention, strict=True):
            block = self.model.layers[layer]
            assert isinstance(block, Block)
            frequency = block.frequency.to(self.device)
            index = losses.Index(tap.index_q, tap.index_weight, keys)
            distilled = losses.distillation_loss(sight, index, rows, tiles, k)
            total = total + recipe.distillation * distilled / len(csa)
            record[f"kl{layer}"] = distilled
            if known:
                found, top = losses.retrieval_loss(sight, step.seen, frequency, far)
                guided, best = losses.guided_index_loss(index, step.seen, frequency, far)
                total = total + (stage.retrieval * found + recipe.index * guided) / len(csa)
                record |= {f"attend{layer}": found, f"attend{layer}_top": top}
                record |= {f"index{layer}": guided, f"index{layer}_top": best}
        return total, record

    def _draft(
        self, step: Packed, streams: Tensor, rows: Tensor, cache: Cache, spans: Spans
    ) -> tuple[Tensor, Seen]:
        """Cross-entropy of the token after next (section 3.8), at the rows of the main loss.

        Of what the main loss learns only, answers included: not of what a user says.
        """
        learned = step.learn_T.clone()
        learned[step.at_N] = True
        after = F.pad(step.next_T.masked_fill(~learned, PAD_ID)[1:], (0, 1), value=PAD_ID)
        ends = torch.tensor(spans.offset[1:], device=self.device) - 1
        after[ends] = PAD_ID
        block, layer = self.model.mtp[0], cache.layers[self.recipe.config.num_hidden_layers]
        assert isinstance(block, MTPBlock)

        def hidden(x_TMD: Tensor) -> Tensor:
            next_TD = self.model.embed(step.next_T)
            out, _ = block.draft(x_TMD, next_TD, step.next_T, layer, spans)
            return out[rows]

        if len(step.ids_T) > self.recipe.kept_tokens:
            drafted: Tensor = checkpoint(hidden, streams, use_reentrant=False)
        else:
            drafted = hidden(streams)
        seen, wanted = self.ops.take(), after[rows]
        nll = losses.head_losses(self.model, lambda x: x, drafted, wanted)
        return nll.sum() / (wanted != PAD_ID).sum().clamp_min(1), seen

    def _room(self, counts: tuple[int, ...]) -> tuple[Cache, Spans]:
        """A cache of the right shape; the training ops write nothing into it."""
        pages = sum(counts) // 128
        wide, device = CacheFormat.WIDE, self.device
        cache = Cache(self.recipe.config, pages=pages, slots=1, format=wide, device=device)
        numbers = iter(range(pages))
        parts = [(0, n, 0, [next(numbers) for _ in range(n // 128)]) for n in counts]
        return cache, Spans.of(parts, cache.device)

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Inside, linears hold what FP8 and experts what FP4 keeps of them (straight-through)."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self._roles and p.numel():  # the others' experts are not here
                    kept.append((p, p.detach().clone()))
                    pack = fp4_weight if self._roles[name] is Role.EXPERT else fp8_weight
                    p.copy_(dequantize(pack(p.detach())))
        try:
            yield
        finally:
            with torch.no_grad():
                for rounded, master in kept:
                    rounded.copy_(master)


def _some(learn_T: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """A share of the positions that are learned, drawn evenly, in order."""
    places = learn_T.nonzero()[:, 0]
    count = round(len(places) * share)
    return places[torch.randperm(len(places), generator=draw)[:count]].sort().values


def _distances(count: int, draw: torch.Generator) -> Tensor:
    """Extra distance of every question: none for half of them, else up to a million tokens."""
    far = torch.exp2(torch.rand(count, generator=draw) * FAR_BITS)
    return torch.where(torch.rand(count, generator=draw) < 0.5, 0.0, far).floor()
