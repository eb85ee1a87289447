"""The bundled model's recipe with one part exchanged: which part brings what, on the same tokens.

    python -m tests.peers.variants train FOLDER --variant full --text PATH ... --steps 250
    python -m tests.peers.variants compare hybrid=FOLDER full=FOLDER ... --results results
        --picture docs/concepts/pictures/variants.png

hybrid is the recipe as it is; full attends every token in layers that have entries otherwise;
sliding has the window alone in all layers; adamw trains all by AdamW. Same rows, same first values
where the shapes are the same, same losses: attention is pointed at planted facts in the same two
layers where they can be seen at all. A run may also be one that `overleap train mini` began.
Not a test.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from overleap.checkpoint.convert import parameters
from overleap.checkpoint.table import tensor_table
from overleap.eval.record import append, take
from overleap.kernels.spans import Spans
from overleap.kernels.spec import Pool
from overleap.train import kept, loop, passes
from overleap.train.data import Rows, Tasks, Text
from overleap.train.losses import HIDDEN, Asked
from overleap.train.ops import TrainingOps
from overleap.train.recipe import Recipe, Stage
from overleap.train.recipes import mini
from overleap.train.shards import Shard

VARIANTS = ("hybrid", "full", "sliding", "adamw")
FULL_LAYERS = (1, 2, 3)  # where the hybrid has entries
POINTED = (0, 2)  # of them, those where it has CSA
CURVE = 10  # steps whose mean is a point of a curve
HELD_OUT = 8  # rows of each length and kind at the end


def recipe_of(variant: str, text: tuple[str, ...]) -> Recipe:
    """The bundled model's recipe with the variant's part exchanged."""
    recipe = replace(mini(), text=text)
    if variant == "adamw":
        return replace(recipe, muon=False)
    if variant == "hybrid":
        return recipe
    ratios = (0,) * len(recipe.config.compress_ratios)
    return replace(recipe, config=recipe.config.with_(compress_ratios=ratios))


class FullOps(TrainingOps):
    """Attention of every token to all tokens before it in its document, in FULL_LAYERS."""

    layer = 0

    def take(self) -> Any:
        """As it was; the next call of attend is the first layer's."""
        self.layer = 0
        return super().take()

    def attend(
        self,
        q_THK: Tensor,
        fresh_T: Tensor,
        ring: Pool,
        entries: Pool | None,
        chosen_Tk: Tensor | None,
        ratio: int,
        sink_H: Tensor,
        scale: float,
        window: int,
        spans: Spans,
    ) -> tuple[Tensor, Tensor]:
        """See spec.Ops.attend; no entries, and the window is the document."""
        layer, self.layer = self.layer, self.layer + 1
        if layer not in FULL_LAYERS:
            return super().attend(q_THK, fresh_T, ring, None, None, 0, sink_H, scale, window, spans)
        out, denominators = [], []
        q, rows = (q_THK * scale).to(self.dtype), fresh_T.to(self.dtype)
        for begin, end in self.tiles(spans).documents:
            keys = rows[begin:end]
            score = torch.einsum("thk,sk->ths", q[begin:end], keys).to(self.wide)
            later = torch.ones(len(keys), len(keys), dtype=torch.bool).triu(1)
            score = score.masked_fill(later[:, None], -torch.inf)
            sink = sink_H.to(self.wide)[None, :, None].expand(len(keys), -1, 1)
            share = torch.cat((score, sink), dim=-1).softmax(-1)[..., :-1]
            out.append(torch.einsum("ths,sk->thk", share.to(self.dtype), keys))
            denominators.append(torch.logaddexp(score.logsumexp(-1), sink[..., 0]))
        lse = torch.cat(denominators)
        self.seen.attention.append((q_THK, fresh_T, sink_H, lse.detach()))
        return torch.cat(out), lse


class FullPass(passes.Pass):
    """Points full attention at planted facts, as a hybrid's CSA layers are pointed at them."""

    def _attention_losses(self, stage: Stage, step: Any, *rest: Any) -> Any:
        seen = rest[1].attention
        total, record = torch.zeros(()), dict[str, Tensor]()
        if len(step.seen.at_N) and seen:
            for number in POINTED:
                loss, top = pointed(seen[number], step.seen)
                total = total + stage.retrieval * loss / len(POINTED)
                record |= {f"attend{FULL_LAYERS[number]}": loss}
                record |= {f"attend{FULL_LAYERS[number]}_top": top}
        return total, record


def pointed(seen: tuple[Tensor, Tensor, Tensor, Tensor], asked: Asked) -> tuple[Tensor, Tensor]:
    """losses.retrieval_loss where every row is its own entry; other documents count as wrong."""
    queries, rows, sink, _ = seen
    at, q = torch.arange(len(rows))[None], queries[asked.at_N].float()
    mine = (at >= asked.begin_N[:, None]) & (at < asked.end_N[:, None])
    allowed = ~mine | (at <= asked.at_N[:, None])
    gold = at == asked.gold_N[:, None]
    score = torch.einsum("nhk,sk->nhs", q, rows.float()) * rows.shape[1] ** -0.5
    score = score.masked_fill(~allowed[:, None], HIDDEN)
    held = score.masked_fill(~gold[:, None], HIDDEN).logsumexp(-1)
    mass = (held - torch.logaddexp(score.logsumexp(-1), sink)).exp().mean(1)
    best = score.detach().logsumexp(1).argmax(-1, keepdim=True)
    return -mass.clamp_min(1e-30).log().mean(), gold.gather(1, best).float().mean()


