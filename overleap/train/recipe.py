"""What decides a run: a Recipe, its stages, and both as JSON. No tensors here.

A recipe comes from a function (recipes.py has ours; a file of yours may have one called `recipe`).
A run keeps it as recipe.json, so that resuming needs nothing else. Read next: data.py, loop.py.
"""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from overleap.config import ModelConfig
from overleap.errors import TrainingError
from overleap.train.data import Chat, Source, Tasks, Text
from overleap.train.shards import PAGE

SOURCES: dict[str, type[Text] | type[Tasks] | type[Chat]] = {
    "text": Text,
    "tasks": Tasks,
    "chat": Chat,
}


@dataclass(frozen=True)
class Stage:
    """A part of a run with rows of one length. A step has `rows` of them, over all ranks.

    sparse        attend the released index_topk entries only; otherwise all of them
    rounding      weights, their inputs and cache rows hold what their released forms keep of them
    indexer_only  nothing but the indexer learns (its warm-up before a sparse stage)
    language      weight of the next token's loss; retrieval: of the one that points attention at
                  planted answers; mtp: of the draft block's
    rate          factor of the recipe's rates
    """

    steps: int
    length: int
    rows: int
    mixture: tuple[Source, ...]
    sparse: bool = False
    rounding: bool = False
    indexer_only: bool = False
    language: float = 1.0
    retrieval: float = 1.0
    mtp: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        shares = [source.share for source in self.mixture]
        rules = (
            (self.steps >= 1, f"a stage of {self.steps} steps"),
            (self.rows >= 1, f"a stage of {self.rows} rows"),
            (
                self.length > 0 and self.length % PAGE == 0,
                f"rows of {self.length} tokens, not of whole pages of {PAGE}",
            ),
            (all(0 < share < math.inf for share in shares), f"a mixture with shares {shares}"),
        )
        for holds, what in rules:
            if not holds:
                raise TrainingError(f"the recipe has {what}")


@dataclass(frozen=True)
class Recipe:
    """All that decides a run. Rates are peaks: linear warm-up, constant, cosine at the end.

    text            files and folders that become the run's tokens; vocabulary: of the tokenizer
                    that is trained on them. With `base` (a folder in the official layout) weights
                    and tokenizer are that model's; `config` must have the same tensors, and may
                    have another YaRN, context or index_topk
    muon            for the matrices; else AdamW for all, at other_rate
    group_tokens    tokens of one forward pass; a step is as many passes as it takes
    kept_tokens     passes longer than this keep a layer's input only and compute it again
    language_rows   share of the positions whose logits are made
    distilled       positions of a pass at which the indexer is held against attention
    spike           a loss above this many times the median of the last hundred of its stage is one:
                    the run goes back to its last checkpoint and leaves out the rows since. The
                    first 20 steps of a stage only go back from losses that are no number
    """

    config: ModelConfig
    stages: tuple[Stage, ...]
    seed: int
    text: tuple[str, ...] = ()
    vocabulary: int = 8192
    base: str = ""
    muon: bool = True
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 30
    decay_share: float = 0.35
    final_share: float = 0.05
    language_rows: float = 0.5
    index: float = 1.0
    distillation: float = 0.3
    distilled: int = 128
    balance: float = 1e-4
    bias_speed: float = 1e-3
    clip: float = 1.0
    group_tokens: int = 8192
    kept_tokens: int = 16384
    checkpoint_s: float = 300.0
    spike: float = 2.0
    compiled: bool = True
    notes: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise TrainingError("the recipe has no stage")
        for name in ("warmup_steps", "group_tokens", "distilled"):
            if getattr(self, name) < 1:
                raise TrainingError(f"the recipe's {name} is {getattr(self, name)}, 1 is the least")

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def rows_of_a_pass(self, stage: Stage) -> int:
        """Rows that go through the model at once."""
        return min(stage.rows, max(1, self.group_tokens // stage.length))

    def place(self, step: int) -> tuple[int, int]:
        """Number of the stage that a step belongs to, and the step's number in it."""
        for number, stage in enumerate(self.stages):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        raise TrainingError(f"the recipe has {self.steps} steps, step {step} was asked for")

    def rate_at(self, step: int) -> float:
        """Factor of the peak rates."""
        done = step / max(self.steps, 1)
        rise = min(1.0, (step + 1) / self.warmup_steps)
        if done < 1 - self.decay_share:
            return rise
        left = (1 - done) / self.decay_share
        half = 0.5 - 0.5 * math.cos(math.pi * min(left, 1.0))
        return rise * (self.final_share + (1 - self.final_share) * half)

    def to_json(self) -> str:
        """Everything, to be read back by from_json."""
        raw = asdict(self)
        raw["config"] = self.config.to_dict()
        for stage, written in zip(self.stages, raw["stages"], strict=True):
            for source, one in zip(stage.mixture, written["mixture"], strict=True):
                (one["source"],) = [name for name, kind in SOURCES.items() if type(source) is kind]
        return json.dumps(raw, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, source: str = "recipe.json") -> Recipe:
    """A recipe as to_json wrote it. Raises TrainingError."""
    try:
        raw: dict[str, Any] = json.loads(text)
        stages = tuple(
            Stage(**(one | {"mixture": tuple(_source(m) for m in one["mixture"])}))
            for one in raw.pop("stages")
        )
        config = ModelConfig.from_dict(raw.pop("config"), source)
        raw["text"] = tuple(raw["text"])
        return Recipe(config, stages, **raw)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{source} is no recipe: {error}") from None


def _source(raw: dict[str, Any]) -> Source:
    kind = SOURCES[raw.pop("source")]
    for one in fields(kind):
        if isinstance(raw.get(one.name), list):
            raw[one.name] = tuple(raw[one.name])
    return kind(**raw)


def recipe_named(name: str, known: dict[str, Callable[[], Recipe]]) -> Recipe:
    """A recipe of `known`, or of a Python file: `path.py` (its `recipe`) or `path.py:function`.

    The file runs, as any program of yours would. Raises TrainingError.
    """
    if name in known:
        return known[name]()
    path, _, function = name.partition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise TrainingError(
            f"no recipe is called {name!r}",
            f"recipes are {', '.join(sorted(known))}; a file is path.py or path.py:function",
        )
    spec = importlib.util.spec_from_file_location("overleap_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function or "recipe", None)
    found = made() if callable(made) else None
    if not isinstance(found, Recipe):
        raise TrainingError(f"{path} has no function {function or 'recipe'} that returns a Recipe")
    return found
