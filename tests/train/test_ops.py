"""The training ops: what kernels/torch gives, and exact slopes of each part."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from overleap.cache.layout import CacheFormat
from overleap.cache.state import Cache
from overleap.kernels import select
from overleap.kernels.spec import RowFormat
from overleap.kernels.torch import hyper, linear, quant
from overleap.model.indexer import Indexer, IndexerTap
from overleap.model.transformer import Batch, Transformer
from overleap.train import ops as parts
from overleap.train.attend import Tiles, attend, choose
from overleap.train.ops import TrainingOps, balanced
from overleap.train.passes import packed
from overleap.train.recipe import Stage
from tests.train.small import lively_weights, pass_of, random_row, relative, small_config

DOUBLE = {"dtype": torch.float64}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, **DOUBLE, requires_grad=True)


def mostly(ours: Tensor, theirs: Tensor) -> float:
    """The relative error that 80 % of the rows stay within.

    In bf16 two experts or entries score the same now and then, and a token that takes the other one
    is another token: some 2 % of them, and a compressed entry is made of eight.
    """
    off = sorted(relative(a, b) for a, b in zip(ours, theirs, strict=True))
    return off[8 * len(off) // 10]


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("topk", [1024, 8], ids=["dense", "sparse"])
def test_logits_and_taps_equal_the_definition(
    seed: int, topk: int, dtype: torch.dtype, limit: float
) -> None:
    config = small_config(index_topk=topk, index_n_heads=16)
    weights, counts = lively_weights(config, seed), [128, 384]
    step = packed([random_row(counts, seed)])
    work = pass_of(config, weights, dtype)
    reference = Transformer(config, select("torch"))
    reference.assign(weights)
    cache = Cache(config, pages=4, slots=2, format=CacheFormat.WIDE)
    sequences = [cache.open() for _ in counts]
    for sequence, count in zip(sequences, counts, strict=True):
        cache.reserve(sequence, count)
    pieces = step.ids_T.split(counts)
    batch = Batch.of(
        [(s, p.tolist()) for s, p in zip(sequences, pieces, strict=True)], cache, "all"
    )
    taps: list[IndexerTap] = []
    with torch.no_grad():
        out = reference(batch, cache, taps)
        room, spans = work._room(step.counts)
        streams, our_taps, seen = work._trunk(step.ids_T, room, spans)
    off = relative if dtype is torch.float32 else mostly
    assert off(streams.float(), out.streams) < limit
    for tap, ours, keys, sight in zip(taps, our_taps, work._keys, seen.attention, strict=True):
        entries = tap.keys.rows.view(-1, 32)[: sum(counts) // 4]
        assert off(keys, entries) < limit
        assert off(ours.index_q, tap.index_q) < limit
        assert off(sight[3], tap.lse_TH) < limit


def test_attention_has_exact_slopes_in_every_argument(seed: int) -> None:
    torch.manual_seed(seed)
    tiles = Tiles.of([256, 128])
    q, near, far, sink = drawn(384, 2, 4), drawn(384, 4), drawn(96, 4), drawn(2)
    chosen = choose(
        torch.randn(384, 3, 4, **DOUBLE), torch.randn(384, 3), torch.randn(96, 4, **DOUBLE), 4,
        tiles, 5,
    )  # fmt: skip
    for pick, ratio, rows in (
        (None, 4, far),
        (chosen, 4, far),
        (None, 128, far[:3]),
        (None, 0, None),
    ):
        inputs = tuple(t for t in (q, near, rows, sink) if t is not None)

        def run(*given: Tensor, pick=pick, ratio=ratio, rows=rows) -> Tensor:
            if rows is None:
                given = (*given[:2], None, given[2])
            return attend(given[0], given[1], given[2], pick, given[3], ratio, tiles)[0]

        leaves = tuple(t.detach().requires_grad_() for t in inputs)
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_attention_sees_its_window_its_document_and_what_was_chosen(seed: int) -> None:
    """Against one softmax over everything, written with masks over all positions."""
    torch.manual_seed(seed)
    counts, heads, width = [128, 384], 3, 8
    total = sum(counts)
    q, near = torch.randn(total, heads, width, **DOUBLE), torch.randn(total, width, **DOUBLE)
    far, sink = torch.randn(total // 4, width, **DOUBLE), torch.randn(heads, **DOUBLE)
    index = (
        torch.randn(total, 16, 8, **DOUBLE),
        torch.rand(total, 16),
        torch.randn(total // 4, 8, **DOUBLE),
    )
    chosen = choose(*index, 4, Tiles.of(counts), 7)
    out, lse = attend(q, near, far, chosen, sink, 4, Tiles.of(counts))
    score = (torch.einsum("tij,sj->tis", index[0], index[2]).relu() * index[1][..., None]).sum(1)
    for begin, count in ((0, 128), (128, 384)):
        for t in range(begin, begin + count, 37):
            low, visible = max(begin, t - 127), (t - begin + 1) // 4
            first = begin // 4
            best = score[t, first : first + visible].sort(descending=True).indices[:7]
            assert set(best.tolist()) == {n for n in chosen[t].tolist() if n >= 0}
            rows = torch.cat((near[low : t + 1], far[first + best]))
            logits = torch.cat((q[t] @ rows.t(), sink[:, None]), dim=1)
            torch.testing.assert_close(out[t], logits.softmax(1)[:, :-1] @ rows)
            torch.testing.assert_close(lse[t], logits.logsumexp(1))


@pytest.mark.parametrize("ratio", [4, 128])
def test_parts_have_exact_slopes(seed: int, ratio: int) -> None:
    torch.manual_seed(seed)
    f64 = torch.float64
    width = 6 if ratio == 4 else 3
    begins = torch.tensor([0, 2])
    check = torch.autograd.gradcheck
    assert check(
        lambda rows, ape: parts._pool(rows, ape, ratio, begins),
        (drawn(3 * ratio, 2, width), drawn(ratio, width)),
        fast_mode=ratio > 4,
    )
    position, frequency = torch.randint(0, 999, (3,)), torch.rand(2)
    assert check(
        lambda x, w: parts._norm_turn(x, w, 1e-6, position, frequency, f64),
        (drawn(3, 2, 6), drawn(6)),
    )
    assert check(lambda x: parts._turn(x, position, frequency, True, f64), (drawn(3, 6),))
    assert check(lambda x, w: parts._norm(x, w, 1e-6, f64), (drawn(3, 5), drawn(5)))
    wide = (12 * torch.randn(5, 8, **DOUBLE)).requires_grad_()  # past the clamp of 10 in places
    assert check(lambda x, s: parts._gated(x, s, 10.0, f64), (wide, drawn(5)))
    assert check(
        lambda x, mix, base, scale: parts._pre(x, mix, base, scale, 1e-6, 1e-6, f64),
        (drawn(2, 4, 3), drawn(2, 24), drawn(24), drawn(3)),
    )
    assert check(parts._post, (drawn(2, 3), drawn(2, 4, 3), drawn(2, 4), drawn(4, 4, 2)))
    assert check(
        lambda x, fn, base, scale: parts._head(x, fn, base, scale, 1e-6, 1e-6),
        (drawn(2, 4, 3), drawn(4, 12), drawn(4), drawn(1)),
    )
    ops = TrainingOps(key_width=32, rope=16, compiled=False, dtype=f64)
    assert check(ops.hadamard, (drawn(3, 8),))

    def routed(x: Tensor, weight: Tensor) -> Tensor:
        return ops.route(x, weight, torch.zeros(6), None, 2, 1.5)[1]

    assert check(routed, (drawn(5, 4), drawn(6, 4)))


def test_sinkhorn_equals_the_definition_and_its_gradient_is_exact(seed: int) -> None:
    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(lambda z: balanced(z, 5, 1e-6), (drawn(4, 4, 9),))
    x, fn = torch.randn(7, 4, 8), torch.randn(24, 32)
    base, scale = torch.randn(24), torch.rand(3)
    want = hyper.hc_pre(x, fn, base, scale, 20, 1e-6, 1e-6)
    ops = TrainingOps(key_width=32, rope=16, compiled=False)
    y, post, comb = ops.hc_pre(x, fn, base, scale, 20, 1e-6, 1e-6)
    torch.testing.assert_close(y.float(), want[0], atol=3e-2, rtol=1e-2)
    torch.testing.assert_close(post, want[1])
    torch.testing.assert_close(comb.permute(2, 0, 1), want[2])
    spread = ops.hc_post(want[0], x, post, comb)
    torch.testing.assert_close(spread, hyper.hc_post(want[0], x, want[1], want[2]))


def test_rounding_is_the_release_caches_and_lets_gradients_through(seed: int) -> None:
    torch.manual_seed(seed)
    ops = TrainingOps(key_width=32, rope=16, compiled=False, rounding=True)
    key = torch.randn(5, 32, requires_grad=True)
    rounded = ops.quantize(key, RowFormat("wide", 32, 0))
    torch.testing.assert_close(rounded.detach(), quant.round_fp4(key.detach()))
    rounded.sum().backward()
    assert key.grad is not None and key.grad.eq(1).all()
    row = torch.randn(5, 80).bfloat16().float()
    packed_row = linear.quantize(row, RowFormat("kv", 80, 16))
    back = linear.values_of(packed_row, RowFormat("kv", 80, 16))
    torch.testing.assert_close(ops.quantize(row, RowFormat("wide", 80, 0)), back)


def test_rounded_training_computes_what_the_released_form_computes(seed: int) -> None:
    """Weights, their inputs, cache rows. A value on the edge of rounding may fall either way, and
    moves all tokens that see it: a quarter of the tokens are asked to be equal."""
    config = small_config(index_topk=4096)
    weights, row = lively_weights(config, seed), random_row([256], seed)
    work = pass_of(config, weights, torch.float32)
    step = packed([row])
    room = work._room(step.counts)
    with torch.no_grad(), work.stored():
        work.ops.rounding = True
        rounded, _, _ = work._trunk(step.ids_T, *room)
        work.ops.rounding = False
        plain, _, _ = work._trunk(step.ids_T, *room)
    reference = Transformer(config, select("torch"))
    reference.assign(released(weights))
    cache = Cache(config, pages=2, slots=1, format=CacheFormat.RELEASE)
    sequence = cache.open()
    cache.reserve(sequence, 256)
    with torch.no_grad():
        want = reference(Batch.of([(sequence, row.ids)], cache, "all"), cache).streams
    far = [(x - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2)) for x in (rounded, plain)]
    assert (far[0] < 1e-4).sum() >= 64
    assert (far[1] < 1e-4).sum() <= 8


def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """FP8 linears and FP4 routed experts, as an instruct release stores them."""
    out = {}
    names = (".attn.w", ".indexer.wq_b", ".ffn.experts", ".shared_experts", "e_proj", "h_proj")
    for name, tensor in weights.items():
        out[name] = tensor
        if any(part in name for part in names) and name.endswith(".weight"):
            pack = quant.fp4_weight if ".experts." in name else quant.fp8_weight
            made = pack(tensor)
            out[name], out[name.removesuffix("weight") + "scale"] = made.data, made.scale
    return out


def test_what_was_seen_is_handed_over_once(seed: int) -> None:
    config = small_config()
    work = pass_of(config, lively_weights(config, seed), torch.float32)
    step = packed([random_row([128], seed)])
    _, taps, seen = work._trunk(step.ids_T, *work._room(step.counts))
    assert len(seen.attention) == len(taps) == 2 and len(seen.routing) == 2
    assert not work.ops.take().attention
    assert sum(isinstance(m, Indexer) for m in work.model.modules()) == 2


def test_a_pass_with_nothing_to_learn_has_finite_losses(seed: int) -> None:
    """A conversation whose row is all the user's, say; the draft block's loss too."""
    config = small_config()
    work = pass_of(config, lively_weights(config, seed), torch.float32)
    row = replace(random_row([256], seed), learn=[False] * 256)
    total, record, _ = work.losses(Stage(1, 256, 1, (), mtp=0.3), [row], str(seed))
    total.backward()
    assert record["mtp"] == record["language"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in work.model.parameters())
