"""Bytes and operations of a call, counted by hand; every op has a count."""

import pytest
import torch

from overleap.kernels.conformance.draw import KEY, KV, KV_SHORT, WIDE, Draw
from overleap.kernels.conformance.run import CASES
from overleap.kernels.cost import COSTS, Cost, cost, row_bytes
from overleap.kernels.spec import OP_NAMES, Choice, Experts, Weight


def test_every_op_has_a_cost_for_every_case(seed: int) -> None:
    assert sorted(COSTS) == sorted(OP_NAMES)
    draw = Draw(seed, torch.device("cpu"))
    for name, cases in CASES.items():
        for number, case in zip(range(12), cases(draw, False), strict=False):
            found = cost(name, case.args)
            assert found.bytes >= 0 and found.operations >= 0, (number, case.name)


def test_rows_as_drawn(seed: int) -> None:
    draw = Draw(seed, torch.device("cpu"))
    for row in (KV, KV_SHORT, KEY, WIDE):
        assert row_bytes(row) == draw.rows(row, 1).nbytes


def test_products_by_hand() -> None:
    x = torch.empty(3, 256, dtype=torch.bfloat16)
    plain = Weight(torch.empty(64, 256, dtype=torch.bfloat16))
    fp4 = Weight(torch.empty(64, 128, dtype=torch.int8), torch.empty(64, 8, dtype=torch.uint8))
    assert cost("matmul", (x, plain, False)) == Cost(
        3 * 256 * 2 + 64 * 256 * 2 + 3 * 64 * 2, 2 * 3 * 64 * 256, "bf16"
    )
    packed = 3 * 256 * 2 + 64 * 128 + 64 * 8
    assert cost("matmul", (x, fp4, True, True)) == Cost(
        packed + 3 * 64 * 4, 2 * 3 * 64 * 256, "bf16"
    )
    assert cost("matmul", (x.float(), fp4, False)).unit == "f32"
    assert cost("grouped_matmul", (x.view(3, 2, 128), plain)).operations == 2 * 3 * 64 * 128


def test_only_chosen_experts_are_read() -> None:
    w1 = [Weight(torch.empty(32, 64, dtype=torch.bfloat16)) for _ in range(9)]
    w2 = [Weight(torch.empty(64, 32, dtype=torch.bfloat16)) for _ in range(9)]
    experts = Experts(tuple(w1), tuple(w2), tuple(w1))
    x, ids = torch.empty(2, 64, dtype=torch.bfloat16), torch.tensor([[1, 4], [4, 8]])
    found = cost("experts", (x, ids, torch.empty(2, 2), experts, 10.0, False))
    assert found.bytes == 2 * x.nbytes + ids.nbytes + 16 + 3 * 3 * 32 * 64 * 2
    assert found.operations == 4 * (3 * 2 * 32 * 64 + 5 * 32)


def test_a_row_that_many_tokens_see_is_read_once(seed: int) -> None:
    draw = Draw(seed, torch.device("cpu"))
    spans = draw.spans((1000, 2))
    q, fresh, ring = torch.empty(2, 3, 512), draw.rows(KV, 2), draw.ring(KV, 128, spans)
    entries, chosen = draw.pool(KV, 4, spans), torch.tensor([[5, 9, -1], [9, 5, 7]])
    args = (q, fresh, ring, entries, chosen, 4, torch.empty(3), 1.0, 128, spans)
    found = cost("attend", args)
    rows = 127 + 2 + 3  # the ring, this step's, three different entries
    assert found.bytes == 2 * q.nbytes + 4 * 6 + 12 + chosen.nbytes + rows * row_bytes(KV)
    assert found.operations == (2 * 128 + 5) * 3 * (4 * 512 + 2)
    everything = cost("attend", (*args[:4], None, *args[5:]))
    rows = 127 + 2 + 1002 // 4
    assert everything.bytes == 2 * q.nbytes + 4 * 6 + 12 + rows * row_bytes(KV)


def test_keys_by_hand(seed: int) -> None:
    draw = Draw(seed, torch.device("cpu"))
    spans = draw.spans((1000, 1))
    keys, q = draw.pool(KEY, 4, spans), draw.rows(KEY, 1, 64)
    found = cost("index_topk", (q, torch.empty(1, 64), keys, 4, spans, 20))
    assert found == Cost(q.nbytes + 64 * 4 + 250 * 68 + 160, 250 * 64 * (2 * 128 + 3), "int8")


def test_blocks_that_began_earlier(seed: int) -> None:
    """Ratio 4, tokens 6 and 7: the block 4..7 ends; 4, 5 and the block before are in the tail."""
    draw = Draw(seed, torch.device("cpu"))
    spans = draw.spans((6, 2))
    rows, ape, tail = draw.normal(2, 2, 10), draw.normal(4, 10), draw.tail(10, 4, spans)
    found = cost("compress", (rows, tail, ape, 4, spans))
    assert found == Cost(rows.nbytes + ape.nbytes + 6 * 2 * 10 * 4 + 5 * 4, 5 * 5 * 8)
    nothing = draw.spans((4, 2))
    assert cost("compress", (rows, tail, ape, 4, nothing)).operations == 0


@pytest.mark.parametrize("best", [None, 3])
def test_a_greedy_row_is_read_once(best: int | None) -> None:
    logits = torch.empty(2, 1000)
    found = cost("sample", (logits, [Choice(0.0)] * 2, None, best))
    assert found.operations == 2 * 1000 * (1 + 3 * (best is not None))
    assert found.bytes == logits.nbytes + 2 * (8 if best is None else 16 * 4)


def test_orthogonalise_by_hand() -> None:
    found = cost("orthogonalise", (torch.empty(5, 30, 20),))
    each = 2 * 20 * 20 * 30 + 2 * 20**3 + 2 * 20 * 20 * 30
    assert found == Cost(5 * 30 * 20 * 8, 10 * 5 * each, "bf16")
