"""The small parts: linears over packed bytes, norms, embedding, rotary frequencies.

Parameter names are the official checkpoint's. Arithmetic is in kernels/.
"""

import math

import torch
from torch import Tensor, nn

from overleap.config import Rope
from overleap.kernels.spec import Joint, Ops, Weight


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A float32 parameter without values yet (meta device); Transformer.assign fills it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """x [..., inputs] -> [..., outputs]. Weight plain, FP8 or FP4; packed bytes stay packed.

    exact  never rounds its input, whatever the weight's form
    """

    scale: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, ops: Ops, *, exact: bool = False) -> None:
        super().__init__()
        self.weight = parameter(outputs, inputs)
        self.register_parameter("scale", None)
        self.ops, self.exact = ops, exact

    @property
    def stored(self) -> Weight:
        """The weight as the kernels take it."""
        return Weight(self.weight, self.scale)

    @property
    def rounds_input(self) -> bool:
        """True where the released form rounds activations to FP8 before the product."""
        return self.scale is not None and not self.exact

    def forward(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs]."""
        return self.ops.matmul(x, self.stored, self.rounds_input)


def joint(*linears: Linear, wide: bool = False, detached: bool = False) -> Joint:
    """Linears of one input, for ops.project; their weights must be in place."""
    (rounds,) = {linear.rounds_input for linear in linears}
    return Joint(tuple(linear.stored for linear in linears), rounds, wide, detached)


class RMSNorm(nn.Module):
    """Learned RMSNorm over the last dim."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return self.ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Token ids [T] -> vectors [T, width]."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(tokens, width)

    def forward(self, ids: Tensor) -> Tensor:
        """i64 [T] -> [T, width]."""
        return nn.functional.embedding(ids, self.weight)


def rotary_frequencies(rope: Rope, rotary_dims: int) -> Tensor:
    """f32 [R / 2] radians per token; YaRN blends towards 1 / factor for slow pairs.

    Pairs that turn more than beta_fast times within the original context keep their frequency,
    those below beta_slow are slowed by the factor, linear in between (bounds rounded outwards).
    """
    exponent = torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims
    frequency = 1.0 / (rope.theta**exponent)
    if rope.yarn is None:
        return frequency

    def pair_of(turns: float) -> float:
        span = rope.yarn.original_max_position_embeddings if rope.yarn else 1
        return rotary_dims * math.log(span / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_of(rope.yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.yarn.beta_slow)), rotary_dims - 1)
    ramp = (torch.arange(rotary_dims // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return frequency * (1 - slowed) + frequency / rope.yarn.factor * slowed
