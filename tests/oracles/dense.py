"""The whole model a second time, from the equations: float64, one text, everything dense.

No cache, no pages, no chunks, no streaming softmax, no code of the package: masks over all
positions, loops where they are plainest, number formats by search in a table of all values. Slow,
and meant to be read beside the report. Read next: test_mtp.py, test_release.py.

Letters as in the package: T tokens, D hidden, M streams, H heads, K head width, S entries.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from overleap.config import ModelConfig

E4M3 = [m * 2.0**-9 for m in range(8)] + [
    (1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)
][:-1]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def to_grid(x: Tensor, group: int, grid: list[float], floor: float) -> Tensor:
    """Quantise and dequantise groups along the last dim with a power-of-two scale (section 3.6).

    scale = 2^ceil(log2(max(amax, floor) / largest)); nearest value, a tie goes to the even code.
    """
    values = torch.tensor(grid, dtype=torch.float64)
    middle = (values[1:] + values[:-1]) / 2
    parts = []
    for part in x.split(group, dim=-1):
        fraction, exponent = torch.frexp(
            part.abs().amax(-1, keepdim=True).clamp(min=floor) / grid[-1]
        )
        scale = torch.exp2((exponent - (fraction == 0.5).int()).double())
        size = part.abs() / scale
        code = torch.bucketize(size, middle)  # a tie falls to the lower code
        tie = size == middle[code.clamp(max=len(middle) - 1)]
        code = code + (tie & (code % 2 == 1)).long()
        parts.append(values[code] * scale * part.sign())
    return torch.cat(parts, dim=-1)


def fp8(x: Tensor, group: int) -> Tensor:
    """As activations and cache entries are rounded."""
    return to_grid(x, group, E4M3, 1e-4)


def fp4(x: Tensor) -> Tensor:
    """As indexer queries and keys are rounded."""
    return to_grid(x, 32, E2M1, 6 * 2.0**-126)


def weight_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors as float64 values: FP8 blocks of 128 x 128, FP4 groups of 32 inputs."""
    values = {}
    for name, tensor in tensors.items():
        scale_name = name.removesuffix("weight") + "scale"
        if name.endswith(".scale") or tensor.dtype in (torch.int32, torch.int64):
            continue
        if not name.endswith(".weight") or scale_name not in tensors:
            values[name] = tensor.double()
            continue
        scale = torch.exp2(tensors[scale_name].view(torch.uint8).double() - 127)
        if tensor.dtype is torch.int8:
            byte = tensor.view(torch.uint8).long()
            code = torch.stack((byte & 15, byte >> 4), dim=-1).flatten(1)
            value = torch.tensor(E2M1 + [-v for v in E2M1], dtype=torch.float64)[code]
            values[name] = value * scale.repeat_interleave(32, 1)
        else:
            rows, columns = tensor.shape
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            values[name] = tensor.float().double() * spread[:rows, :columns]
    return values


