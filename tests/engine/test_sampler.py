"""Tokens from logits: exact candidate sets, unbiased draws, ties, log-probabilities, bad rows."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from overleap.engine import sampler
from overleap.engine.request import Sampling
from overleap.engine.sampler import Draw, choice_of, sample, uniform
from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.spec import Ops
from overleap.kernels.torch.sample import candidates


@pytest.fixture(params=["torch", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """The definition, and the native kernels where they were built."""
    try:
        return select(request.param)
    except BackendError as error:
        pytest.skip(str(error))


def kept_by_definition(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """The three cuts again, in plain Python. Sums too close to call are not drawn."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k]
    best = logits[order[0]]
    weight = [math.exp((logits[i] - best) / sampling.temperature) for i in order]
    total = math.fsum(weight)
    kept: dict[int, float] = {}
    for rank, i in enumerate(order):
        reached = math.fsum(weight[:rank]) / total
        if sampling.top_p < 1:
            assume(abs(reached - sampling.top_p) > 1e-12)
        assume(rank == 0 or abs(weight[rank] - sampling.min_p) > 1e-12)
        if rank == 0 or (reached < sampling.top_p and weight[rank] >= sampling.min_p):
            kept[i] = weight[rank] / total
    return kept


@given(
    logits=st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=40),
    temperature=st.floats(0.05, 4),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
)
def test_candidates_are_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = kept_by_definition(logits, sampling)
    probability, ids = candidates(torch.tensor(logits), choice_of(sampling, 0.0))
    assert ids.tolist() == sorted(wanted)
    assert probability.tolist() == pytest.approx([wanted[i] for i in sorted(wanted)], rel=1e-9)


def test_ties_go_to_the_smaller_id(ops: Ops) -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0])
    assert sample(logits, Draw(Sampling(temperature=0), 0, 0), ops).id == 1
    assert candidates(logits, choice_of(Sampling(top_k=2), 0.0))[1].tolist() == [1, 2]
    assert candidates(logits, choice_of(Sampling(top_p=0.3), 0.0))[1].tolist() == [1, 2]
    top = sample(logits, Draw(Sampling(temperature=0, logprobs=4), 0, 0), ops).top_logprobs
    assert [token for token, _ in top] == [1, 2, 4, 3]


RARE = 7  # deviations that chance does not bring about: less than one run in 10^10


def deviations(counts: list[int], shares: list[float]) -> float:
    """Chi-square as standard deviations of a normal (Wilson and Hilferty's cube root).

    Rare outcomes are put together until 20 are expected, where the approximation holds.
    """
    total = sum(counts)
    bins, seen, share = [], 0, 0.0
    for p, count in sorted(zip(shares, counts, strict=True)):
        seen, share = seen + count, share + p
        if share * total >= 20:
            bins.append((seen - share * total) ** 2 / (share * total))
            seen, share = 0, 0.0
    assert total * share < 20 and len(bins) > 1
    scale = 2 / (9 * (len(bins) - 1))
    return ((sum(bins) / (len(bins) - 1)) ** (1 / 3) - (1 - scale)) / math.sqrt(scale)


def test_deviations_see_a_bias() -> None:
    assert deviations([1000] * 8, [0.125] * 8) < 0
    assert deviations([1200, 800] * 4, [0.125] * 8) > 2 * RARE


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.8, top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.3, top_k=9, top_p=0.9, min_p=0.02),
    ],
)
@pytest.mark.parametrize("over", ["answers", "tokens"])
def test_draws_follow_the_distribution(sampling: Sampling, over: str, seed: int, ops: Ops) -> None:
    """Over many seeds and over many tokens of one answer."""
    number = random.Random(seed)
    # The two best are equal, so that no cut leaves a single candidate.
    logits = torch.tensor([2.0, 2.0, *(number.uniform(-3, 2) for _ in range(10))])
    probability, ids = candidates(logits, choice_of(sampling, 0.0))
    counts = dict.fromkeys(ids.tolist(), 0)
    for n in range(8000):
        draw = Draw(sampling, seed, n) if over == "tokens" else Draw(sampling, seed + n, 3)
        counts[sample(logits, draw, ops).id] += 1
    shares = (probability / probability.sum()).tolist()
    assert deviations(list(counts.values()), shares) < RARE


