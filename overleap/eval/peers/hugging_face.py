"""transformers' DeepseekV4ForCausalLM, the reference implementation in plain torch.

It reads our checkpoint folders as they are, in bf16: FP8 and FP4 weights are unpacked first, which
is exact. A text is read in one piece, as its generate() does.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overleap.checkpoint import Checkpoint, convert
from overleap.errors import OverleapError
from overleap.eval.peers.program import WARM_UP_TOKENS, Measured, Program, Task


class HuggingFace(Program):
    """Eager attention, the only one it has for this architecture."""

    def __init__(self, task: Task) -> None:
        try:
            import transformers
        except ImportError as error:
            raise OverleapError(
                f"transformers is not there ({error})", "pip install overleap[peers]"
            ) from None
        dtype = torch.float32 if task.exact else torch.bfloat16
        library: Any = transformers
        library.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(task.folder)
            if Checkpoint(folder).config.quantization_config is not None:
                convert(folder, Path(scratch) / "plain", "bf16")
                folder = Path(scratch) / "plain"
            self.model: Any = library.DeepseekV4ForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager"
            ).eval()
        self.version = library.__version__
        self.manner = f"{str(dtype).removeprefix('torch.')}, eager attention"
        self.measure([0] * WARM_UP_TOKENS, 2)

    @torch.inference_mode()
    def measure(self, ids: list[int], steps: int) -> Measured:
        began = time.perf_counter()
        out = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        prefill_s = time.perf_counter() - began
        times = []
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            began = time.perf_counter()
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - began)
        return Measured(prefill_s, tuple(times))

    @torch.inference_mode()
    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Tensor:
        logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits[[end - 1 for end in ends]].float().log_softmax(-1)
