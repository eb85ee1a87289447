"""transformers' DeepseekV4ForCausalLM, the reference implementation in plain torch.

It reads our checkpoint folders as they are, in bf16. A text is read in one piece, as its
generate() does; attention is eager, the only kind it has for this architecture.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from overleap.errors import OverleapError
from overleap.eval.peers.program import WARM_UP_TOKENS, Floats, Measured, Program, Task


class HuggingFace(Program):
    """An unpacked checkpoint in bf16, or in float32 where it must be exact."""

    def __init__(self, task: Task) -> None:
        try:
            import transformers
        except ImportError as error:
            raise OverleapError(
                f"transformers is not there ({error})", "pip install overleap[peers]"
            ) from None
        torch.set_num_threads(task.threads)
        dtype = torch.float32 if task.exact else torch.bfloat16
        library: Any = transformers
        library.utils.logging.disable_progress_bar()
        self.model: Any = library.DeepseekV4ForCausalLM.from_pretrained(
            task.path, dtype=dtype, attn_implementation="eager"
        ).eval()
        self.version = library.__version__
        self.manner = f"{str(dtype).removeprefix('torch.')}, eager attention"
        self.measure([0] * WARM_UP_TOKENS, 2)

    @torch.inference_mode()
    def measure(self, ids: list[int], steps: int) -> Measured:
        began = time.perf_counter()
        out = self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        prefill_s = time.perf_counter() - began
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - began)
        return Measured(prefill_s, tuple(times))

    @torch.inference_mode()
    def log_probabilities(self, ids: list[int], ends: Sequence[int]) -> Floats:
        logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        found: Floats = logits[[end - 1 for end in ends]].float().log_softmax(-1).numpy()
        return found
