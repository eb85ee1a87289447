"""A checkpoint as the one GGUF file that llama.cpp reads (architecture `deepseek4`).

Weights in bf16 stay bf16. Of a released checkpoint the FP4 experts keep every value (MXFP4 is the
same numbers in another order); FP8 and the other matrices become Q8_0, as is usual there.
Not a tokenizer: the vocabulary is made up, since token ids go in and come out.
Read next: llama.py (who reads it), checkpoint/table.py (the names on our side).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overleap.checkpoint import Checkpoint
from overleap.checkpoint.table import FP4, FP8, Role
from overleap.config import ModelConfig
from overleap.errors import CheckpointError
from overleap.kernels.spec import Weight
from overleap.kernels.torch.quant import dequantize

ALIGNMENT = 32
GROUP = 32  # members of a Q8_0 or MXFP4 block
SQRT_SOFTPLUS = 4  # llama.cpp's number of the router's function
Bytes = NDArray[np.uint8]

# Numbers of the format: value types of the header, tensor types of the data.
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
F32, Q8_0, I32, BF16, MXFP4 = 0, 8, 26, 30, 39

_TOP = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
} | {
    f"hc_{part}_{leaf}": f"hc_{part}_{leaf}.weight"
    for part in ("attn", "ffn")
    for leaf in ("fn", "base", "scale")
}
_EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its sources in order (experts are stacked), and how it is kept."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * _row_bytes(self.kind, self.shape[-1])


def write_gguf(folder: str | Path, path: Path, *, exact: bool = False) -> None:
    """Write the checkpoint in `folder` as one GGUF file.

    exact  every weight as float32: nothing is rounded, neither weights nor, in llama.cpp, what
           they are multiplied with
    Raises CheckpointError for a model that llama.cpp's reader would refuse.
    """
    checkpoint = Checkpoint(Path(folder))
    config = checkpoint.config
    if config.hc_mult != 4:
        raise CheckpointError(f"hc_mult is {config.hc_mult}, llama.cpp knows 4 streams only")
    tensors = list(_tensors(checkpoint, exact))
    with path.open("wb") as file:
        _write_header(file, config, tensors)
        for tensor in tensors:
            _pad(file)
            for source in tensor.sources:
                file.write(_encoded(checkpoint, source, tensor.kind).tobytes())
        _pad(file)


def _tensors(checkpoint: Checkpoint, exact: bool) -> Iterator[_Tensor]:
    config = checkpoint.config
    for name, spec in checkpoint.table.items():
        if spec.role is Role.SCALE or name.startswith("mtp."):
            continue
        if spec.role is Role.EXPERT:
            layer, _, rest = name.removeprefix("layers.").partition(".ffn.experts.")
            number, part, _ = rest.split(".")
            if number != "0":
                continue  # stacked with the first
            sources = tuple(
                f"layers.{layer}.ffn.experts.{other}.{part}.weight"
                for other in range(config.n_routed_experts)
            )
            target = f"blk.{layer}.{_EXPERTS[part]}.weight"
        else:
            sources, target = (name,), _target(name)
        rows, *rest_ = spec.shape
        shape = (rows, spec.elements // rows) if rest_ else (rows,)
        whole = (len(sources), *shape) if spec.role is Role.EXPERT else shape
        yield _Tensor(target, sources, whole, _kind(name, spec.role, spec.storage, shape, exact))


def _target(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    layer, _, rest = name.removeprefix("layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest]}"


def _kind(
    name: str, role: Role, storage: tuple[str, ...], shape: tuple[int, ...], exact: bool
) -> int:
    """How llama.cpp gets a tensor; norms, streams, sinks, biases and the router are float32."""
    if role is Role.IDS:
        return I32
    if exact or role is Role.SMALL or len(shape) == 1 or name.endswith(".gate.weight"):
        return F32
    if storage == FP4:
        return MXFP4
    packed = storage == FP8 or role is Role.MATRIX
    return Q8_0 if packed and shape[-1] % GROUP == 0 else BF16


def _row_bytes(kind: int, width: int) -> int:
    if kind in (Q8_0, MXFP4):
        return width // GROUP * (34 if kind == Q8_0 else 17)
    return width * (2 if kind == BF16 else 4)


def _encoded(checkpoint: Checkpoint, name: str, kind: int) -> NDArray[Any]:
    tensor = checkpoint.tensor(name)
    scale = name.removesuffix("weight") + "scale"
    if kind == I32:
        return tensor.to(torch.int32).numpy()
    if kind == MXFP4:
        return _mxfp4(tensor, checkpoint.tensor(scale))
    if scale in checkpoint.table:
        tensor = dequantize(Weight(tensor, checkpoint.tensor(scale)), torch.float32)
    if kind == BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    return _q8_0(tensor.float()) if kind == Q8_0 else tensor.float().numpy()


def _mxfp4(packed: Tensor, scale: Tensor) -> Bytes:
    """Two values a byte: neighbours in a checkpoint, 16 apart within a group here."""
    groups = packed.view(torch.uint8).numpy().reshape(-1, GROUP // 2)
    codes = np.stack((groups & 15, groups >> 4), -1).reshape(-1, GROUP)
    halves = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4
    return np.concatenate((scale.view(torch.uint8).numpy().reshape(-1, 1), halves), 1)


def _q8_0(values: Tensor) -> Bytes:
    """32 neighbours share a half-precision step of amax / 127."""
    groups = values.numpy().reshape(-1, GROUP)
    step = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint(groups * inverse).astype(np.int8)
    return np.concatenate((step.astype(np.float16).view(np.uint8), codes.view(np.uint8)), 1)


def _facts(c: ModelConfig) -> dict[str, Any]:
    """The keys of architecture deepseek4."""
    layers = c.num_hidden_layers
    facts: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": layers,
        "feed_forward_length": c.moe_intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.output_group_count": c.o_groups,
        "attention.sliding_window": c.sliding_window,
        "attention.compress_ratios": list(c.compress_ratios[:layers]),
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "expert_gating_func": SQRT_SOFTPLUS,
        "swiglu_clamp_exp": [c.swiglu_limit] * layers,
        "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": c.hc_eps,
    }
    if c.rope_scaling is not None:
        facts |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": c.rope_scaling.factor,
            "rope.scaling.original_context_length": (
                c.rope_scaling.original_max_position_embeddings
            ),
            "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
        }
    return {f"deepseek4.{name}": value for name, value in facts.items()}


def _write_header(file: BinaryIO, c: ModelConfig, tensors: list[_Tensor]) -> None:
    pairs: dict[str, Any] = {
        "general.architecture": "deepseek4",
        "general.alignment": ALIGNMENT,
        **_facts(c),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(c.vocab_size)],
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.bos_token_id": c.bos_token_id,
        "tokenizer.ggml.eos_token_id": c.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
    for key, value in pairs.items():
        file.write(_text(key) + _value(value))
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # the format counts from the innermost
        file.write(_text(tensor.name))
        file.write(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, offset))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _value(value: Any) -> bytes:
    """A value with its type before it; lists are of one type."""
    if isinstance(value, list):
        kind, _ = _scalar(value[0])
        body = b"".join(_scalar(item)[1] for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body
    kind, body = _scalar(value)
    return struct.pack("<I", kind) + body


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    return _STRING, _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
