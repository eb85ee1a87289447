"""The assembled model: names, rows of logits, lengths, and that nothing in it is without effect.

That the values are right is shown by ../oracles, that they do not depend on cuts by ../test_state.
"""

import re

import pytest
import torch

from overleap.cache.layout import CacheFormat
from overleap.checkpoint import tensor_table
from overleap.config import ModelConfig
from overleap.model.transformer import Batch, Transformer
from tests.checkpoints import random_tensors, tiny_config
from tests.oracles.running import build, distance, draw_ids, feed, room, start
from tests.oracles.steady import Steady

WIDE = CacheFormat.WIDE


def small(seed: int, form: str = "f32") -> tuple[ModelConfig, Transformer, torch.Generator]:
    config = tiny_config(seed, form, compress_ratios=(0, 4, 128), index_n_heads=16, index_topk=8)
    model = build(config, random_tensors(config, seed))
    return config, model, torch.Generator().manual_seed(seed)


def test_names_are_the_official_ones(seed: int) -> None:
    """Parameters of the unfilled model are the tensors of the checkpoint, scales aside."""
    config = tiny_config(seed, "release")
    model = Transformer(config)
    table = tensor_table(config)
    assert {n for n in table if not n.endswith(".scale")} == set(dict(model.named_parameters()))
    assert all(p.is_meta for p in model.parameters())
    plain = tensor_table(tiny_config(seed, "f32"))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: spec.shape for n, spec in plain.items()
    }


@pytest.mark.parametrize("form", ["f32", "release", "base"])
def test_assign_takes_every_tensor_as_it_is(form: str, seed: int) -> None:
    """Packed bytes stay packed: same storage, same dtype, no copy."""
    config = tiny_config(seed, form)
    tensors, model = random_tensors(config, seed), Transformer(config)
    model.assign(tensors)
    held = dict(model.named_parameters())
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert held[name].data_ptr() == tensor.data_ptr(), name
        assert held[name].dtype is tensor.dtype, name
        assert not held[name].requires_grad


def test_rows_of_logits(seed: int) -> None:
    """`all`, `last`, `none` and marks choose rows of the same step."""
    config, model, generator = small(seed)
    texts = [draw_ids(config, n, generator) for n in (1, 63, 130)]

    def step(rows: str | list[int]) -> torch.Tensor:
        cache = room(config, 130, WIDE, slots=3)
        parts = [(start(cache, len(ids)), ids) for ids in texts]
        out = model(Batch.of(parts, cache, rows), cache)  # type: ignore[arg-type]
        assert [s.length for s, _ in parts] == [1, 63, 130]
        assert out.streams.shape == (194, config.hc_mult, config.hidden_size)
        assert len(out.hidden) == len(out.logits)
        logits: torch.Tensor = out.logits
        return logits

    every = step("all")
    assert every.shape == (194, config.vocab_size)
    assert every.dtype is torch.float32
    assert distance(step("last"), every[[0, 63, 193]]) <= 1e-5
    assert distance(step([0, 1, 1]), every[[63, 193]]) <= 1e-5
    assert step("none").shape == step([0, 0, 0]).shape == (0, config.vocab_size)


def test_no_token_sees_what_follows(seed: int) -> None:
    """Changing one token changes its logits and those behind, and none before."""
    config, model, generator = small(seed)
    ids = draw_ids(config, 200, generator)

    def logits(text: list[int]) -> torch.Tensor:
        cache = room(config, 200, WIDE, slots=1)
        with Steady():  # another token means other shapes of the experts' products
            return feed(model, cache, start(cache, 200), text)

    before = logits(ids)
    for at in (0, 1, 126, 127, 128, 199):
        other = list(ids)
        other[at] = (ids[at] + 1) % config.vocab_size
        after = logits(other)
        assert not at or distance(after[:at], before[:at]) <= 1e-6
        assert distance(after[at], before[at]) > 1e-3


def test_far_tokens_are_seen_through_entries_alone(seed: int) -> None:
    """Beyond the window a sliding model forgets; CSA and HCA layers remember, block by block."""
    for ratios, remembers in (((0, 0), False), ((4, 0), True), ((128, 0), True)):
        config = tiny_config(seed, compress_ratios=ratios, index_topk=4096)
        model = build(config, random_tensors(config, seed))
        ids = draw_ids(config, 700, torch.Generator().manual_seed(seed))
        last = []
        for first in (ids[0], (ids[0] + 1) % config.vocab_size):
            cache = room(config, 700, WIDE, slots=1)
            with Steady():
                last.append(feed(model, cache, start(cache, 700), [first, *ids[1:]])[-1])
        # Two sliding layers reach 2 * 127 tokens back.
        assert (distance(*last) > 1e-6) == remembers, ratios


def test_every_tensor_matters(seed: int) -> None:
    """Any tensor of another value changes the logits, of the main model or of the draft."""
    # With one expert a token its share is 1, whatever the gate of a hash layer says.
    config = tiny_config(
        seed, compress_ratios=(0, 4, 128), index_topk=3, num_hash_layers=1, num_experts_per_tok=2
    )
    tensors = random_tensors(config, seed)
    ids = draw_ids(config, 140, torch.Generator().manual_seed(seed))
    following = torch.tensor([*ids[1:], 0])

    def outcome(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        model = build(config, tensors | changed)
        cache = room(config, 140, WIDE, slots=1)
        batch = Batch.of([(start(cache, 140), ids)], cache, "all")
        out = model(batch, cache)
        drafted, _ = model.draft(out.streams, following, cache, batch.spans)
        return torch.stack((out.logits, drafted))

    usual = outcome({})
    kinds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        other = -tensor if tensor.is_floating_point() else (tensor + 1) % config.n_routed_experts
        # All experts together: one alone may not be chosen here.
        kinds.setdefault(re.sub(r"experts\.\d+", "experts.*", name), {})[name] = other
    for kind, changed in kinds.items():
        assert distance(outcome(changed), usual) > 1e-4, kind


def test_a_step_needs_its_pages(seed: int) -> None:
    config, _, _ = small(seed)
    cache = room(config, 128, WIDE, slots=1)
    sequence = start(cache, 128)
    with pytest.raises(AssertionError, match="pages not reserved"):
        Batch.of([(sequence, [0] * 129)], cache)
    with pytest.raises(AssertionError, match="without new tokens"):
        Batch.of([(sequence, [])], cache)


def test_no_draft_block(seed: int) -> None:
    """Without MTP layers there are none, and the model runs."""
    config = tiny_config(seed, num_nextn_predict_layers=0)
    model = build(config, random_tensors(config, seed))
    cache = room(config, 5, WIDE, slots=1)
    assert len(model.mtp) == 0
    assert feed(model, cache, start(cache, 5), [1, 2, 3, 4, 5]).isfinite().all()


def test_bfloat16_runs(seed: int) -> None:
    """Activations in bf16, as on an accelerator: near the float32 model, finite everywhere."""
    config = tiny_config(seed, "bf16", index_topk=4096)
    tensors = random_tensors(config, seed)
    ids = draw_ids(config, 140, torch.Generator().manual_seed(seed))
    model = Transformer(config)
    model.assign(tensors)
    results = []
    for one in (model, build(config, tensors)):
        cache = room(config, 140, CacheFormat.RELEASE, slots=1)
        results.append(feed(one, cache, start(cache, 140), ids, 37))
    low, exact = results
    assert low.dtype is torch.float32
    by_position = (low - exact).abs().amax(1) / exact.abs().max()
    # 8 bits of significand through a few layers; an expert may be another where two are close.
    assert by_position.median() <= 0.1
