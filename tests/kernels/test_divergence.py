"""Chunked distillation against plain PyTorch on both heads' whole logits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import DoubleBackwardError
from memopt.kernels import divergence as kernel
from memopt.kernels.divergence import Arguments
from tests import references
from tests.kernels.head_cases import Head, head, peak_bytes, wanted
from tests.references import (
    LOW_PRECISION,
    Draw,
    assert_equal_in_float64,
    assert_near_float64,
    assert_same_bits,
    doubles,
    logits,
    run,
)

Tensor = torch.Tensor
REDUCTIONS = ["batchmean", "mean", "sum"]
IGNORED = -100
BETAS = pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.1, 0.9])


@dataclass(frozen=True)
class Case:
    """Two heads; scales and bounds are the student's and the teacher's."""

    inputs: Head
    teacher: Head
    target: Tensor | None
    beta: float
    reduction: str = "batchmean"
    scale: tuple[float, float] = (1.0, 1.0)
    softcap: tuple[float, float] = (0.0, 0.0)
    chunk_rows: int = 5

    def mine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        a = self.arguments(x, weight, bias)
        loss: Tensor = torch.ops.memopt.linear_divergence(*a, self.reduction)[0]
        return loss

    def arguments(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Arguments:
        return Arguments(
            x,
            weight,
            bias,
            *self.teacher,
            self.target,
            IGNORED,
            self.beta,
            False,
            self.scale,
            self.softcap,
            self.chunk_rows,
            wanted(x, weight, bias),
        )

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        teacher = self.teacher if x.dtype != torch.float64 else doubles(self.teacher)
        z = logits(x, weight, bias, scale=self.scale[0], softcap=self.softcap[0])
        of_teacher = logits(*teacher, scale=self.scale[1], softcap=self.softcap[1])
        values = references.divergence(z, of_teacher, self.beta)
        if self.target is not None:
            values = values[self.target != IGNORED]
        size = {"batchmean": len(values), "mean": values.numel() * z.shape[1], "sum": 1}
        return values.sum() / size[self.reduction]


def case(
    rows: int = 23,
    classes: int = 13,
    *,
    beta: float = 0.5,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    masked: bool = True,
    hidden: tuple[int, int] = (6, 9),
    **options: Any,
) -> Case:
    """Random heads; with ``masked`` a third of the rows does not count."""
    target = None
    if masked:
        target = torch.randint(classes, (rows,))
        target[torch.rand(rows) < 0.3] = IGNORED
        target[0] = 0
    student, teacher = (head(rows, size, classes, dtype, bias=bias) for size in hidden)
    return Case(student, teacher, target, beta, **options)


@BETAS
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "masked": False},
        {"scale": (0.5, 0.25)},
        {"scale": (1.0, 2.0), "softcap": (2.0, 5.0), "masked": False},
        {"softcap": (0.0, 3.0), "chunk_rows": 1},
        {"chunk_rows": 100},
    ],
    ids=str,
)
def test_every_option_gives_eager_numbers_in_float64(
    beta: float, reduction: str, options: dict[str, Any]
) -> None:
    c = case(beta=beta, reduction=reduction, **options)
    assert_equal_in_float64(run(c.mine, c.inputs, 0.37), run(c.plain, c.inputs, 0.37))


@given(
    rows=st.integers(1, 30),
    classes=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    chunk_rows=st.integers(1, 40),
    beta=st.floats(0.01, 0.99) | st.sampled_from([0.0, 1.0]),
    masked=st.booleans(),
)
def test_any_size_gives_eager_numbers(
    rows: int,
    classes: int,
    sizes: tuple[int, int],
    chunk_rows: int,
    beta: float,
    masked: bool,
) -> None:
    c = case(rows, classes, beta=beta, masked=masked, hidden=sizes, chunk_rows=chunk_rows)
    assert_equal_in_float64(run(c.mine, c.inputs), run(c.plain, c.inputs))


@BETAS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 65536.0])
def test_low_precision_is_as_near_to_float64_as_eager_is(
    beta: float, dtype: torch.dtype, reduction: str, factor: float
) -> None:
    options: dict[str, Any] = {"hidden": (32, 48), "scale": (0.5, 0.5), "chunk_rows": 8}
    if reduction == "sum":
        factor /= 160  # the mean by hand; else eager's float16 overflows

    def draw() -> Draw:
        c = case(160, 259, beta=beta, dtype=dtype, reduction=reduction, **options)
        return c.mine, c.plain, c.inputs

    assert_near_float64(draw, factor, 20)


@BETAS
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(beta: float) -> None:
    c = case(beta=beta)
    same = Case(c.inputs, c.inputs, None, beta)
    for tensor in run(same.mine, same.inputs):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-14)


def test_a_teacher_in_bfloat16_serves_a_student_in_float32() -> None:
    c = case(dtype=torch.bfloat16)
    student = [None if t is None else t.float() for t in c.inputs]
    actual, plain = run(c.mine, student), run(c.plain, student)
    for mine, theirs in zip(actual, plain, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_with_all_rows_ignored_gradients_are_zero(reduction: str) -> None:
    c = case(reduction=reduction)
    assert c.target is not None
    c.target.fill_(IGNORED)
    loss, *gradients = run(c.mine, c.inputs)
    assert loss.isnan() == (reduction != "sum")
    assert len(gradients) == 3
    assert all(not gradient.any() for gradient in gradients)


@BETAS
@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_each_input_gets_its_gradient_while_others_are_frozen(
    beta: float, trained: tuple[bool, ...]
) -> None:
    c = case(beta=beta)
    actual = run(c.mine, c.inputs, 2.0, trained)
    assert len(actual) == 2
    assert_equal_in_float64(actual, run(c.plain, c.inputs, 2.0, trained))


@BETAS
def test_two_runs_are_equal_bit_by_bit(beta: float) -> None:
    c = case(64, 501, beta=beta, dtype=torch.float32, chunk_rows=7)
    assert_same_bits(*(run(c.mine, c.inputs) for _ in range(2)))


def test_a_second_derivative_is_refused() -> None:
    c = case()
    x, weight, bias = c.inputs
    loss = c.mine(x.requires_grad_(), weight, bias)
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_neither_heads_logits_exist_and_without_gradients_there_is_no_buffer_for_them() -> None:
    c = case(1024, 2048, dtype=torch.float32, hidden=(128, 16), chunk_rows=8, masked=False)
    logits_bytes, weight_bytes = 1024 * 2048 * 4, c.inputs[1].nbytes
    assert peak_bytes(c.mine, c.inputs, [False] * 3) < weight_bytes
    assert weight_bytes < peak_bytes(c.mine, c.inputs, [False, True, False]) < logits_bytes / 4


@BETAS
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16, "bias": False}], ids=str)
def test_torch_finds_the_operator_in_order(beta: float, options: dict[str, Any]) -> None:
    c = case(beta=beta, **options)
    x, weight, bias = c.inputs
    a = c.arguments(x.requires_grad_(), weight.requires_grad_(), bias)
    torch.library.opcheck(kernel.REDUCED, (*a, c.reduction))


def rows_of(c: Case, *, cross: bool = False, given: bool = False) -> Any:
    """The operator of rows as a function of the student; ``given`` hands it the logits."""
    a = c.arguments(*c.inputs)._replace(cross=cross)
    if given:
        a = a._replace(teacher_x=logits(*c.teacher), teacher_weight=None, teacher_bias=None)

    def values(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = a._replace(x=x, weight=weight, bias=bias, wanted=wanted(x, weight, bias))
        result: Tensor = kernel.ROWS(*own)
        return result

    return values


def plain_rows(c: Case, *, cross: bool = False) -> Any:
    def values(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        teacher = c.teacher if x.dtype != torch.float64 else doubles(c.teacher)
        z = logits(x, weight, bias, scale=c.scale[0], softcap=c.softcap[0])
        of_teacher = logits(*teacher, scale=c.scale[1], softcap=c.softcap[1])
        rows = references.divergence(z, of_teacher, c.beta)
        if cross:
            rows = -(of_teacher.softmax(1) * z.log_softmax(1)).sum(1)
        return rows if c.target is None else rows * (c.target != IGNORED)

    return values


UPSTREAM = torch.linspace(-2, 3, 23, dtype=torch.float64)


@BETAS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "masked": False},
        {"scale": (1.0, 2.0), "softcap": (2.0, 5.0), "masked": False},
        {"chunk_rows": 100},
    ],
    ids=str,
)
def test_rows_give_eager_numbers_under_uneven_gradients(
    beta: float, options: dict[str, Any]
) -> None:
    c = case(beta=beta, **options)
    g = UPSTREAM * (torch.arange(23) % 4 > 0)  # some rows are masked afterwards
    assert_equal_in_float64(run(rows_of(c), c.inputs, g), run(plain_rows(c), c.inputs, g))


@BETAS
def test_rows_against_logits_that_are_at_hand_are_those_against_the_head(beta: float) -> None:
    c = case(beta=beta)
    actual = run(rows_of(c, given=True), c.inputs, UPSTREAM)
    assert_equal_in_float64(actual, run(plain_rows(c), c.inputs, UPSTREAM))


def test_rows_of_the_cross_entropy_differ_by_the_teachers_entropy() -> None:
    c = case(beta=0.0)
    actual = run(rows_of(c, cross=True), c.inputs, UPSTREAM)
    assert_equal_in_float64(actual, run(plain_rows(c, cross=True), c.inputs, UPSTREAM))


@BETAS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_rows_in_low_precision_are_as_near_to_float64_as_eager_is(
    beta: float, dtype: torch.dtype
) -> None:
    def draw() -> Draw:
        c = case(160, 259, beta=beta, dtype=dtype, hidden=(32, 48), scale=(0.5, 0.5), chunk_rows=8)
        return rows_of(c), plain_rows(c), c.inputs

    assert_near_float64(draw, torch.linspace(-2, 3, 160, dtype=torch.float64))


@BETAS
def test_two_runs_over_rows_are_equal_bit_by_bit(beta: float) -> None:
    c = case(64, 501, beta=beta, dtype=torch.bfloat16, chunk_rows=7)
    assert_same_bits(*(run(rows_of(c), c.inputs) for _ in range(2)))


def test_with_all_rows_ignored_each_is_zero_and_so_are_the_gradients() -> None:
    c = case()
    assert c.target is not None
    c.target.fill_(IGNORED)
    assert all(not tensor.any() for tensor in run(rows_of(c), c.inputs))


def test_an_ignored_row_may_hold_anything() -> None:
    c = case()
    assert c.target is not None
    c.target[2] = IGNORED
    c.inputs[0][2], c.teacher[0][2] = torch.nan, torch.inf
    assert all(tensor.isfinite().all() for tensor in run(rows_of(c), c.inputs))
    assert all(tensor.isfinite().all() for tensor in run(c.mine, c.inputs))


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("given", [False, True])
def test_torch_finds_the_operators_of_rows_in_order(beta: float, given: bool) -> None:
    c = case(beta=beta)
    x, weight, bias = (t.clone().requires_grad_() for t in c.inputs if t is not None)
    a = c.arguments(x, weight, bias)
    if given:
        a = a._replace(teacher_x=logits(*c.teacher), teacher_weight=None, teacher_bias=None)
    torch.library.opcheck(kernel.ROWS, a)
    frozen = a._replace(x=x.detach(), weight=weight.detach(), bias=bias.detach())
    torch.library.opcheck(kernel.ROWS_BACKWARD, (*frozen, torch.ones(23).double()))
