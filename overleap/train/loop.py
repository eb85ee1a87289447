"""The training loop: rows in, weights out, a log line a step, a checkpoint every few minutes.

    run(recipe, folder)      begins, or goes on where the folder's last checkpoint stands

A folder holds recipe.json, log.jsonl, tokens/, checkpoints/step-N (the official layout) and, beside
each, its state. Not here: losses.py, one pass (passes.py), rows (data.py), keeping (kept.py).
"""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

from overleap import devices
from overleap.chat.profiles import PROFILE_KEY, Profile, chatting, profile_for
from overleap.chat.tokenizer import Tokenizer
from overleap.checkpoint.convert import parameters
from overleap.checkpoint.placing import is_routed
from overleap.checkpoint.table import tensor_table
from overleap.errors import OverleapError, TrainingError
from overleap.machine import cores
from overleap.train import kept
from overleap.train.data import Chat, Rows, fact_words
from overleap.train.losses import move_bias
from overleap.train.muon import Optimizer
from overleap.train.passes import Pass, best_dtype, peak_flops, trainable
from overleap.train.recipe import Recipe, Stage, from_json
from overleap.train.shards import Shard, build, train_tokenizer
from overleap.train.spread import Spread
from overleap.train.text import documents

Record = dict[str, float]
Report = Callable[[Record], None]

SPIKE_MEMORY = 100  # losses that the median is of
SPIKE_LEAST = 20  # of them, before anything counts as a spike
SPIKE_TRIES = 5  # rollbacks in a run, before it is given up
TOKENIZER_TEXT = 24_000_000  # characters that the tokenizer is trained on


def run(
    recipe: Recipe,
    folder: Path,
    *,
    ranks: int = 1,
    within: tuple[int, int, int] | None = None,
    spread: bool = False,
    report: Report | None = None,
) -> None:
    """Train (or continue) in `folder`, with `ranks` processes on this machine.

    within  this process's rank, how many there are and how many of them here, where others
            (torchrun) started them all
    spread  each rank keeps its share of the routed experts only (spread.py)
    Raises TrainingError, also where the folder holds a run of another recipe or another process
    trains in it.
    """
    if within is not None and ranks > 1:
        raise TrainingError(
            f"{ranks} ranks were asked for in one of {within[1]} processes", "leave out --ranks"
        )
    if spread and (ranks if within is None else within[1]) == 1:
        raise TrainingError("one rank has no other to spread experts over", "give --ranks N")
    with kept.alone(folder) if within is None or within[0] == 0 else nullcontext():
        if within is not None:
            rank, ranks, here = within
            _share_cores(here)
            _rank(rank, ranks, recipe, folder, "env://", spread, report)
        elif ranks == 1:
            _rank(0, 1, recipe, folder, None, False, report)
        else:
            begin(recipe, folder)
            _together(ranks, recipe, folder, spread, report)


