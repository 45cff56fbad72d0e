"""The operators of the chunked cross-entropy against the plain layer and loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bench.meter import Meter
from memopt.errors import DoubleBackwardError
from memopt.kernels import linear_cross_entropy as kernel
from memopt.kernels.cross_entropy_rows import ROWS, ROWS_BACKWARD
from memopt.kernels.linear_cross_entropy import Arguments
from tests.kernels.head_cases import Head, head, peak_bytes, wanted
from tests.references import (
    LOW_PRECISION,
    Draw,
    assert_equal_in_float64,
    assert_near_float64,
    assert_same_bits,
    logits,
    run,
)

Tensor = torch.Tensor
REDUCTIONS = ["mean", "sum", "none"]
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A head, its targets and the options of the loss; ``chunk_rows`` is the operator's alone."""

    inputs: Head
    target: Tensor
    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    chunk_rows: int = 5

    def mine(self, reduction: str) -> Callable[..., Tensor]:
        def loss(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            a = self.arguments(x, weight, bias)
            if reduction == "none":
                values: Tensor = torch.ops.memopt.linear_cross_entropy_rows(*a)[0]
                return values
            reduced: Tensor = torch.ops.memopt.linear_cross_entropy(*a, reduction == "mean")[0]
            return reduced

        return loss

    def plain(self, reduction: str) -> Callable[..., Tensor]:
        def loss(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            z = logits(x, weight, bias, scale=self.scale, softcap=self.softcap)
            soft = self.target.is_floating_point()
            return F.cross_entropy(
                z,
                self.target.to(z.dtype) if soft else self.target,
                None if self.class_weight is None else self.class_weight.to(z.dtype),
                reduction=reduction,
                label_smoothing=self.label_smoothing,
            )

        return loss

    def arguments(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Arguments:
        return Arguments(
            x,
            weight,
            bias,
            self.target,
            self.class_weight,
            IGNORED,
            self.label_smoothing,
            self.scale,
            self.softcap,
            self.chunk_rows,
            wanted(x, weight, bias),
        )


def case(
    rows: int = 23,
    hidden: int = 6,
    classes: int = 13,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    soft: bool = False,
    weighted: bool = False,
    ignored: float = 0.3,
    **options: Any,
) -> Case:
    """Random inputs; ``ignored`` is the share of rows that do not count."""
    target = torch.randint(classes, (rows,))
    target[torch.rand(rows) < ignored] = IGNORED
    if soft:
        target = torch.randn(rows, classes, dtype=torch.float64).softmax(1).to(dtype)
    inputs = head(rows, hidden, classes, dtype, bias=bias)
    class_weight = torch.rand(classes).to(dtype) if weighted else None
    return Case(inputs, target, class_weight, **options)


def upstream(reduction: str, rows: int) -> Tensor | float:
    """Not one, and for single rows not even."""
    return torch.linspace(-2, 3, rows, dtype=torch.float64) if reduction == "none" else 0.37


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "ignored": 0.0},
    {"label_smoothing": 0.2},
    {"weighted": True},
    {"weighted": True, "label_smoothing": 0.2},
    {"soft": True},
    {"soft": True, "weighted": True, "label_smoothing": 0.2},
    {"scale": 0.3, "softcap": 2.0},
    {"scale": -1.5, "weighted": True},
    {"softcap": 1.5, "label_smoothing": 0.1, "soft": True},
    {"label_smoothing": 1.0},
]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_every_option_gives_eager_numbers_in_float64(
    options: dict[str, Any], reduction: str, chunk_rows: int
) -> None:
    c = case(chunk_rows=chunk_rows, **options)
    g = upstream(reduction, len(c.target))
    actual = run(c.mine(reduction), c.inputs, g)
    assert_equal_in_float64(actual, run(c.plain(reduction), c.inputs, g))


@given(
    rows=st.integers(1, 30),
    hidden=st.integers(1, 9),
    classes=st.integers(1, 40),
    chunk_rows=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.5]),
    reduction=st.sampled_from(REDUCTIONS),
    weighted=st.booleans(),
)
def test_any_size_gives_eager_numbers(
    rows: int,
    hidden: int,
    classes: int,
    chunk_rows: int,
    ignored: float,
    reduction: str,
    weighted: bool,
) -> None:
    c = case(rows, hidden, classes, chunk_rows=chunk_rows, ignored=ignored, weighted=weighted)
    c.target[0] = 0
    g = upstream(reduction, rows)
    actual = run(c.mine(reduction), c.inputs, g)
    assert_equal_in_float64(actual, run(c.plain(reduction), c.inputs, g))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("factor", [1.0, 65536.0])
