"""A training checkpoint as a model folder in the official layout.

    python -m overleap.train.publish RUN TARGET [release|bf16]

Not the training (loop.py) nor the card's text, which people write. Read next: checkpoint/.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import cast

from safetensors.torch import load_file
from torch import Tensor

from overleap.checkpoint import convert, save
from overleap.checkpoint.convert import FORMS, Form
from overleap.config import ModelConfig
from overleap.errors import TrainingError
from overleap.train.mini import configuration


def trained_weights(run: Path) -> dict[str, Tensor]:
    """Official name -> tensor of the newest checkpoint of a run."""
    path = run / "checkpoint.safetensors"
    if not path.is_file():
        raise TrainingError(f"{path} does not exist", "a run writes it every few minutes")
    tensors = load_file(path)
    return {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}


def publish(run: Path, target: Path, config: ModelConfig, form: Form = "bf16") -> None:
    """Write weights, config, tokenizer and digests of a run; a model card that is there stays."""
    card = target / "MODEL_CARD.md"
    companions = [run / "tokenizer.json"]
    with tempfile.TemporaryDirectory() as scratch:
        if card.is_file():
            companions.append(Path(shutil.copy(card, scratch)))
        plain = Path(scratch) / "plain"
        wide = config.with_(torch_dtype="float32")
        save(trained_weights(run), wide, plain, companions=companions)
        if target.exists():
            shutil.rmtree(target)
        convert(plain, target, form)


if __name__ == "__main__":
    wanted = sys.argv[3] if len(sys.argv) > 3 else "bf16"
    if wanted not in FORMS:
        raise SystemExit(f"forms are {', '.join(FORMS)}")
    publish(Path(sys.argv[1]), Path(sys.argv[2]), configuration(), cast(Form, wanted))
