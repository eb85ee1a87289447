"""The losses: zero where they should be, exact against a slow formulation, blind to the future."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from overleap.kernels.torch.linear import hadamard, rotate
from overleap.train import losses
from overleap.train.attend import Tiles
from overleap.train.losses import Asked, Index
from overleap.train.ops import Seen
from overleap.train.recipe import Stage
from overleap.train.shards import PAD_ID
from tests.train.small import lively_weights, pass_of, random_row, small_config


def test_masks_allow_the_visible_past_and_other_documents(seed: int) -> None:
    asked = two_questions()
    allowed, gold = losses.entry_masks(asked, 64)
    assert allowed[0].tolist() == [True] * 25 + [False] * 7 + [True] * 32
    assert allowed[1].tolist() == [True] * 32 + [True] * 15 + [False] * 17
    assert gold[0].nonzero().flatten().tolist() == [4, 5]
    assert gold[1].nonzero().flatten().tolist() == [32 + 10, 32 + 11]


def test_retrieval_is_zero_when_all_mass_is_on_the_fact(seed: int) -> None:
    torch.manual_seed(seed)
    asked = Asked(*(torch.tensor([n]) for n in (100, 17, 0, 128)))
    queries = 0.5 + torch.rand(128, 2, 16)  # no head turns away from what another looks for
    entries = torch.zeros(32, 16)
    entries[4] = queries[100].sum(0) * 100
    sink = torch.zeros(2)
    loss, top = losses.retrieval_loss((queries, entries, sink, sink), asked, None, None)
    assert loss < 1e-3 and top == 1
    entries[4] = 0  # 25 visible entries and the sink share alike, two of them hold the fact
    loss, _ = losses.retrieval_loss((queries, entries, sink, sink), asked, None, None)
    assert float(loss) == pytest.approx(math.log(26 / 2), rel=1e-5)


def test_shifting_a_query_is_rotating_it_further(seed: int) -> None:
    torch.manual_seed(seed)
    frequency = torch.rand(8)
    q = torch.randn(5, 3, 40)
    position, more = torch.randint(0, 500, (5,)), torch.randint(0, 500, (5,))
    shifted = losses.shifted(rotate(q, position, frequency, False), frequency, more)
    torch.testing.assert_close(
        shifted, rotate(q, position + more, frequency, False), atol=1e-3, rtol=1e-3
    )


def test_index_scores_follow_equation_16(seed: int) -> None:
    torch.manual_seed(seed)
    q, weight, keys = torch.randn(3, 2, 8), torch.randn(3, 2), torch.randn(5, 8)
    scores = losses.index_scores(q, weight, keys)
    for t in range(3):
        for s in range(5):
            want = sum(weight[t, i] * torch.relu(q[t, i] @ keys[s]) for i in range(2))
            assert float(scores[t, s]) == pytest.approx(float(want), abs=1e-4)


def test_guided_index_loss_does_not_mind_the_hadamard_transform(seed: int) -> None:
    torch.manual_seed(seed)
    asked = two_questions()
    q, keys = torch.randn(256, 2, 16), torch.randn(64, 16)
    weight, none = torch.randn(256, 2), torch.zeros(2)
    plain = Index(q, weight, keys)
    mixed = Index(hadamard(q), weight, hadamard(keys))
    frequency = torch.rand(4)
    ours, _ = losses.guided_index_loss(mixed, asked, frequency, none)
    theirs, _ = losses.guided_index_loss(
        Index(hadamard(plain.queries), weight, hadamard(plain.keys)), asked, frequency, none
    )
    scores = losses.index_scores(q[asked.at_N], weight[asked.at_N], keys)
    allowed, gold = losses.entry_masks(asked, 64)
    chance = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    want = -(chance * gold).sum(-1).log().mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


def test_distillation_is_zero_for_a_student_that_agrees(seed: int) -> None:
    torch.manual_seed(seed)
    length, heads, width = 128, 1, 8
    tiles = Tiles.of([length])
    queries, entries = torch.randn(length, heads, width), torch.randn(32, width)
    lse = torch.full((length, heads), 3.0)
    seen = (queries, entries, torch.zeros(heads), lse)
    rows = torch.arange(3, length)
    # relu(x) - relu(-x) = x: two heads of opposite sign score exactly the attention's logits.
    q = torch.cat((queries, -queries), dim=1)
    weight = torch.tensor([[1.0, -1.0]]).expand(length, 2) * width**-0.5
    agrees = losses.distillation_loss(seen, Index(q, weight, entries), rows, tiles, 32)
    assert abs(float(agrees)) < 1e-4
    other = Index(torch.randn(length, 2, width), weight, entries)
    assert losses.distillation_loss(seen, other, rows, tiles, 32) > 0.01


def test_distillation_has_no_gradient_for_its_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(128, 1, 8, requires_grad=True)
    entries = torch.randn(32, 8, requires_grad=True)
    keys = torch.randn(32, 8, requires_grad=True)
    seen = (queries, entries, torch.zeros(1), torch.zeros(128, 1))
    index = Index(torch.randn(128, 2, 8), torch.rand(128, 2), keys)
    losses.distillation_loss(seen, index, torch.arange(128), Tiles.of([128]), 32).backward()
    assert queries.grad is None and entries.grad is None
    assert keys.grad is not None and keys.grad.norm() > 0


def test_distillation_slopes_equal_finite_differences(seed: int) -> None:
    torch.manual_seed(seed)
    double = {"dtype": torch.float64}
    tiles = Tiles.of([128, 256])
    queries, entries = torch.randn(384, 2, 6, **double), torch.randn(96, 6, **double)
    lse = torch.randn(384, 2, **double) + 3
    rows = torch.randint(384, (12,))

    def loss(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
        seen = (queries, entries, torch.zeros(2, **double), lse)
        return losses.distillation_loss(seen, Index(q, weight, keys), rows, tiles, 96)

    index = (
        torch.randn(384, 2, 4, **double, requires_grad=True),
        torch.randn(384, 2, **double, requires_grad=True),
        torch.randn(96, 4, **double, requires_grad=True),
    )
    assert torch.autograd.gradcheck(loss, index, fast_mode=True)


def test_balance_is_least_when_even_and_biases_move_against_load() -> None:
    tiles, real = Tiles.of([128]), torch.ones(128, dtype=torch.bool)
    affinity = torch.ones(128, 4)
    even = torch.tensor([[0, 1], [2, 3]] * 64)
    crowded = torch.tensor([[0, 1]] * 128)
    lean = affinity + torch.tensor([1.0, 1.0, 0.0, 0.0])
    bias = torch.zeros(4)
    fair = losses.balance_loss(Seen(routing=[(affinity, even, bias)]), tiles, real)
    unfair = losses.balance_loss(Seen(routing=[(lean, crowded, bias)]), tiles, real)
    assert float(fair) == pytest.approx(1.0) and unfair > fair
    ((found, load),) = losses.load_of(Seen(routing=[(lean, crowded, bias)]), real)
    losses.move_bias(found, load, 0.001)
    torch.testing.assert_close(bias, torch.tensor([-0.001, -0.001, 0.001, 0.001]))


def test_balance_is_a_mean_over_documents(seed: int) -> None:
    torch.manual_seed(seed)
    affinity, ids = torch.rand(640, 4), torch.randint(4, (640, 2))
    real = torch.ones(640, dtype=torch.bool)
    first, second = (
        losses.balance_loss(
            Seen(routing=[(affinity[part], ids[part], None)]), Tiles.of([count]), real[part]
        )
        for part, count in ((slice(128), 128), (slice(128, 640), 512))
    )
    both = losses.balance_loss(Seen(routing=[(affinity, ids, None)]), Tiles.of([128, 512]), real)
    torch.testing.assert_close(both, (first * 128 + second * 512) / 640)


def test_padding_is_neither_load_nor_out_of_balance(seed: int) -> None:
    """As if the documents were shorter; one that is all padding does not count."""
    torch.manual_seed(seed)
    affinity, ids, bias = torch.rand(512, 4), torch.randint(4, (512, 2)), torch.zeros(4)
    real = torch.zeros(512, dtype=torch.bool)
    real[:100] = real[128:301] = True
    seen = Seen(routing=[(affinity, ids, bias)])
    found = losses.balance_loss(seen, Tiles.of([128, 256, 128]), real)
    parts = [
        losses.balance_loss(
            Seen(routing=[(affinity[part], ids[part], None)]), Tiles((), (), ((0, n),)), real[part]
        )
        for part, n in ((slice(100), 100), (slice(128, 301), 173))
    ]
    torch.testing.assert_close(found, (parts[0] * 100 + parts[1] * 173) / 273)
    ((_, load),) = losses.load_of(seen, real)
    assert load.tolist() == [int((ids[real] == expert).sum()) for expert in range(4)]


def test_a_pass_learns_nothing_from_padding(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts' loads and the rows that indexers are held against attention at."""
    row, config = random_row([256, 128], seed), small_config()
    ids = [*row.ids[:130], *[PAD_ID] * 126, *row.ids[256:300], *[PAD_ID] * 84]
    learn = [here and token != PAD_ID for here, token in zip(row.learn, ids, strict=True)]
    distillation, drawn = losses.distillation_loss, []

    def watched(*given: Any) -> Tensor:
        drawn.append(given[2])
        return distillation(*given)

    monkeypatch.setattr(losses, "distillation_loss", watched)
    work = pass_of(config, lively_weights(config, seed), torch.float32)
    stage = Stage(1, 384, 1, (), mtp=0.3)
    _, _, loads = work.losses(stage, [replace(row, ids=ids, learn=learn)], str(seed))
    assert [float(load.sum()) for _, load in loads] == [174 * config.num_experts_per_tok] * 3
    assert drawn and all(ids[at] != PAD_ID for rows in drawn for at in rows.tolist())


def two_questions() -> Asked:
    """One in each of two documents of 128 tokens."""
    numbers = ((100, 128 + 60), (17, 128 + 40), (0, 128), (128, 256))
    return Asked(*map(torch.tensor, numbers))