def train(folder: Path, variant: str, text: tuple[str, ...], steps: int) -> None:
    """The first `steps` steps of the recipe, its rates included; then the measured end."""
    torch._dynamo.config.recompile_limit = 64
    recipe = recipe_of(variant, text)
    loop.begin(recipe, folder)
    full = variant == "full"
    with (
        mock.patch.object(loop, "Pass", FullPass if full else passes.Pass),
        mock.patch.object(passes, "TrainingOps", FullOps if full else TrainingOps),
    ):
        trainer = loop.Trainer(recipe, folder)
    while trainer.step < steps:
        record = trainer.one()
        if record is not None:
            trainer._tell(record)
        if trainer.step % 50 == 0:
            print(record, flush=True)
    trainer.save()
    found = {"variant": variant, "steps": trainer.step, "held_out": list(held_out(trainer))}
    (folder / "held_out.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(found)


def held_out(trainer: loop.Trainer) -> Iterator[dict[str, float]]:
    """Facts in held-out text, and held-out text, at lengths learned and longer ones."""
    shard = Shard.open(trainer.folder / "tokens" / "held_out")
    rows = Rows(trainer.rows.tokenizer, shard, trainer.recipe.seed, trainer.rows.profile)
    for length, planted in ((512, 12), (1024, 20), (2048, 20), (4096, 20)):
        found: dict[str, list[float]] = {}
        for source in (Tasks(1.0, "fact", planted, planted), Text(1.0)):
            stage = Stage(1, length, 1, (source,))
            for number in range(HELD_OUT):
                row = rows.row((source,), 0, number, length)
                with torch.no_grad():
                    _, record, _ = trainer.work.losses(stage, [row], f"{length}/{number}")
                trainer.work.ops.take()
                kind = "facts" if isinstance(source, Tasks) else "text"
                for name in ("language", "answer", "certain"):
                    if name in record:
                        found.setdefault(f"{kind}_{name}", []).append(record[name])
        yield {"length": length} | {n: statistics.fmean(v) for n, v in found.items()}


def curve(folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Means of CURVE steps of a run's log."""
    last = {int(one["step"]): one for one in kept.read_log(folder) if "rate" in one}
    for begin in range(0, steps, CURVE):
        part = [last[step] for step in range(begin, begin + CURVE) if step in last]
        point: dict[str, Any] = {"step": begin + CURVE}
        for name in ("language", "answer", "certain", "loss"):
            values = [one[name] for one in part if name in one]
            point[name] = round(statistics.fmean(values), 4) if values else None
        yield point


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses while learning, of all tokens and of words asked for; facts known after, by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    wanted = (("step", "language"), ("step", "answer"), ("length", "facts_certain"))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        for axes, (across, up) in zip(panels, wanted, strict=True):
            known = [row for row in own if ("length" in row) == (across == "length")]
            points = [(row[across], row[up]) for row in known if row.get(up) is not None]
            style = "--" if variant == "adamw" else "-"
            marker = "." * (across == "length")
            axes.plot(*zip(*points, strict=True), style, marker=marker, label=variant)
            axes.set_xlabel("step" if across == "step" else "tokens of the text")
            axes.grid(True, color="#dddddd", linewidth=0.8)
    panels[0].set_title("next token, nats", fontsize=10)
    panels[1].set_title("words asked for, nats", fontsize=10)
    steps = max(row["step"] for row in rows)
    panels[2].set_title(f"planted facts known after {steps} steps", fontsize=10)
    panels[2].set_xscale("log", base=2)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """See the file header."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--variant", choices=VARIANTS, required=True)
    training.add_argument("--text", action="append", default=[])
    training.add_argument("--steps", type=int, default=250)
    comparing = commands.add_parser("compare")
    comparing.add_argument("runs", nargs="+", help="variant=FOLDER")
    comparing.add_argument("--steps", type=int, default=250)
    comparing.add_argument("--results", type=Path, required=True)
    comparing.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.command == "train":
        train(given.folder, given.variant, tuple(given.text), given.steps)
        return
    rows: list[dict[str, Any]] = []
    for run in given.runs:
        variant, folder = run.split("=")
        config = recipe_of(variant, ()).config
        counted = parameters(config, tensor_table(config))
        fixed = {"variant": variant, "weights": counted["total"], "active": counted["active"]}
        rows += [fixed | point for point in curve(Path(folder), given.steps)]
        ended = Path(folder) / "held_out.json"
        if ended.exists():
            found = json.loads(ended.read_text("utf-8"))
            rows += [fixed | {"step": found["steps"]} | one for one in found["held_out"]]
    if given.picture:
        draw(rows, given.picture)
    print(append(take("variants", rows, {"model": "mini", "steps": given.steps}), given.results))


if __name__ == "__main__":
    main()