def _share_cores(ranks: int) -> None:
    """More threads than cores wait for each other at every product."""
    torch.set_num_threads(max(1, cores() // ranks))


def _together(
    ranks: int, recipe: Recipe, folder: Path, spread: bool, report: Report | None
) -> None:
    """Ranks in processes of their own; what they log is reported, what they raise is raised."""
    there = devices.find()
    if there.type != "cpu" and ranks > devices.count(devices.kind_of(there)):
        raise TrainingError(
            f"{ranks} ranks were asked for, there are {devices.count(devices.kind_of(there))} "
            f"{there.type} devices"
        )
    meeting, failed, log = (folder / n for n in ("meeting", "failed.json", "log.jsonl"))
    meeting.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    seen = log.stat().st_size if log.exists() else 0
    given = (ranks, recipe, folder, f"file://{meeting}", spread, failed)
    context = spawn(_rank_apart, given, nprocs=ranks, join=False)
    try:
        ended = False
        while not ended:
            ended = context.join(1.0)
            seen = _pass_on(log, seen, report)
    except ProcessException:
        if not failed.exists():
            raise
        raise TrainingError(*json.loads(failed.read_text("utf-8"))) from None


def _rank_apart(
    rank: int, ranks: int, recipe: Recipe, folder: Path, meeting: str, spread: bool, failed: Path
) -> None:
    """A rank in a process of its own, which leaves word of why it ended."""
    _share_cores(ranks)
    try:
        _rank(rank, ranks, recipe, folder, meeting, spread, None)
    except OverleapError as error:
        failed.write_text(json.dumps([error.message, error.hint]), "utf-8")
        raise


def _pass_on(log: Path, seen: int, report: Report | None) -> int:
    """Report whole lines of a log from byte `seen` on; returns how far that was."""
    if report is None or not log.exists():
        return seen
    with log.open("rb") as file:
        file.seek(seen)
        for line in file:
            if not line.endswith(b"\n"):
                break
            report(json.loads(line))
            seen += len(line)
    return seen


def begin(recipe: Recipe, folder: Path) -> None:
    """recipe.json, the tokenizer and tokens/ of a folder, made where they are not there yet.

    The log goes on where the last checkpoint stands. A folder where nothing was trained yet takes
    another recipe. Raises TrainingError.
    """
    path, tokenizer = folder / "recipe.json", folder / "tokenizer.json"
    if path.exists() and from_json(path.read_text("utf-8"), str(path)) != recipe:
        if kept.newest(folder):  # what stands before the first step is no training
            raise TrainingError(
                f"{folder} holds a run of another recipe",
                "go on with `overleap train resume`, or choose another folder",
            )
        path.unlink()
        for file in kept.tokenizer_files(folder):
            file.unlink()
        for name in ("tokens", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(recipe.to_json(), "utf-8")
        except OSError as error:
            raise TrainingError(f"no run can be in {folder}: {error.strerror}") from None
    if not tokenizer.exists():
        partial = tokenizer.with_suffix(".partial")
        if recipe.base:
            _copy_tokenizer(Path(recipe.base), partial)
        else:
            texts = kept.sample((text for _, text in documents(recipe.text)), TOKENIZER_TEXT)
            train_tokenizer(texts, partial, recipe.vocabulary, fact_words())
        partial.replace(tokenizer)
    settings = tokenizer.with_name("tokenizer_config.json")
    if not settings.exists():
        settings.write_text(json.dumps({PROFILE_KEY: _profile(recipe).name}) + "\n", "utf-8")
    if recipe.text and not (folder / "tokens" / "held_out" / "shard.json").exists():
        build(documents(recipe.text), Tokenizer.from_file(tokenizer), folder / "tokens")
    kept.tidy(folder)  # before any rank saves
    kept.cut_log(folder, kept.newest(folder) or 0)


def _copy_tokenizer(base: Path, target: Path) -> None:
    try:
        target.write_bytes((base / "tokenizer.json").read_bytes())
    except OSError as error:
        raise TrainingError(f"{base} has no tokenizer that can be read: {error}") from None


def _profile(recipe: Recipe) -> Profile:
    """How the model is talked to, now and when it is served: as its base."""
    profile = profile_for(recipe.base or recipe.config.to_dict())
    chats = any(isinstance(source, Chat) for stage in recipe.stages for source in stage.mixture)
    return chatting(profile) if chats else profile


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a folder was begun with. Raises TrainingError."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise TrainingError(f"{folder} holds no training run", "a run keeps its recipe.json there")
    return from_json(path.read_text("utf-8"), str(path))


def _rank(
    rank: int,
    ranks: int,
    recipe: Recipe,
    folder: Path,
    meeting: str | None,
    spread: bool,
    report: Report | None,
) -> None:
    if ranks > 1:
        kind = devices.kind_of(devices.find())
        if kind is not devices.CPU:  # collectives of objects go over the current device
            torch.get_device_module(kind.type).set_device(rank % devices.count(kind))
        backend = kind.group
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks)
    torch._dynamo.config.recompile_limit = 64  # one function serves many shapes
    try:
        if rank == 0:
            begin(recipe, folder)
        if ranks > 1:
            dist.barrier()
        Trainer(recipe_of(folder), folder, report, spread).run()
    finally:
        if ranks > 1:
            dist.destroy_process_group()


class Trainer:
    """One rank: model, optimiser, rows. All ranks hold the same weights, but for spread experts."""

    def __init__(
        self, recipe: Recipe, folder: Path, report: Report | None = None, spread: bool = False
    ) -> None:
        self.recipe, self.folder, self.report = recipe, folder, report
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
        if tokenizer.vocab_size != recipe.config.vocab_size:
            raise TrainingError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{recipe.config.vocab_size}"
            )
        shard = Shard.open(folder / "tokens" / "train") if recipe.text else None
        self.rows = Rows(tokenizer, shard, recipe.seed, profile_for(folder))
        for number, stage in enumerate(recipe.stages):  # what cannot be made, now and not in hours
            if not stage.mixture:
                raise TrainingError(f"stage {number} has an empty mixture, so it has no rows")
            for source in stage.mixture:
                self.rows.row((source,), number, 0, stage.length)
        self.spread = Spread.of(recipe) if spread and self.ranks > 1 else None
        newest = kept.newest(folder)
        # A run that has a checkpoint no longer needs its base, which may be gone.
        place = recipe.base if newest is None else str(kept.place(folder, newest))
        self.work = Pass(recipe, trainable(replace(recipe, base=place)), best_dtype(), self.spread)
        self.model = self.work.model
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        spread_out = self.spread is not None
        self.alone = {n for n, _ in named if spread_out and is_routed(n)}
        self.optimizer = Optimizer(
            named,
            self.work.ops,
            recipe.config,
            weight_decay=recipe.weight_decay,
            alone=self.alone,
            muon=recipe.muon,
        )
        self.board = None if self.rank else kept.board(folder)
        self.step = self.skipped = self.rollbacks = 0
        self.losses: list[float] = []
        if newest is not None:
            self._load(newest)

    def run(self) -> None:
        """All steps that are left. MFU counts six operations a weight that a token meets."""
        if not self.step:
            self.save()  # a spike may come before the next one is due
        began = saved = time.monotonic()
        first, tokens, peak = self.step, 0, peak_flops(self.work.ops.dtype) * self.ranks
        active = parameters(self.recipe.config, tensor_table(self.recipe.config))["active"]
        while self.step < self.recipe.steps:
            number, _ = self.recipe.place(self.step)
            stage = self.recipe.stages[number]
            record = self.one()
            if record is None:
                saved = time.monotonic()
                continue
            tokens += stage.rows * stage.length
            seconds = time.monotonic() - began
            done = max(self.step - first, 1)
            record |= {
                "tokens_per_s": round(tokens / seconds),
                "mfu": round(6 * active * tokens / seconds / peak, 4),
                "minutes": round(seconds / 60, 2),
                "minutes_left": round((self.recipe.steps - self.step) * seconds / done / 60, 1),
            }
            self._tell(record)
            if self._agreed(time.monotonic() - saved > self.recipe.checkpoint_s):
                self.save()
                saved = time.monotonic()
        self.save()
        if self.rank == 0:
            kept.draw_losses(self.folder)

    def one(self) -> Record | None:
        """One step; its figures, or None where it was a spike and the run went back."""
        recipe = self.recipe
        number, within = recipe.place(self.step)
        stage = recipe.stages[number]
        if not within:
            self.losses = []  # another stage's say nothing of this one's
        self._learn_only(stage)
        self.optimizer.zero_grad()
        record, loads = self._gradients(stage, number, within)
        norm = self._share_gradients()
        if not self._is_sane(record["loss"], norm):
            self._go_back(record["loss"], norm)
            return None
        rate = recipe.rate_at(self.step) * stage.rate
        self.optimizer.step(recipe.matrix_rate * rate, recipe.other_rate * rate)
        for bias, load in () if stage.indexer_only else loads:
            move_bias(bias, load, recipe.bias_speed)
        figures = {"step": self.step, "stage": number, "length": stage.length} | record
        self.losses = [*self.losses, record["loss"]][-SPIKE_MEMORY:]
        self.step += 1
        return figures | {"norm": round(norm, 3), "rate": round(rate, 4)}

    def _gradients(
        self, stage: Stage, number: int, within: int
    ) -> tuple[Record, list[tuple[Tensor, Tensor]]]:
        """Gradients of this rank's passes; figures and expert loads of all ranks."""
        each = self.recipe.rows_of_a_pass(stage)
        groups = range(0, stage.rows, each)
        base = (within + self.skipped) * stage.rows
        figures: dict[str, list[float]] = {}
        loads: dict[int, tuple[Tensor, Tensor]] = {}
        with self.work.stored() if stage.rounding else nullcontext():
            for group in groups[self.rank :: self.ranks]:
                rows = [
                    self.rows.row(stage.mixture, number, base + r, stage.length)
                    for r in range(group, min(group + each, stage.rows))
                ]
                share = len(rows) / stage.rows
                seed = f"{self.recipe.seed}/{self.step + self.skipped}/{group}"
                total, record, load = self.work.losses(stage, rows, seed)
                (total * share).backward()
                self.work.ops.take()
                for key, value in (record | {"loss": float(total.detach())}).items():
                    figures.setdefault(key, []).extend([value] * len(rows))
                for bias, count in load:
                    before = loads.get(id(bias), (bias, torch.zeros_like(count)))[1]
                    loads[id(bias)] = (bias, before + count)
        return self._pooled(figures), self._pooled_loads(loads)

    def _pooled(self, figures: dict[str, list[float]]) -> Record:
        if self.ranks > 1:
            everyone: list[Any] = [None] * self.ranks
            dist.all_gather_object(everyone, figures)
            figures = {}
            for one in everyone:
                for key, values in one.items():
                    figures.setdefault(key, []).extend(values)
        return {key: round(statistics.fmean(values), 5) for key, values in figures.items()}

    def _pooled_loads(self, loads: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        biases = [(n, p) for n, p in self.model.named_parameters() if n.endswith("gate.bias")]
        none = torch.zeros(self.recipe.config.n_routed_experts)
        out: list[tuple[Tensor, Tensor]] = []
        for _, bias in biases:
            load = loads.get(id(bias), (bias, none.to(bias.device)))[1]
            if self.ranks > 1:
                dist.all_reduce(load)
            if float(load.sum()):
                out.append((bias, load))
        return out

    def _learn_only(self, stage: Stage) -> None:
        for name, p in self.model.named_parameters():
            if p.is_floating_point() and p.numel() and not name.endswith("gate.bias"):
                p.requires_grad_(not stage.indexer_only or ".indexer." in name)

    def _share_gradients(self) -> float:
        """Sum over ranks, clip, and return the norm before clipping."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        wanted = [p for n, p in named if n not in self.alone]
        alone = [p.grad for n, p in named if n in self.alone and p.grad is not None]
        if self.ranks > 1:
            there = torch.tensor([p.grad is not None for p in wanted], device=self.work.device)
            somewhere = there.int()
            dist.all_reduce(somewhere)
            # What no rank has a gradient of stays as it is, as on one rank.
            wanted = [p for p, count in zip(wanted, somewhere.tolist(), strict=True) if count]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in wanted]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for p, part in zip(wanted, flat.split([g.numel() for g in grads]), strict=True):
                p.grad = part.view_as(p).clone()
        grads = [p.grad for p in wanted if p.grad is not None]
        square = sum((g.square().sum() for g in alone), torch.zeros((), device=self.work.device))
        if self.alone:
            dist.all_reduce(square)
        norm = float(torch.sqrt(sum((g.square().sum() for g in grads), square)))
        if self.recipe.clip < norm < math.inf:
            for g in (*grads, *alone):
                g.mul_(self.recipe.clip / norm)
        return norm

    def _is_sane(self, loss: float, norm: float) -> bool:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        if len(self.losses) < SPIKE_LEAST:
            return True
        return loss < self.recipe.spike * statistics.median(self.losses)

    def _go_back(self, loss: float, norm: float) -> None:
        """To the last checkpoint; the rows since then are left out. Raises TrainingError."""
        newest = kept.newest(self.folder)
        self.rollbacks += 1
        if newest is None or self.rollbacks > SPIKE_TRIES:
            raise TrainingError(
                f"the loss went to {loss:.3g} (gradient norm {norm:.3g}) at step {self.step}, "
                f"after {self.rollbacks - 1} rollbacks",
                "lower the rates, or look at the rows of that step",
            )
        failed, skipped, rollbacks = self.step, self.skipped, self.rollbacks
        self._load(newest)
        self.skipped, self.rollbacks = skipped + failed - self.step + 1, rollbacks
        self._tell({"step": failed, "loss": loss, "norm": norm, "rolled_back_to": self.step})

    def _tell(self, record: Record) -> None:
        if self.rank:
            return
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        if self.board is not None:
            for name in record.keys() - {"step"}:
                self.board.add_scalar(name, record[name], int(record["step"]))
            self.board.flush()
        if self.report is not None:
            self.report(record)

    def _agreed(self, mine: bool) -> bool:
        """What rank 0 says, on all ranks."""
        if self.ranks == 1:
            return mine
        word = torch.tensor(int(mine), device=self.work.device)
        dist.broadcast(word, 0)
        return bool(word)

    def save(self) -> None:
        """A checkpoint of this step, state first, so that a folder with weights is whole."""
        facts = {"step": self.step, "skipped": self.skipped, "rollbacks": self.rollbacks}
        kept.save_state(
            self.folder,
            self.step,
            self.optimizer.state(),
            facts | {"losses": self.losses},
            self.rank,
        )
        if self.ranks > 1:
            dist.barrier()
        weights = {n: p.detach() for n, p in self.model.named_parameters()}
        if self.spread is not None:
            weights |= self._gathered(weights)
        if self.rank == 0:
            kept.save_weights(self.folder, self.step, weights, self.recipe.config)

    def _gathered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The other ranks' experts, on rank 0."""
        assert self.spread is not None
        found: dict[str, Tensor] = {}
        for name, spec in tensor_table(self.recipe.config).items():
            owner = self.spread.owner(name)
            if owner is None or name not in weights:
                continue
            whole = weights[name]
            if owner != self.rank:
                whole = torch.empty(spec.shape, device=self.work.device)
            dist.broadcast(whole, owner)
            if self.rank == 0:
                found[name] = whole
        return found

    def _load(self, step: int) -> None:
        weights, state, facts = kept.load(self.folder, step, self.recipe.config)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.numel():  # the others' experts are not here
                    p.copy_(weights[name])
        self.optimizer.load(state)
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.rollbacks, self.losses = facts["rollbacks"], facts["losses"]