def test_neighbouring_draws_are_independent(seed: int) -> None:
    """Pairs (token n, token n + 1) and (seed s, seed s + 1) fill a 10 x 10 table evenly."""
    for values in (
        [uniform(seed, n) for n in range(20000)],
        [uniform(seed + n, 0) for n in range(20000)],
    ):
        table = [0] * 100
        for a, b in pairwise(values):
            table[int(a * 10) * 10 + int(b * 10)] += 1
        assert deviations(table, [0.01] * 100) < RARE
        assert min(values) >= 0 and max(values) < 1


def test_draws_do_not_change_between_releases() -> None:
    """Someone may have kept a seed: these numbers are a promise."""
    assert [uniform(0, 0), uniform(-1, 0), uniform(2**63 - 1, 10**6)] == [
        0.04844697841706569,
        0.22080352211401044,
        0.16611536901236434,
    ]


def test_tokens_do_not_change_between_releases(ops: Ops) -> None:
    """Nor the tokens that they choose: what the first release drew for these rows."""
    token, row = torch.arange(1003), torch.arange(6)[:, None]
    logits_RV = (token * token * 37 + row * 1009) % 401 / 50 - 4
    tried = [
        (Sampling(), 404),
        (Sampling(temperature=0.7), 149),
        (Sampling(temperature=1.8, top_k=50), 199),
        (Sampling(top_p=0.8), 821),
        (Sampling(min_p=0.05), 361),
        (Sampling(temperature=1.3, top_k=200, top_p=0.9, min_p=0.02), 633),
    ]
    for index, (sampling, chosen) in enumerate(tried):
        assert sample(logits_RV[index], Draw(sampling, 77, index), ops).id == chosen


def test_more_candidates_than_tokens_are_all_of_them(seed: int, ops: Ops) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    draws = (Draw(Sampling(top_k=top_k), seed, 1) for top_k in (None, 300, 301, 2**63, 10**30))
    assert len({sample(logits, draw, ops).id for draw in draws}) == 1