@pytest.mark.parametrize("chunk_rows", [8, 64])
def test_low_precision_is_as_near_to_float64_as_eager_is(
    dtype: torch.dtype, reduction: str, factor: float, chunk_rows: int
) -> None:
    if reduction != "mean":
        factor /= 160  # the mean by hand; else eager's float16 overflows

    def draw() -> Draw:
        c = case(160, 32, 259, dtype=dtype, chunk_rows=chunk_rows)
        return c.mine(reduction), c.plain(reduction), c.inputs

    assert_near_float64(draw, factor)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_with_all_labels_ignored_gradients_are_zero(dtype: torch.dtype, reduction: str) -> None:
    c = case(dtype=dtype, ignored=1.1)
    loss, *gradients = run(c.mine(reduction), c.inputs)
    plain_loss, *plain = run(c.plain(reduction), c.inputs)
    assert len(gradients) == 3
    assert all(not gradient.any() for gradient in (*gradients, *plain))
    torch.testing.assert_close(loss, plain_loss, equal_nan=True)
    assert loss.isnan().any() == (reduction == "mean")


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_with_class_weights_that_are_all_zero_gradients_are_eagers(
    dtype: torch.dtype, reduction: str
) -> None:
    c = case(dtype=dtype)
    c = replace(c, class_weight=torch.zeros(13, dtype=dtype))
    mine, plain = run(c.mine(reduction), c.inputs), run(c.plain(reduction), c.inputs)
    for own, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(own, expected, equal_nan=True, check_dtype=False)
    assert mine[0].isnan().any() == (reduction == "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "trained",
    [(True, False, False), (False, True, False), (False, False, True), (False, True, True)],
    ids=["input", "weight", "bias", "weight and bias"],
)
def test_each_input_gets_its_gradient_while_others_are_frozen(
    reduction: str, trained: tuple[bool, ...]
) -> None:
    c = case()
    g = upstream(reduction, len(c.target))
    actual = run(c.mine(reduction), c.inputs, g, trained)
    assert len(actual) == 1 + sum(trained)
    assert_equal_in_float64(actual, run(c.plain(reduction), c.inputs, g, trained))


