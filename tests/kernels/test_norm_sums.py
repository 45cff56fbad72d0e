"""One program that adds up the rows of a whole batch is as exact as torch's sum of them."""

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.interpreter import install
from memopt.kernels import triton_norm

install()
ROWS, WIDTH = 4096, 256


def test_sums_of_many_rows_are_as_exact_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain running sum of as many is twice as far from float64."""
    monkeypatch.setattr(triton_norm, "processors", lambda x: 1)
    torch.manual_seed(0)
    x, dy = torch.randn(2, ROWS, WIDTH)
    weight, bias = torch.randn(2, WIDTH)
    mean, rstd = x.mean(1), 1 / x.std(1, correction=0)
    normal = (x - mean[:, None]) * rstd[:, None]
    _, *sums, _ = triton_norm.backward(
        dy, None, x, weight, bias, mean, rstd, 0.0, [True, True], False
    )
    for mine, parts in zip(sums, (dy * normal, dy), strict=True):
        exact = parts.double().sum(0)
        assert (mine - exact).norm() <= (parts.sum(0) - exact).norm()