def test_only_allowed_tokens_are_chosen(seed: int, ops: Ops) -> None:
    """Bit id % 8 of byte id // 8; the log-probabilities stay those of the whole row."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    allowed = bytearray(38)
    for token in (7, 8, 299):
        allowed[token // 8] |= 1 << token % 8
    best = max((7, 8, 299), key=lambda token: float(logits[token]))
    greedy = sample(logits, Draw(Sampling(temperature=0, logprobs=2), 0, 0), ops, bytes(allowed))
    assert greedy.id == best
    free = sample(logits, Draw(Sampling(temperature=0, logprobs=2), 0, 0), ops)
    assert greedy.top_logprobs == free.top_logprobs
    for n in range(50):
        drawn = sample(logits, Draw(Sampling(temperature=3), seed, n), ops, bytes(allowed))
        assert drawn.id in (7, 8, 299)
    with pytest.raises(BackendError, match="no token that is allowed as token 4"):
        sample(logits, Draw(Sampling(), 0, 4), ops, bytes(38))


@pytest.mark.parametrize("rows", [2, 7])
def test_a_row_does_not_see_its_batch(rows: int, seed: int, ops: Ops) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(rows, 1003, generator=generator)
    for sampling in (Sampling(logprobs=3), Sampling(top_p=0.9, top_k=50, logprobs=0)):
        for row in range(rows):
            alone = sample(logits_RV[row].clone(), Draw(sampling, seed, row), ops)
            assert sample(logits_RV[row], Draw(sampling, seed, row), ops) == alone


def test_logprobs_are_of_the_models_own_distribution(seed: int, ops: Ops) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = logits.double() - logits.double().exp().sum().log()
    for sampling in (
        Sampling(temperature=0, logprobs=5),
        Sampling(temperature=0.3, top_k=2, logprobs=5),
    ):
        token = sample(logits, Draw(sampling, seed, 0), ops)
        assert token.logprob == pytest.approx(float(wanted[token.id]), abs=1e-9)
        ids = wanted.argsort(descending=True)[:5].tolist()
        assert [i for i, _ in token.top_logprobs] == ids
        for i, value in token.top_logprobs:
            assert value == pytest.approx(float(wanted[i]), abs=1e-9)
    none = sample(logits, Draw(Sampling(temperature=0), seed, 0), ops)
    assert none.logprob is None and none.top_logprobs == ()
    own = sample(logits, Draw(Sampling(temperature=0, logprobs=0), seed, 0), ops)
    assert own.logprob is not None and own.top_logprobs == ()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-8, 1e8, 1e300])
def test_extreme_temperatures(temperature: float, seed: int, ops: Ops) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, float("-inf")])
    chosen = {
        sample(logits, Draw(Sampling(temperature=temperature), seed + n, 0), ops).id
        for n in range(200)
    }
    assert chosen == ({1} if temperature < 1 else {0, 1, 2})


def test_a_token_owns_the_start_of_its_share(monkeypatch: pytest.MonkeyPatch, ops: Ops) -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0])
    for drawn, token in ((0.0, 0), (0.5 - 2**-53, 0), (0.5, 2), (1 - 2**-53, 2)):
        monkeypatch.setattr(sampler, "uniform", lambda *_, drawn=drawn: drawn)
        assert sample(logits, Draw(Sampling(), 0, 0), ops).id == token


def test_forbidden_tokens_are_never_drawn(seed: int, ops: Ops) -> None:
    logits = torch.full((300,), float("-inf"))
    logits[[7, 250]] = 0.0
    for n in range(100):
        assert sample(logits, Draw(Sampling(logprobs=3), seed, n), ops).id in (7, 250)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused(bad: float, ops: Ops) -> None:
    logits = torch.zeros(9)
    logits[4] = bad
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=2)):
        with pytest.raises(BackendError, match="token 5 of the answer is"):
            sample(logits, Draw(sampling, 0, 5), ops)
    with pytest.raises(BackendError, match="-inf"):
        sample(torch.full((9,), float("-inf")), Draw(Sampling(), 0, 0), ops)


def test_penalties_and_bias_move_logits_by_the_definition(ops: Ops, seed: int) -> None:
    draw = random.Random(seed)
    logits_V = torch.tensor([draw.gauss(0, 1) for _ in range(50)])
    said = draw.choices(range(50), k=30)
    sampling = Sampling(
        temperature=0, frequency_penalty=0.7, presence_penalty=-0.4, logprobs=2,
        logit_bias=((3, 2.5), (said[0], -1.0)),
    )  # fmt: skip
    expected = [
        value - 0.7 * said.count(i) + 0.4 * (i in said)
        + (2.5 if i == 3 else 0) - (1.0 if i == said[0] else 0)
        for i, value in enumerate(logits_V.tolist())
    ]  # fmt: skip
    before = logits_V.clone()
    where = Draw(sampling, 0, 30, said)
    assert torch.allclose(sampler.shifted(logits_V, where), torch.tensor(expected), atol=1e-6)
    token = sample(logits_V, where, ops)
    assert token.id == max(range(50), key=lambda i: (expected[i], -i))
    assert torch.equal(logits_V, before), "the row is the model's"
    plain = torch.log_softmax(logits_V.double(), 0)
    assert token.logprob == pytest.approx(float(plain[token.id]), abs=1e-5)
    assert [i for i, _ in token.top_logprobs] == plain.topk(2).indices.tolist()


def test_a_bias_of_a_hundred_chooses_and_one_below_bans(ops: Ops, seed: int) -> None:
    draw = random.Random(seed)
    logits_V = torch.tensor([draw.gauss(0, 1) for _ in range(20)])
    wanted = draw.randrange(20)
    for index in range(40):
        chosen = Sampling(temperature=1.0, logit_bias=((wanted, 100.0),))
        banned = Sampling(temperature=1.0, logit_bias=((wanted, -100.0),))
        assert sample(logits_V, Draw(chosen, seed, index), ops).id == wanted
        assert sample(logits_V, Draw(banned, seed, index), ops).id != wanted
    # A constraint holds whatever the bias says.
    only = bytearray(3)
    only[0] = 1 << 2
    forbidden = Sampling(temperature=0, logit_bias=((5, 100.0),))
    assert sample(logits_V, Draw(forbidden, 0, 0), ops, bytes(only)).id == 2
