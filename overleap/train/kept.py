"""What a run keeps on disk: weights in the official layout, state beside them, the loss picture.

    checkpoints/step-000120/              any command takes this folder as a model
    checkpoints/step-000120.state-0       optimiser tensors and facts of rank 0

The state is written first and a folder appears whole or not at all, so that a killed run finds the
newest pair intact. Not here: when (loop.py), the layout (checkpoint/).
"""

import errno
import heapq
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from overleap.cache import durable
from overleap.checkpoint import Checkpoint, save
from overleap.checkpoint.load import open_checkpoint
from overleap.checkpoint.table import tensor_table
from overleap.config import ModelConfig
from overleap.errors import TrainingError

KEEP = 2  # checkpoints that stay
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_NAME = re.compile(r"step-(\d{6,})")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process trains in `folder`, which is made if missing. Raises TrainingError.

    A killed process lets go of it. Windows and some network file systems have no such locks:
    nothing is held there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "train.lock").open("a")
    except OSError as error:
        raise TrainingError(f"no run can be in {folder}: {error.strerror}") from None
    with lock:
        try:
            free = sys.platform == "win32" or durable.take(lock.fileno(), alone=True)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            free = True
        if not free:
            raise TrainingError(
                f"another process trains in {folder}", "wait for its end, or stop it"
            )
        yield


def steps(folder: Path) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    home = folder / "checkpoints"
    found = []
    for path in home.iterdir() if home.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and _states(folder, int(match[1])):
            found.append(int(match[1]))
    return sorted(found)


def newest(folder: Path) -> int | None:
    """Step of the newest whole checkpoint."""
    found = steps(folder)
    return found[-1] if found else None


def place(folder: Path, step: int) -> Path:
    """The model folder of a checkpoint."""
    return folder / "checkpoints" / f"step-{step:06d}"


def _states(folder: Path, step: int) -> list[Path]:
    home = place(folder, step)
    return sorted(home.parent.glob(f"{home.name}.state-*[0-9]"))


def tidy(folder: Path) -> None:
    """Remove what a killed run left half written: state without weights, partial files."""
    home = folder / "checkpoints"
    for path in home.iterdir() if home.is_dir() else ():
        name = path.name
        whole = place(folder, int(match[1])) if (match := _NAME.match(name)) else None
        if ".partial" in name or (".state-" in name and whole is not None and not whole.is_dir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_state(
    folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], rank: int
) -> None:
    """Optimiser tensors and facts of one rank, written beside and moved into place."""
    home = place(folder, step)
    home.parent.mkdir(parents=True, exist_ok=True)
    target = home.with_name(f"{home.name}.state-{rank}")
    partial = target.with_name(f"{target.name}.partial")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, partial, {"facts": json.dumps(facts)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def tokenizer_files(folder: Path) -> list[Path]:
    """Those of a run, which its checkpoints carry too."""
    return [path for path in map(folder.joinpath, TOKENIZER_FILES) if path.exists()]


def save_weights(folder: Path, step: int, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """The model folder of a checkpoint, in float32; older ones go."""
    target = place(folder, step)
    if not target.exists():
        wide = config.with_(torch_dtype="float32", expert_dtype=None, quantization_config=None)
        plain = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        save(plain, wide, target, companions=tokenizer_files(folder))
    for old in steps(folder)[:-KEEP]:
        shutil.rmtree(place(folder, old))
        for state in _states(folder, old):
            state.unlink()


def load(
    folder: Path, step: int, config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimiser tensors of all ranks together, and facts. Raises TrainingError."""
    state: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for path in _states(folder, step):
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not facts:
        raise TrainingError(f"{place(folder, step)} has no state beside it")
    return read_weights(place(folder, step), config), state, facts


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as float32 (packed ones unpacked), hash tables as they are.

    Raises TrainingError where a tensor of `config` is missing there, is one too many or has another
    shape. What is no weight (YaRN, the context, index_topk) may differ.
    """
    from overleap.kernels.spec import Weight
    from overleap.kernels.torch.quant import dequantize

    checkpoint: Checkpoint = open_checkpoint(folder)[0]
    there, wanted = _shapes(checkpoint.config), _shapes(config)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise TrainingError(
                f"{folder} holds another model than the recipe describes: {name} is "
                f"{there.get(name, 'missing')} there, {wanted.get(name, 'missing')} in the recipe",
                "--base takes the config of that folder; a recipe that names its base has its own",
            )
    out: dict[str, Tensor] = {}
    for name in checkpoint.table:
        if name.endswith(".scale"):
            continue
        tensor = checkpoint.tensor(name)
        scale = name.removesuffix("weight") + "scale"
        if scale in checkpoint.table:
            tensor = dequantize(Weight(tensor, checkpoint.tensor(scale)))
        out[name] = tensor.float() if tensor.is_floating_point() else tensor.clone()
    return out


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every tensor, as it is when nothing is packed."""
    table = tensor_table(config.with_(expert_dtype=None, quantization_config=None))
    return {name: tuple(spec.shape) for name, spec in table.items()}


def sample(texts: Iterable[str], characters: int, every: int = 1 << 16) -> Iterator[str]:
    """Pieces of all texts, about `characters` in all, the same ones every time."""
    rng, chosen, held = random.Random(0), list[tuple[float, str]](), 0
    pieces = (text[at : at + every] for text in texts for at in range(0, len(text), every))
    for piece in pieces:
        # Those with the highest numbers stay, so what is held never grows beyond them.
        heapq.heappush(chosen, (rng.random(), piece))
        held += len(piece)
        while held - len(chosen[0][1]) > characters:
            held -= len(heapq.heappop(chosen)[1])
    for _, piece in chosen:
        yield piece


def board(folder: Path) -> Any:
    """A writer of tensorboard/ (what log.jsonl says, for TensorBoard); None without that extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def read_log(folder: Path) -> Iterator[dict[str, float]]:
    """The records of log.jsonl, but for a line that was cut off."""
    for line in (folder / "log.jsonl").read_text("utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def cut_log(folder: Path, step: int) -> None:
    """Leave in log.jsonl what was before `step`, where a run goes on, and the rollbacks.

    Steps that a kill cost are done, and logged, again: they would be there twice.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        return
    left = [r for r in read_log(folder) if "rolled_back_to" in r or r["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in left), "utf-8")
    os.replace(partial, path)


def draw_losses(folder: Path) -> Path | None:
    """losses.png of log.jsonl; None where matplotlib (extra `plots`) is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    steps = (record for record in read_log(folder) if "rolled_back_to" not in record)
    log = list({record["step"]: record for record in steps}.values())  # as last done
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label in (("language", "next token"), ("answer", "answers"), ("mtp", "draft block")):
        points = [(record["step"], record[key]) for record in log if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=0.9)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    target = folder / "losses.png"
    figure.savefig(target, dpi=130)
    return target
