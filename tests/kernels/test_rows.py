"""Values against plain PyTorch, gradients against autograd of those values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memopt.kernels.rows import IndexTargets, RowLoss, SoftTargets, log_sum_exp
from tests.references import assert_gradient_is_that_of_the_values

Tensor = torch.Tensor
ROWS, CLASSES = 7, 11


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def index_targets(weighted: bool, smoothing: float) -> IndexTargets:
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    return IndexTargets(torch.randint(CLASSES, (ROWS,)), weight, smoothing)


def soft_targets(weighted: bool, smoothing: float) -> SoftTargets:
    weight = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
    return SoftTargets(wide(ROWS, CLASSES).softmax(1), weight, smoothing)


def plain(loss: Any, z: Tensor) -> Tensor:
    target = loss.target_N if isinstance(loss, IndexTargets) else loss.target_NV
    return F.cross_entropy(
        z, target, loss.weight_V, reduction="none", label_smoothing=loss.smoothing
    )


MAKERS = pytest.mark.parametrize("make", [index_targets, soft_targets])
OPTIONS = pytest.mark.parametrize(
    ("weighted", "smoothing"), [(w, s) for w in (False, True) for s in (0.0, 0.3)]
)


@MAKERS
@OPTIONS
def test_values_are_those_of_cross_entropy(make: Any, weighted: bool, smoothing: float) -> None:
    loss, z = make(weighted, smoothing), wide(ROWS, CLASSES)
    values = loss.values(z, torch.logsumexp(z, 1))
    torch.testing.assert_close(values, plain(loss, z), rtol=1e-12, atol=1e-12)


@MAKERS
@OPTIONS
@pytest.mark.parametrize("normaliser", [False, True])
def test_the_gradient_is_that_of_the_values(
    make: Any, weighted: bool, smoothing: float, normaliser: bool
) -> None:
    loss = make(weighted, smoothing)
    assert_gradient_is_that_of_the_values(loss, wide(ROWS, CLASSES), normaliser=normaliser)


@MAKERS
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([4, 0, 6])])
def test_the_loss_of_some_rows_is_that_part_of_the_whole(make: Any, rows: slice | Tensor) -> None:
    loss: RowLoss = make(True, 0.1)
    z = wide(ROWS, CLASSES)
    part = loss.at(rows).values(z[rows], torch.logsumexp(z[rows], 1))
    torch.testing.assert_close(part, plain(loss, z)[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e3])
def test_log_sum_exp_is_read_off_the_softmax(spread: float) -> None:
    z = wide(ROWS, CLASSES) * spread
    actual = log_sum_exp(z.amax(1), torch.softmax(z, 1))
    torch.testing.assert_close(actual, torch.logsumexp(z, 1), rtol=1e-14, atol=1e-14)
