"""The losses: zero where they should be, exact against a slow formulation, blind to the future."""

import math

import pytest
import torch

from overleap.kernels.torch.linear import hadamard, rotate
from overleap.train import losses
from overleap.train.losses import Asked, Index
from overleap.train.ops import Seen


def test_masks_allow_the_visible_past_and_other_documents(seed: int) -> None:
    asked = Asked(torch.tensor([100, 128 + 60]), torch.tensor([17, 128 + 40]), 128)
    allowed, gold = losses.entry_masks(asked, 2, 32)
    assert allowed[0].tolist() == [True] * 25 + [False] * 7 + [True] * 32
    assert allowed[1].tolist() == [True] * 32 + [True] * 15 + [False] * 17
    assert gold[0].nonzero().flatten().tolist() == [4, 5]
    assert gold[1].nonzero().flatten().tolist() == [32 + 10, 32 + 11]


def test_retrieval_is_zero_when_all_mass_is_on_the_fact(seed: int) -> None:
    torch.manual_seed(seed)
    asked = Asked(torch.tensor([100]), torch.tensor([17]), 128)
    queries = 0.5 + torch.rand(128, 2, 16)  # no head turns away from what another looks for
    entries = torch.zeros(1, 32, 16)
    entries[0, 4] = queries[100].sum(0) * 100
    sink = torch.zeros(2)
    loss, top = losses.retrieval_loss((queries, entries, sink, sink), asked, None, None)
    assert loss < 1e-3 and top == 1
    entries[0, 4] = 0  # 25 visible entries and the sink share alike, two of them hold the fact
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
    asked = Asked(torch.tensor([100, 128 + 60]), torch.tensor([17, 128 + 40]), 128)
    q, keys = torch.randn(256, 2, 16), torch.randn(64, 16)
    weight, none = torch.randn(256, 2), torch.zeros(2)
    plain = Index(q, weight, keys)
    mixed = Index(hadamard(q), weight, hadamard(keys))
    frequency = torch.rand(4)
    ours, _ = losses.guided_index_loss(mixed, asked, 2, frequency, none)
    theirs, _ = losses.guided_index_loss(
        Index(hadamard(plain.queries), weight, hadamard(plain.keys)), asked, 2, frequency, none
    )
    scores = losses.index_scores(q[asked.at_N], weight[asked.at_N], keys)
    allowed, gold = losses.entry_masks(asked, 2, 32)
    chance = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    want = -(chance * gold).sum(-1).log().mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)


def test_distillation_is_zero_for_a_student_that_agrees(seed: int) -> None:
    torch.manual_seed(seed)
    length, heads, width = 64, 1, 8
    queries, entries = torch.randn(length, heads, width), torch.randn(1, 16, width)
    lse = torch.full((length, heads), 3.0)
    seen = (queries, entries, torch.zeros(heads), lse)
    rows = torch.arange(3, length)
    # relu(x) - relu(-x) = x: two heads of opposite sign score exactly the attention's logits.
    q = torch.cat((queries, -queries), dim=1)
    weight = torch.tensor([[1.0, -1.0]]).expand(length, 2) * width**-0.5
    agrees = losses.distillation_loss(seen, Index(q, weight, entries[0]), rows, length)
    assert abs(float(agrees)) < 1e-4
    other = Index(torch.randn(length, 2, width), weight, entries[0])
    assert losses.distillation_loss(seen, other, rows, length) > 0.01


def test_distillation_has_no_gradient_for_its_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    queries = torch.randn(64, 1, 8, requires_grad=True)
    entries = torch.randn(1, 16, 8, requires_grad=True)
    keys = torch.randn(16, 8, requires_grad=True)
    seen = (queries, entries, torch.zeros(1), torch.zeros(64, 1))
    index = Index(torch.randn(64, 2, 8), torch.rand(64, 2), keys)
    losses.distillation_loss(seen, index, torch.arange(64), 64).backward()
    assert queries.grad is None and entries.grad is None
    assert keys.grad is not None and keys.grad.norm() > 0


def test_balance_is_least_when_even_and_biases_move_against_load() -> None:
    affinity = torch.ones(8, 4)
    even = torch.tensor([[0, 1], [2, 3]] * 4)
    crowded = torch.tensor([[0, 1]] * 8)
    lean = affinity + torch.tensor([1.0, 1.0, 0.0, 0.0])
    bias = torch.zeros(4)
    fair = losses.balance_loss(Seen(routing=[(affinity, even, bias)]), 8)
    unfair = losses.balance_loss(Seen(routing=[(lean, crowded, bias)]), 8)
    assert float(fair) == pytest.approx(1.0) and unfair > fair
    losses.move_biases(Seen(routing=[(lean, crowded, bias)]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([-0.001, -0.001, 0.001, 0.001]))
