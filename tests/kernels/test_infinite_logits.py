"""Logits of minus infinity, as vocabularies are padded with: eager's results, NaN or not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench.triton.interpreter import install
from memopt.kernels import cut_cross_entropy as cut
from memopt.kernels.head import Head
from memopt.kernels.rows import IndexTargets

install()
Tensor = torch.Tensor


def eager(x: Tensor, w: Tensor, b: Tensor, y: Tensor, g: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    values = F.cross_entropy(F.linear(*leaves), y, reduction="none", **options)
    return [values.detach(), *torch.autograd.grad(values, leaves, g)]


@pytest.mark.parametrize("classes", [200, 256, 2100])
@pytest.mark.parametrize("where", [-1, 0, 77])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_class_of_minus_infinity_has_eagers_loss_and_gradients(
    classes: int, where: int, smoothing: float, weighted: bool
) -> None:
    x, w, b = torch.randn(40, 16), 0.3 * torch.randn(classes, 16), torch.randn(classes)
    b[where] = -torch.inf
    y, g = torch.randint(1, classes - 1, (40,)), torch.rand(40) + 0.5
    y[y == where] += 1
    y[3] = where % classes
    weight = torch.rand(classes) + 0.5 if weighted else None
    loss = IndexTargets(y, weight, smoothing)
    values, _, gradients = cut.run(Head(x, w, b), loss, (True, True, True), g)
    expected = eager(x, w, b, y, g, label_smoothing=smoothing, weight=weight)
    assert expected[0].isinf().sum() == (40 if smoothing else 1)
    for mine, plain in zip((values, *gradients), expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4, equal_nan=True)