@dataclass
class Dense:
    """A model from its stored tensors.

    release  round cache entries and indexer vectors as the release format does
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    release: bool = False
    w: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.w = weight_values(self.tensors)

    def forward(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and the streams [T, M, D] after the last main layer."""
        ids_T = torch.tensor(ids)
        x_TMD = self.w["embed.weight"][ids_T][:, None].repeat(1, self.config.hc_mult, 1)
        for number, ratio in enumerate(
            self.config.compress_ratios[: self.config.num_hidden_layers]
        ):
            x_TMD = self.block(f"layers.{number}", ratio, x_TMD, ids_T)
        return self.head("", x_TMD), x_TMD

    def draft(self, x_TMD: Tensor, next_ids: list[int]) -> tuple[Tensor, Tensor]:
        """Section 3.8: logits of the tokens after `next_ids`, and the streams of the block."""
        ids_T = torch.tensor(next_ids)
        token = self.norm(self.w["embed.weight"][ids_T], "mtp.0.enorm")
        past = self.norm(x_TMD, "mtp.0.hnorm")
        x_TMD = self.linear(token, "mtp.0.e_proj")[:, None] + self.linear(past, "mtp.0.h_proj")
        x_TMD = self.block("mtp.0", 0, x_TMD, ids_T)
        return self.head("mtp.0.", x_TMD), x_TMD

    def head(self, prefix: str, x_TMD: Tensor) -> Tensor:
        """Gated sum of the streams, final norm, shared head (section 3.2)."""
        mix = self.flat_norm(x_TMD) @ self.w[f"{prefix}hc_head_fn"].t()
        gate = torch.sigmoid(
            mix * self.w[f"{prefix}hc_head_scale"] + self.w[f"{prefix}hc_head_base"]
        )
        collapsed = ((gate + self.config.hc_eps)[..., None] * x_TMD).sum(1)
        return self.norm(collapsed, f"{prefix}norm") @ self.w["head.weight"].t()

    def block(self, name: str, ratio: int, x_TMD: Tensor, ids_T: Tensor) -> Tensor:
        """Section 3.1: two sub-layers, each between a collapse and a spread."""
        y, post, comb = self.collapse(f"{name}.hc_attn", x_TMD)
        y = self.attention(f"{name}.attn", ratio, self.norm(y, f"{name}.attn_norm"))
        x_TMD = self.spread(y, x_TMD, post, comb)
        y, post, comb = self.collapse(f"{name}.hc_ffn", x_TMD)
        y = self.experts(f"{name}.ffn", self.norm(y, f"{name}.ffn_norm"), ids_T)
        return self.spread(y, x_TMD, post, comb)

    # Section 3.2.

    def flat_norm(self, x_TMD: Tensor) -> Tensor:
        flat = x_TMD.flatten(1)
        return flat / (flat.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()

    def collapse(self, name: str, x_TMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, eps = self.config.hc_mult, self.config.hc_eps
        mix = self.flat_norm(x_TMD) @ self.w[f"{name}_fn"].t()
        base, scale = self.w[f"{name}_base"], self.w[f"{name}_scale"]
        pre = torch.sigmoid(mix[:, :m] * scale[0] + base[:m]) + eps
        post = 2 * torch.sigmoid(mix[:, m : 2 * m] * scale[1] + base[m : 2 * m])
        comb = (mix[:, 2 * m :] * scale[2] + base[2 * m :]).view(-1, m, m).softmax(2) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return (pre[..., None] * x_TMD).sum(1), post, comb

    def spread(self, y: Tensor, x_TMD: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, x_TMD)

    # Small parts.

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        x = x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return x if name is None else x * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A packed linear rounds its input to FP8 in groups of 128."""
        if f"{name}.scale" in self.tensors:
            x = fp8(x, 128)
        return x @ self.w[f"{name}.weight"].t()

    def turn(self, x: Tensor, position: Tensor, ratio: int, sign: int = 1) -> Tensor:
        """Rotate the last R dims by position, in pairs (2i, 2i + 1); x [T, K] or [T, H, K]."""
        c, r = self.config, self.config.qk_rope_head_dim
        theta = c.compress_rope_theta if ratio else c.rope_theta
        frequency = torch.tensor([theta ** (-2 * i / r) for i in range(r // 2)]).double()
        if ratio and c.rope_scaling is not None:
            frequency = self.yarn(frequency, theta)
        angle = sign * position.double()[:, None] * frequency
        turn = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.view_as_complex(x[..., -r:].unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * (turn if x.dim() == 2 else turn[:, None])
        return torch.cat((x[..., :-r], torch.view_as_real(turned).flatten(-2)), dim=-1)

    def yarn(self, frequency: Tensor, theta: float) -> Tensor:
        """Keep fast pairs, slow the slow ones by the factor, blend between (YaRN, NTK by parts)."""
        y, r = self.config.rope_scaling, self.config.qk_rope_head_dim
        assert y is not None
        length = y.original_max_position_embeddings

        def pair(turns: float) -> float:
            return r / 2 * math.log(length / (2 * math.pi * turns)) / math.log(theta)

        low, high = max(math.floor(pair(y.beta_fast)), 0), min(math.ceil(pair(y.beta_slow)), r - 1)
        scaled = []
        for i, f in enumerate(frequency.tolist()):
            slow = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            scaled.append(f * (1 - slow) + f / y.factor * slow)
        return torch.tensor(scaled, dtype=torch.float64)

    def entry_values(self, x_TK: Tensor) -> Tensor:
        """A window row or compressed entry as the cache gives it back."""
        if not self.release:
            return x_TK
        plain = x_TK.shape[-1] - self.config.qk_rope_head_dim
        rope = x_TK[..., plain:].to(torch.bfloat16).double()
        return torch.cat((fp8(x_TK[..., :plain], 64), rope), dim=-1)

    def index_values(self, x: Tensor) -> Tensor:
        """Hadamard transform by its matrix, then FP4; leaves products as they are without FP4."""
        n = x.shape[-1]
        sign = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
        x = x @ torch.tensor(sign, dtype=torch.float64) / math.sqrt(n)
        return fp4(x) if self.release else x

    # Sections 3.3 to 3.5.

    def compressed(self, name: str, ratio: int, x_TD: Tensor) -> Tensor:
        """Entries [S, K] of all whole blocks, before rounding."""
        value, gate = (x_TD @ self.w[f"{name}.{part}.weight"].t() for part in ("wkv", "wgate"))
        ape, entries = self.w[f"{name}.ape"], []
        half = ape.shape[1] // 2
        for i in range(x_TD.shape[0] // ratio):
            here = slice(i * ratio, (i + 1) * ratio)
            v, g = value[here], gate[here] + ape
            if (
                ratio == 4
            ):  # overlapped: own series from the second half, first from the block before
                v, g = v[:, half:], g[:, half:]
                if i:
                    before = slice((i - 1) * ratio, i * ratio)
                    v = torch.cat((value[before, :half], v))
                    g = torch.cat(((gate[before] + ape)[:, :half], g))
            entries.append((v * g.softmax(0)).sum(0))
        if not entries:
            return x_TD.new_empty(0, self.w[f"{name}.norm.weight"].shape[0])
        pooled = self.norm(torch.stack(entries), f"{name}.norm")
        return self.turn(pooled, torch.arange(len(entries)) * ratio, ratio)

    def visible(self, name: str, ratio: int, x_TD: Tensor, latent: Tensor, count: int) -> Tensor:
        """Which entries each token attends to: bool [T, S]."""
        position = torch.arange(x_TD.shape[0])
        seen = torch.arange(count) < ((position + 1) // ratio)[:, None]
        if ratio != 4 or not count:
            return seen
        keys = self.index_values(self.compressed(f"{name}.compressor", ratio, x_TD))
        heads, width = self.config.index_n_heads, self.config.index_head_dim
        q = self.linear(latent, f"{name}.wq_b").unflatten(-1, (heads, width))
        q = self.index_values(self.turn(q, position, ratio))
        weight = x_TD @ self.w[f"{name}.weights_proj.weight"].t() * (heads * width) ** -0.5
        score = (torch.einsum("tij,sj->tis", q, keys).relu() * weight[..., None]).sum(1)
        score = score.masked_fill(~seen, -torch.inf)
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : self.config.index_topk]
        return seen & torch.zeros_like(seen).scatter(1, best, True)

    def attention(self, name: str, ratio: int, x_TD: Tensor) -> Tensor:
        c, position = self.config, torch.arange(x_TD.shape[0])
        latent = self.norm(self.linear(x_TD, f"{name}.wq_a"), f"{name}.q_norm")
        q = self.linear(latent, f"{name}.wq_b").unflatten(-1, (c.num_attention_heads, c.head_dim))
        q = self.turn(self.norm(q, None), position, ratio)
        rows = self.norm(self.linear(x_TD, f"{name}.wkv"), f"{name}.kv_norm")
        rows = self.entry_values(self.turn(rows, position, ratio))
        age = position[:, None] - position
        seen = (age >= 0) & (age < c.sliding_window)
        if ratio:
            entries = self.compressed(f"{name}.compressor", ratio, x_TD)
            seen_S = self.visible(f"{name}.indexer", ratio, x_TD, latent, len(entries))
            rows, seen = torch.cat((rows, self.entry_values(entries))), torch.cat((seen, seen_S), 1)
        score = torch.einsum("thk,nk->thn", q, rows) * c.head_dim**-0.5
        score = score.masked_fill(~seen[:, None], -torch.inf)
        sink = self.w[f"{name}.attn_sink"][:, None].expand(len(x_TD), -1, 1)
        share = torch.cat((score, sink), dim=2).softmax(2)[..., :-1]  # eq. 27: denominator only
        out = self.turn(torch.einsum("thn,nk->thk", share, rows), position, ratio, sign=-1)
        groups = out.flatten(1).unflatten(1, (c.o_groups, -1))
        wo_a = self.w[f"{name}.wo_a.weight"].unflatten(0, (c.o_groups, -1))
        return self.linear(torch.einsum("tgi,gni->tgn", groups, wo_a).flatten(1), f"{name}.wo_b")

    # Section 3.7.

    def experts(self, name: str, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        c = self.config
        affinity = F.softplus(x_TD @ self.w[f"{name}.gate.weight"].t()).sqrt()
        table = self.tensors.get(f"{name}.gate.tid2eid")
        if table is None:
            ranked = affinity + self.w[f"{name}.gate.bias"]
            order = ranked.sort(dim=1, descending=True, stable=True).indices
            chosen = order[:, : c.num_experts_per_tok]
        else:
            chosen = table[ids_T].long()
        share = affinity.gather(1, chosen)
        share = share / share.sum(1, keepdim=True) * c.routed_scaling_factor
        out = self.expert(f"{name}.shared_experts", x_TD, torch.ones(len(x_TD)).double())
        for number in range(c.n_routed_experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            one = self.expert(f"{name}.experts.{number}", x_TD[token], share[token, place])
            out = out.index_add(0, token, one)
        return out

    def expert(self, name: str, x_TD: Tensor, weight_T: Tensor) -> Tensor:
        limit = self.config.swiglu_limit
        gate = self.linear(x_TD, f"{name}.w1").clamp(max=limit)
        up = self.linear(x_TD, f"{name}.w3").clamp(-limit, limit)
        return self.linear(F.silu(gate) * up * weight_T[:, None], f"{name}.w2")
