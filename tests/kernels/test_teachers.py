"""Row losses against a teacher: values and gradients against plain PyTorch."""

import math

import pytest
import torch

from memopt.kernels.head import Head
from memopt.kernels.rows import RowLoss
from memopt.kernels.teachers import FromHead, FromLogits
from tests import references
from tests.references import assert_equal_in_float64

Tensor = torch.Tensor
ROWS, CLASSES = 8, 13
BETAS = pytest.mark.parametrize("beta", [0.0, 1.0, 0.5, 0.1, 0.9])


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def teachers(beta: float, *, cross: bool = False) -> tuple[Tensor, dict[str, RowLoss]]:
    """Logits of a teacher, and the losses against it in both forms."""
    x, weight, bias = wide(ROWS, 5), wide(CLASSES, 5), wide(CLASSES)
    head = Head(x, weight, bias, scale=0.5, softcap=3.0)
    given = Head(x @ weight.t() + bias, weight, None, scale=0.5, softcap=3.0)
    whole = references.logits(x, weight, bias, scale=0.5, softcap=3.0)
    return whole, {
        "head": FromHead.of(head, beta, cross=cross, chunk_rows=6),
        "logits": FromLogits(given, beta, cross),
    }


def check(loss: RowLoss, of_teacher: Tensor, beta: float, cross: bool, normaliser: bool) -> None:
    """Values and gradient of the loss's rows."""
    block = loss.at(slice(1, 3))
    z = wide(2, CLASSES).requires_grad_()
    lse = torch.logsumexp(z, 1)
    expected = references.divergence(z, of_teacher, beta)
    if cross:
        expected = -(of_teacher.softmax(1) * z.log_softmax(1)).sum(1)
    g, h = torch.randn_like(lse), torch.randn_like(lse) if normaliser else None
    total = (expected * g).sum() + (0.0 if h is None else (lse * h).sum())
    (gradient,) = torch.autograd.grad(total, z)
    with torch.no_grad():
        values = block.values(z, lse)
        p = torch.softmax(z, 1)
        block.gradient_(p, z, lse, g, h)
    assert_equal_in_float64([values, p], [expected.detach(), gradient])


@BETAS
@pytest.mark.parametrize("form", ["head", "logits"])
@pytest.mark.parametrize("rows", [slice(2, 6), torch.tensor([4, 0, 6, 7])], ids=["slice", "list"])
@pytest.mark.parametrize("normaliser", [False, True])
def test_the_gradient_of_some_rows_is_that_of_their_values(
    beta: float, form: str, rows: slice | Tensor, normaliser: bool
) -> None:
    whole, losses = teachers(beta)
    check(losses[form].at(rows), whole[rows][1:3], beta, False, normaliser)


def test_without_the_teachers_entropy_it_is_the_cross_entropy() -> None:
    whole, losses = teachers(0.0, cross=True)
    for loss in losses.values():
        check(loss.at(slice(2, 6)), whole[3:5], 0.0, True, True)


def test_a_class_that_the_teacher_rules_out_counts_for_nothing() -> None:
    z, of_teacher = wide(2, CLASSES), wide(2, CLASSES)
    of_teacher[:, 3] = -math.inf
    kept = [c for c in range(CLASSES) if c != 3]
    q, log_p = of_teacher.softmax(1), z.log_softmax(1)
    expected = (q[:, kept] * (q[:, kept].log() - log_p[:, kept])).sum(1)
    block = FromLogits(Head(of_teacher, of_teacher), 0.0, False).at(slice(0, 2))
    values, p = block.values(z, z.logsumexp(1)), z.softmax(1)
    block.gradient_(p, z, z.logsumexp(1), torch.ones(2).double(), None)
    assert_equal_in_float64([values, p], [expected, z.softmax(1) - q])
    mixed = FromLogits(Head(of_teacher, of_teacher), 0.5, False).at(slice(0, 2))
    assert mixed.values(z, z.logsumexp(1)).isfinite().all()
