"""Hash layers, learned layers and the shared expert. Arithmetic: ../kernels/test_moe.py."""

import pytest
import torch

from overleap.kernels import select
from overleap.model.moe import MoE
from tests.checkpoints import random_tensors, tiny_config

CONFIG = tiny_config(5, num_hash_layers=1, n_routed_experts=6, num_experts_per_tok=2)


def moe(hashed: bool, **changed: torch.Tensor) -> MoE:
    layer = 0 if hashed else CONFIG.num_hidden_layers - 1
    prefix = f"layers.{layer}.ffn."
    module = MoE(CONFIG, hashed, select())
    tensors = random_tensors(CONFIG, 5)
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    for name, tensor in (own | {n.replace("__", "."): t for n, t in changed.items()}).items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return module


def inputs(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, CONFIG.hidden_size, generator=generator)
    return x, torch.randint(CONFIG.vocab_size, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_hash_layers_look_up_the_token(tokens: int, seed: int) -> None:
    module = moe(hashed=True)
    x, ids = inputs(seed, tokens)
    table = module.gate.tid2eid
    assert table is not None and module.gate.bias is None
    chosen, weight = module.route(x, ids)
    assert chosen.equal(table[ids].long())
    again, other_weight = module.route(-x, ids)
    assert again.equal(chosen), "the text decides, not the vector"
    assert not other_weight.equal(weight), "the gate still weighs"


def test_learned_layers_ignore_the_token(seed: int) -> None:
    module = moe(hashed=False)
    x, ids = inputs(seed, 63)
    assert module.gate.tid2eid is None and module.gate.bias is not None
    one, other = module.route(x, ids), module.route(x, (ids + 1) % CONFIG.vocab_size)
    assert one[0].equal(other[0]) and one[1].equal(other[1])
    assert len(one[0].unique()) > 2, "more than one choice is made"


@pytest.mark.parametrize("hashed", [True, False])
def test_shared_expert_is_added_without_weight(hashed: bool, seed: int) -> None:
    """Without the routed experts what remains is the shared one alone, clamped."""
    x, ids = inputs(seed, 9)
    x = 20 * x  # the clamp at 10 takes part
    zero = {
        f"experts__{e}__w2__weight": torch.zeros(CONFIG.hidden_size, CONFIG.moe_intermediate_size)
        for e in range(CONFIG.n_routed_experts)
    }
    module = moe(hashed, **zero)
    shared = module.shared_experts
    gate = (x @ shared.w1.weight.t()).clamp(max=CONFIG.swiglu_limit)
    up = (x @ shared.w3.weight.t()).clamp(-CONFIG.swiglu_limit, CONFIG.swiglu_limit)
    expected = (gate * torch.sigmoid(gate) * up) @ shared.w2.weight.t()
    assert (module(x, ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert ((x @ shared.w1.weight.t()) > CONFIG.swiglu_limit).any()
