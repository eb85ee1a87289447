"""Native products keep the contract, and a row's bits depend on that row alone."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from overleap.errors import BackendError
from overleap.kernels import select
from overleap.kernels.conformance import conform
from overleap.kernels.spec import Experts, Joint, Weight
from overleap.kernels.torch.quant import fp4_weight, fp8_weight
from tests.kernels.native import cuts, isa
from tests.oracles.running import threads

__all__ = ["isa"]

FORMS: dict[str, Callable[[Tensor], Weight]] = {
    "f32": Weight,
    "bf16": lambda w: Weight(w.bfloat16()),
    "fp8": fp8_weight,
    "fp4": fp4_weight,
}


@pytest.mark.parametrize("op", ["matmul", "grouped_matmul", "experts"])
def test_conforms(op: str, isa: str, seed: int) -> None:
    verdicts = conform(select("cpu"), seed=seed, only=[op])
    assert verdicts and not [v for v in verdicts if not v.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_depends_on_its_row_alone(
    form: str, dtype: torch.dtype, isa: str, seed: int
) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    inputs, outputs = 32 * number.randint(1, 40), number.randint(1, 300)
    weight = FORMS[form](torch.randn(outputs, inputs))
    x, rounds = torch.randn(number.randint(2, 400), inputs).to(dtype), weight.packed
    for wide in (False, True):
        with threads(1):
            whole = ops.matmul(x, weight, rounds, wide)
        for count in (1, 2):
            with threads(count):
                parts = [ops.matmul(x[c], weight, rounds, wide) for c in cuts(len(x), number)]
                assert torch.cat(parts).equal(whole)
        lone = number.randrange(len(x))
        assert ops.matmul(x[lone : lone + 1], weight, rounds, wide).equal(whole[lone : lone + 1])


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp4"])
def test_a_row_below_the_normal_range_depends_on_itself_alone(
    form: str, isa: str, seed: int
) -> None:
    """Few rows and many also agree on what is too small for float, which some units take for 0."""
    torch.manual_seed(seed)
    weight, ops = FORMS[form](torch.randn(64, 160)), select("cpu")
    scale = torch.randint(-140, -116, (40, 1)).double().exp2()
    x = (torch.randn(40, 160, dtype=torch.float64) * scale).bfloat16()
    whole = ops.matmul(x, weight, False, True)
    for count in (1, 4, 6):
        assert ops.matmul(x[:count], weight, False, True).equal(whole[:count])


def test_torch_finds_its_matrix_unit_as_it_left_it(isa: str, seed: int) -> None:
    """torch sets the unit's tiles up once and remembers that it did."""
    torch.manual_seed(seed)
    a, b = torch.randn(2, 96, 96).bfloat16()
    with threads(1):
        before = a @ b
        select("cpu").matmul(a, fp8_weight(b.float()), True)
        assert (a @ b).equal(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_depends_on_its_row_alone(form: str, isa: str, seed: int) -> None:
    number, ops = random.Random(seed), select("cpu")
    torch.manual_seed(seed)
    width, inner, count = 32 * number.randint(1, 8), 32 * number.randint(1, 8), 7
    experts = Experts(
        *(
            tuple(FORMS[form](torch.randn(a, b)) for _ in range(count))
            for a, b in ((inner, width), (width, inner), (inner, width))
        )
    )
    x = torch.randn(number.randint(2, 200), width).bfloat16()
    ids = torch.rand(len(x), count).argsort(1)[:, : number.randint(1, 4)]
    share = torch.rand(ids.shape)

    def run(rows: slice) -> Tensor:
        return ops.experts(x[rows], ids[rows], share[rows], experts, 10.0, form[:2] == "fp")

    with threads(1):
        whole = run(slice(None))
    for used in (1, 2):
        with threads(used):
            assert torch.cat([run(c) for c in cuts(len(x), number)]).equal(whole)
    lone = number.randrange(len(x))
    assert run(slice(lone, lone + 1)).equal(whole[lone : lone + 1])


def test_groups_are_products_of_their_own(isa: str, seed: int) -> None:
    torch.manual_seed(seed)
    ops = select("cpu")
    x, weight = torch.randn(9, 3, 64).bfloat16(), torch.randn(3 * 40, 64)
    together = ops.grouped_matmul(x, Weight(weight.bfloat16()))
    for group in range(3):
        part = Weight(weight[40 * group : 40 * group + 40].bfloat16())
        assert ops.matmul(x[:, group], part, False).equal(together[:, group])


def test_shapes_that_do_not_meet_are_refused() -> None:
    """Native code reads addresses: nothing may reach it that reads beyond them."""
    ops, x = select("cpu"), torch.randn(3, 64)
    short = fp4_weight(torch.randn(40, 32))
    with pytest.raises(AssertionError):
        ops.matmul(x, short, False)
    with pytest.raises(AssertionError):
        ops.matmul(x, Weight(torch.randn(64, 40).t()), False)
    with pytest.raises(AssertionError):
        ops.project(x, (Joint((short,), True),))
    w1, w2, w3 = (fp8_weight(torch.randn(64, 64)) for _ in range(3))
    share = torch.ones(3, 1)
    for expert in (1, -1):
        ids = torch.full((3, 1), expert)
        with pytest.raises(IndexError, match="an expert was chosen that is not there"):
            ops.experts(x, ids, share, Experts((w1,), (w2,), (w3,)), 10.0, True)
    with pytest.raises(AssertionError):
        ops.experts(x, ids, share, Experts((w1,), (short,), (w3,)), 10.0, True)


def test_gradients_are_refused() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    with pytest.raises(BackendError, match="no gradients"):
        select("cpu").matmul(x, Weight(torch.randn(5, 32)), False)