def test_log_sum_exps_carry_gradients_too() -> None:
    c = case()
    g, h = (torch.randn(len(c.target), dtype=torch.float64) for _ in range(2))

    def mine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values, lse = torch.ops.memopt.linear_cross_entropy_rows(*c.arguments(x, weight, bias))
        total: Tensor = (values * g).sum() + (lse * h).sum()
        return total

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        lse = logits(x, weight, bias).logsumexp(1)
        return (c.plain("none")(x, weight, bias) * g).sum() + (lse * h).sum()

    def only_lse(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        lse: Tensor = torch.ops.memopt.linear_cross_entropy_rows(*c.arguments(x, weight, bias))[1]
        return lse

    assert_equal_in_float64(run(mine, c.inputs), run(plain, c.inputs))
    expected = run(lambda *inputs: logits(*inputs).logsumexp(1), c.inputs, h)
    assert_equal_in_float64(run(only_lse, c.inputs, h), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wrong", [13, -1, 2**40])
def test_a_label_out_of_range_fails_with_eager_words(reduction: str, wrong: int) -> None:
    c = case()
    c.target[7] = wrong
    with pytest.raises(IndexError) as eager:
        c.plain(reduction)(*c.inputs)
    with pytest.raises(IndexError) as mine:
        c.mine(reduction)(*c.inputs)
    assert str(mine.value) == str(eager.value)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_by_bit(reduction: str, dtype: torch.dtype) -> None:
    c = case(64, 32, 501, dtype=dtype, chunk_rows=7)
    assert_same_bits(*(run(c.mine(reduction), c.inputs) for _ in range(2)))


def trained_loss(reduction: str) -> tuple[Tensor, Tensor]:
    """Hidden states, and a loss that they are trained by."""
    c = case()
    x, weight, bias = c.inputs
    x.requires_grad_()
    return x, c.mine(reduction)(x, weight, bias).sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_derivative_is_refused(reduction: str) -> None:
    x, loss = trained_loss(reduction)
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_kept_graph_gives_the_same_gradients_twice(reduction: str) -> None:
    x, loss = trained_loss(reduction)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_buffers_are_made_for_the_gradients_that_are_wanted_and_no_others() -> None:
    c = case(512, 64, 1024, dtype=torch.float32, chunk_rows=8, ignored=0.0)
    x, weight, _ = c.inputs
    x_bytes, weight_bytes = x.nbytes, weight.nbytes

    def peak(*trained: bool, reduction: str = "mean") -> int:
        return peak_bytes(c.mine(reduction), c.inputs, trained)

    nothing = peak(False, False, False)
    assert nothing < min(x_bytes, weight_bytes)
    assert x_bytes < peak(True, False, False) < x_bytes + nothing + 2**16
    assert weight_bytes < peak(False, True, False) < weight_bytes + nothing + 2**16
    assert peak(True, True, True, reduction="none") < nothing + 2**16


def test_the_logits_never_exist() -> None:
    c = case(512, 16, 2048, dtype=torch.float32, chunk_rows=8)
    logits_bytes = 512 * 2048 * 4
    for reduction in REDUCTIONS:
        with Meter() as meter:
            run(c.mine(reduction), c.inputs)
        assert meter.peak_bytes < logits_bytes / 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float16, "bias": False}, {"soft": True, "weighted": True}],
    ids=str,
)
def test_torch_finds_the_operators_in_order(reduction: str, options: dict[str, Any]) -> None:
    c = case(**options)
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in c.inputs)
    assert x is not None
    assert weight is not None
    a = c.arguments(x, weight, bias)
    if reduction == "none":
        torch.library.opcheck(torch.ops.memopt.linear_cross_entropy_rows.default, a)
        g = torch.ones(len(c.target))
        frozen = c.arguments(*c.inputs)._replace(wanted=a.wanted)
        backward = torch.ops.memopt.linear_cross_entropy_rows_backward.default
        torch.library.opcheck(backward, (*frozen, g, None))
        torch.library.opcheck(backward, (*frozen, g, g))
    else:
        operator = torch.ops.memopt.linear_cross_entropy.default
        torch.library.opcheck(operator, (*a, reduction == "mean"))


@pytest.mark.parametrize("flipped", ["x", "weight"])
def test_results_are_contiguous_whatever_the_strides_of_the_inputs(flipped: str) -> None:
    x, w = torch.randn(6, 4), torch.randn(9, 4)
    x = x.t().contiguous().t() if flipped == "x" else x
    w = w.t().contiguous().t() if flipped == "weight" else w
    shared = (x, w, None, torch.randint(0, 9, (6,)), None, -100, 0.0, 1.0, 0.0, 4)
    wanted = [True, True, False]
    torch.library.opcheck(kernel.REDUCED, (*shared, wanted, True))
    torch.library.opcheck(ROWS_BACKWARD, (*shared, wanted, torch.randn(6), None))


def test_an_ignored_row_may_hold_anything() -> None:
    x, w = torch.randn(6, 4), torch.randn(9, 4)
    x[2] = torch.nan
    target = torch.tensor([1, 2, -100, 3, 4, 5])
    rows, _ = ROWS(x, w, None, target, None, -100, 0.0, 1.0, 0.0, 4, [False] * 3)
    assert rows[2] == 0
    assert rows.isfinite().all()
