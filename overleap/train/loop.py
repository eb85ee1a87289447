"""The training loop: samples in, weights out, a log line a step, a checkpoint every few minutes.

Ranks are processes of one thread each: on a shared machine they wait for each other once a step,
not once an op. Not here: sizes and schedule (mini.py), recall over real text (recall.py).
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.checkpoint.table import Role, tensor_table
from overleap.config import LayerKind, ModelConfig
from overleap.kernels.spec import Spans
from overleap.kernels.torch.quant import dequantize, fp4_weight, fp8_weight
from overleap.model.indexer import Indexer, IndexerTap
from overleap.model.transformer import Batch, Output, Transformer
from overleap.train import losses
from overleap.train.data import Sampler, corpus
from overleap.train.initial import initial_weights
from overleap.train.losses import Asked
from overleap.train.muon import Optimizer
from overleap.train.ops import TrainingOps


@dataclass(frozen=True)
class Stage:
    """A part of a run with samples of one shape. A rank's step holds `batch` samples.

    facts, turns  planted and asked in each sample
    sparse        attend the released index_topk entries only; otherwise all of them
    rounding      weights and cache rows hold what their released forms keep of them
    retrieval     weight of the loss that points attention at the fact; mtp: of the draft block's
    rate          factor of the recipe's rates
    share         how often a fact repeats a word of another one: drawn from this range
    """

    steps: int
    length: int
    batch: int
    facts: int
    turns: int
    sparse: bool = False
    rounding: bool = False
    retrieval: float = 1.0
    mtp: float = 0.0
    rate: float = 1.0
    share: tuple[float, float] = (0.3, 1.0)


@dataclass(frozen=True)
class Recipe:
    """All that decides a run. Rates are peak values of a warm-up, constant, linear-decay shape."""

    config: ModelConfig
    stages: tuple[Stage, ...]
    seed: int
    ranks: int = 2
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup_steps: int = 30
    decay_share: float = 0.35
    final_share: float = 0.05
    language: float = 0.2
    language_rows: float = 0.25
    index: float = 1.0
    distillation: float = 0.3
    balance: float = 1e-3
    bias_speed: float = 1e-3
    clip: float = 1.0
    checkpoint_s: float = 240.0
    compiled: bool = True

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate_at(self, step: int) -> float:
        """Factor of the peak rates."""
        done = step / max(self.steps, 1)
        rise = min(1.0, (step + 1) / self.warmup_steps)
        if done < 1 - self.decay_share:
            return rise
        left = (1 - done) / self.decay_share
        return rise * (self.final_share + (1 - self.final_share) * left)


def run(recipe: Recipe, folder: Path, tokenizer: Path) -> None:
    """Train (or continue) in `folder`: log.jsonl, checkpoint.safetensors, at the end too."""
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.ranks == 1:
        _rank(0, recipe, folder, tokenizer, None)
        return
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    spawn(_rank, (recipe, folder, tokenizer, meeting), nprocs=recipe.ranks, join=True)


def _rank(rank: int, recipe: Recipe, folder: Path, tokenizer: Path, meeting: Path | None) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one function serves many shapes, each compiled once
    if meeting is not None:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=recipe.ranks
        )
    trainer = Trainer(recipe, folder, Tokenizer.from_file(str(tokenizer)), rank)
    trainer.run()
    if meeting is not None:
        dist.destroy_process_group()


class Trainer:
    """One rank: model, optimiser, samples."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: Tokenizer, rank: int) -> None:
        self.recipe, self.folder, self.rank = recipe, folder, rank
        config = recipe.config
        self.ops = TrainingOps(
            key_width=config.index_head_dim,
            rope=config.qk_rope_head_dim,
            compiled=recipe.compiled,
        )
        self.model = Transformer(config, self.ops)
        self.model.assign(initial_weights(config, recipe.seed))
        for p in self.model.parameters():
            p.requires_grad_(p.is_floating_point())
        for name, p in self.model.named_parameters():
            if name.endswith("gate.bias"):
                p.requires_grad_(False)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = Optimizer(named, self.ops)
        self.sampler = Sampler(tokenizer, corpus()[0], recipe.seed)
        self._roles = {name: spec.role for name, spec in tensor_table(config).items()}
        self.step = 0
        self.checkpoint = folder / "checkpoint.safetensors"
        if self.checkpoint.exists():
            self._load()

    def run(self) -> None:
        """All steps that are left."""
        began = saved = time.monotonic()
        first, tokens = self.step, 0
        while self.step < self.recipe.steps:
            stage = self.recipe.stage_at(self.step)
            record = self.one(stage)
            tokens += stage.batch * stage.length * self.recipe.ranks
            self.step += 1
            seconds = time.monotonic() - began
            if self.rank == 0:
                left = (self.recipe.steps - self.step) * seconds / (self.step - first)
                record |= {
                    "tokens_per_s": round(tokens / seconds),
                    "minutes": round(seconds / 60, 1),
                }
                record |= {"minutes_left": round(left / 60, 1)}
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(record) + "\n")
                if self.step % 10 == 1:
                    print(json.dumps(record), flush=True)
                if time.monotonic() - saved > self.recipe.checkpoint_s:
                    self.save()
                    saved = time.monotonic()
        if self.rank == 0:
            self.save()

    def one(self, stage: Stage) -> dict[str, float]:
        """One step; returns the figures of this rank."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}/{self.step}/{self.rank}")
        torch.manual_seed(rng.randrange(2**31))
        self.sampler.reseed(rng.randrange(2**31))
        self._set(stage)
        self.optimizer.zero_grad()
        with self._stored() if stage.rounding else nullcontext():
            total, record = self.loss(stage)
            total.backward()
        norm = self._share_gradients()
        rate = recipe.rate_at(self.step) * stage.rate
        if math.isfinite(norm):
            self.optimizer.step(recipe.matrix_rate * rate, recipe.other_rate * rate)
        return {"step": self.step, "length": stage.length} | record | {"norm": round(norm, 3)}

    def loss(self, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of all losses over one rank's batch, and its parts."""
        recipe, model = self.recipe, self.model
        config = recipe.config
        length, sequences = stage.length, stage.batch
        ids, asked = self._samples(stage)
        rows, targets, answers = self._rows(ids, asked)
        batch, cache = self._batch(ids, rows)
        taps: list[IndexerTap] = []
        out = model(batch, cache, taps)
        seen = self.ops.take()
        nll = F.cross_entropy(out.logits, targets, reduction="none")
        right = (out.logits[:answers].argmax(-1) == targets[:answers]).float().mean()
        answer, language = nll[:answers].mean(), nll[answers:].mean()
        total = answer + recipe.language * language
        record = {"answer": answer, "right": right, "language": language}
        csa = [i for i, kind in enumerate(config.layer_kinds) if kind is LayerKind.CSA]
        distance = _distances(len(asked.at_N))
        picked = torch.cat((asked.at_N, torch.randint(sequences * length, (128,))))
        for layer, tap, sight in zip(csa, taps, seen.attention, strict=True):
            frequency = model.layers[layer].frequency
            assert isinstance(frequency, Tensor)
            found, top = losses.retrieval_loss(sight, asked, frequency, distance)
            keys = tap.keys.rows.view(-1, config.index_head_dim)[: sequences * length // 4]
            index = losses.Index(tap.index_q, tap.index_weight, keys)
            guided, best = losses.guided_index_loss(index, asked, sequences, frequency, distance)
            distilled = losses.distillation_loss(sight, index, picked, length)
            total = total + (stage.retrieval * found) / len(csa)
            total = total + (recipe.index * guided + recipe.distillation * distilled) / len(csa)
            record |= {f"attend{layer}": found, f"attend{layer}_top": top}
            record |= {f"index{layer}": guided, f"index{layer}_top": best, f"kl{layer}": distilled}
        total = total + recipe.balance * losses.balance_loss(seen, length)
        losses.move_biases(seen, recipe.bias_speed)
        if stage.mtp:
            draft = self._draft_loss(out, ids, cache, batch.spans)
            total = total + stage.mtp * draft
            record["mtp"] = draft
        return total, {name: round(float(value.detach()), 4) for name, value in record.items()}

    def _set(self, stage: Stage) -> None:
        """Dense or sparse, rounded or not."""
        self.ops.rounding = stage.rounding
        for module in self.model.modules():
            if isinstance(module, Indexer):
                module.topk = self.recipe.config.index_topk if stage.sparse else 1 << 30

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """Inside, linears hold what FP8 and experts what FP4 keeps of them (straight-through)."""
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                role = self._roles[name]
                if role in (Role.LINEAR, Role.EXPERT):
                    kept.append((p, p.detach().clone()))
                    pack = fp8_weight if role is Role.LINEAR else fp4_weight
                    p.copy_(dequantize(pack(p.detach())))
        yield
        with torch.no_grad():
            for stored, master in kept:
                stored.copy_(master)

    def _samples(self, stage: Stage) -> tuple[Tensor, Asked]:
        ids = torch.full((stage.batch, stage.length), 2)
        at, gold = [], []
        for b in range(stage.batch):
            sample = self.sampler.draw(stage.length, stage.facts, stage.turns, stage.share)
            ids[b, : len(sample.ids)] = torch.tensor(sample.ids)
            at += [b * stage.length + i for i in sample.answers]
            gold += [b * stage.length + i for i in sample.gold]
        return ids, Asked(torch.tensor(at), torch.tensor(gold), stage.length)

    def _rows(self, ids: Tensor, asked: Asked) -> tuple[Tensor, Tensor, int]:
        """Packed rows whose logits count: the answers, then what ends them and some of the text."""
        following = F.pad(ids[:, 1:], (0, 1), value=2).flatten()
        usable = (following != 2).float()
        usable[asked.at_N] = 0
        count = int(usable.sum() * self.recipe.language_rows)
        some = torch.multinomial(usable, count)
        rows = torch.cat((asked.at_N, asked.at_N + 1, some))
        return rows, following[rows], len(asked.at_N)

    def _batch(self, ids: Tensor, rows: Tensor) -> tuple[Batch, Cache]:
        sequences, length = ids.shape
        pages = sequences * length // 128
        cache = Cache(self.recipe.config, pages=pages, slots=sequences, format=CacheFormat.WIDE)
        opened = [cache.open() for _ in range(sequences)]
        for sequence in opened:
            cache.reserve(sequence, length)
        spans = Spans.of([(0, length, s.slot, s.pages) for s in opened], cache.device)
        return Batch(ids.flatten(), spans, rows, tuple(opened)), cache

    def _draft_loss(self, out: Output, ids: Tensor, cache: Cache, spans: Spans) -> Tensor:
        following = F.pad(ids[:, 1:], (0, 1), value=2).flatten()
        after = F.pad(ids[:, 2:], (0, 2), value=2).flatten()
        logits, _ = self.model.draft(out.streams.detach(), following, cache, spans)
        self.ops.take()
        return F.cross_entropy(logits, after, ignore_index=2)

    def _share_gradients(self) -> float:
        """Average over ranks, clip, and return the norm before clipping."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if dist.is_initialized():
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            flat /= self.recipe.ranks
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))
            # Every rank moved its biases by its own load; the mean keeps them equal.
            for name, p in self.model.named_parameters():
                if name.endswith("gate.bias"):
                    dist.all_reduce(p.data)
                    p.data /= self.recipe.ranks
        norm = float(torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros(()))))
        if norm > self.recipe.clip:
            for g in grads:
                g.mul_(self.recipe.clip / norm)
        return norm

    def save(self) -> None:
        """Weights and optimiser, written beside and moved into place."""
        tensors = {f"model/{n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"optimizer/{n}": t for n, t in self.optimizer.state().items()}
        partial = self.checkpoint.with_suffix(".partial")
        save_file(
            {n: t.contiguous().clone() for n, t in tensors.items()},
            partial,
            {"step": str(self.step)},
        )
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        with safe_open(self.checkpoint, "pt") as file, torch.no_grad():
            self.step = int(file.metadata()["step"])
            own = dict(self.model.named_parameters())
            for name, p in own.items():
                p.copy_(file.get_tensor(f"model/{name}"))
            names = [n for n in file.keys() if n.startswith("optimizer/")]  # noqa: SIM118
            self.optimizer.load({n.removeprefix("optimizer/"): file.get_tensor(n) for n in names})


def _distances(count: int) -> Tensor:
    """Extra distance of every question: none for half of them, else up to a million tokens."""
    far = torch.exp2(torch.rand(count) * 20)
    return torch.where(torch.rand(count) < 0.5, 0.0, far).floor()
