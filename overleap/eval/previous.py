"""One attention layer of DeepSeek-V3.2 (MLA with DSA), as a baseline that can be measured.

A decode step over a filled cache, in plain torch, with the scores and tiles of our own definition
(kernels/torch/attention.py). Not a model: no weights, no projections, no prefill.
Read next: generations.py (both generations, measured).

Letters: H heads, I indexer heads, J indexer width, C latent width, R rotary width, N rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from overleap.config import ModelConfig
from overleap.kernels.torch.attention import TILE_VALUES, index_scores

LATENT_GROUP = 128  # e4m3 values that share a float32 scale
TOPK = 2048
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Shape:
    """Of a layer. The release has 128 heads, 512 + 64, an indexer of 64 x 128.

    Bytes of a row: C + 4 C / 128 + 2 R of latent (656), J + 4 J / 128 of indexer key (132).
    """

    heads: int
    latent: int
    rope: int
    index_heads: int
    index_dim: int
    topk: int = TOPK

    @classmethod
    def like(cls, config: ModelConfig) -> "Shape":
        """A V3.2 layer of this model's width: its heads, and its row and key sizes."""
        return cls(
            config.num_attention_heads,
            config.head_dim,
            config.qk_rope_head_dim,
            config.index_n_heads,
            config.index_head_dim,
        )


def pack(values_NK: Tensor) -> Tensor:
    """u8 [N, K + 4 ceil(K / 128)]: e4m3 values, then a float32 scale for each 128 of them."""
    n, width = values_NK.shape
    groups = -(-width // LATENT_GROUP)
    padded = torch.nn.functional.pad(values_NK.float(), (0, groups * LATENT_GROUP - width))
    grouped = padded.view(n, groups, LATENT_GROUP)
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-4) / LARGEST
    codes = (grouped / scale).to(torch.float8_e4m3fn).view(torch.uint8).reshape(n, -1)[:, :width]
    return torch.cat((codes, scale.view(n, groups).contiguous().view(torch.uint8)), dim=1)


def unpack(rows: Tensor, width: int) -> Tensor:
    """f32 [N, K] of what `pack` wrote; rows may be longer."""
    groups = -(-width // LATENT_GROUP)
    values = rows[:, :width].contiguous().view(torch.float8_e4m3fn).float()
    scale = rows[:, width : width + 4 * groups].clone().view(torch.float32)
    return values * scale.repeat_interleave(LATENT_GROUP, dim=1)[:, :width]


@dataclass(frozen=True)
class Layer:
    """The cache of one layer of one sequence.

    rows  u8 [N, 656]: 512 e4m3, 4 float32 scales, 64 bf16 rotary dims
    keys  u8 [N, 132]: 128 e4m3, a float32 scale
    """

    shape: Shape
    rows: Tensor
    keys: Tensor

    @classmethod
    def of(cls, shape: Shape, latent_NC: Tensor, rope_NR: Tensor, key_NJ: Tensor) -> "Layer":
        """Packed from values."""
        rope = rope_NR.to(torch.bfloat16).contiguous().view(torch.uint8)
        return cls(shape, torch.cat((pack(latent_NC), rope), dim=1), pack(key_NJ))

    @property
    def nbytes(self) -> int:
        """Allocated."""
        return self.rows.nbytes + self.keys.nbytes

    def choose(self, q_IJ: Tensor, weight_I: Tensor) -> Tensor:
        """i64 [k]: the tokens with the best scores, sum of weight * relu(q . key) over heads."""
        width, best, at = self.shape.index_dim, [], []
        tile = max(64, TILE_VALUES // self.shape.index_heads)
        for low in range(0, len(self.keys), tile):
            keys = unpack(self.keys[low : low + tile], width)
            score = index_scores(q_IJ[None], weight_I[None], keys)[0]
            top = score.topk(min(self.shape.topk, len(score)))
            best.append(top.values)
            at.append(top.indices + low)
        score, number = torch.cat(best), torch.cat(at)
        return number[score.topk(min(self.shape.topk, len(score))).indices]

    def attend(self, q_HK: Tensor, chosen: Tensor, scale: float) -> Tensor:
        """f32 [H, C]: softmax over the chosen rows; a row is key (C + R) and value (C).

        q_HK  queries after absorption, C latent and R rotary dims
        """
        width, rope = self.shape.latent, self.shape.rope
        found = self.rows[chosen]
        latent = unpack(found, width)
        rotary = found[:, -2 * rope :].clone().view(torch.bfloat16).float()
        score = (q_HK @ torch.cat((latent, rotary), dim=1).t()) * scale
        return score.softmax(-1) @ latent
