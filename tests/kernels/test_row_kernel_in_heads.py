"""Heads and their operators with the row kernel: the same numbers, the bytes that are foreseen."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

from memopt._torch import FakeTensorMode
from memopt.kernels import chunks, cross_entropy_rows, linear_cross_entropy, serving, triton_rows
from memopt.kernels.chunks import run_rows
from memopt.kernels.head import Head
from memopt.kernels.rows import IndexTargets, RowLoss, SoftTargets
from tests.kernels.row_cases import Rows, eager_rows
from tests.scratch import assert_scratch_is

Tensor = torch.Tensor


@pytest.fixture
def row_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on the CPU too, where it is interpreted."""
    for module in (chunks, linear_cross_entropy):
        monkeypatch.setattr(module, "has_row_kernel", lambda loss, x: loss is IndexTargets)


@pytest.mark.parametrize("rows", [slice(2, 7), torch.tensor([0, 3, 4, 9])], ids=["slice", "list"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_rows_of_a_head_go_through_it(
    row_kernel: None, rows: slice | Tensor, trained: bool
) -> None:
    whole = Rows.draw(10, 300, weighted=True, normaliser=True, scale=0.5, softcap=4.0)
    layer = Head(whole.raw, whole.raw, None, whole.scale, whole.softcap)
    upstream = (whole.g, whole.h) if trained else (None, None)
    mine, plain = whole.raw[rows].clone(), whole.raw[rows].clone()
    actual = run_rows(layer, whole.loss, mine, rows, *upstream)
    expected = eager_rows(layer, whole.loss, plain, rows, *upstream)
    torch.testing.assert_close(actual, expected)
    if trained:
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_give_the_same_with_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, w = torch.randn(40, 32).to(dtype), torch.randn(300, 32).to(dtype)
    target = torch.randint(300, (40,))
    target[::7] = -100
    shared = (x, w, None, target, torch.rand(300), -100, 0.1, 0.5, 4.0, 16)
    g, h = torch.randn(40), torch.randn(40)

    def results() -> list[Tensor]:
        return [
            *linear_cross_entropy.REDUCED(*shared, [True, True, False], True),
            *cross_entropy_rows.ROWS(*shared, [False] * 3),
            *cross_entropy_rows.ROWS_BACKWARD(*shared, [True, True, False], g, h),
        ]

    expected = results()
    kernel = Mock(side_effect=triton_rows.run)
    monkeypatch.setattr(chunks, "has_row_kernel", lambda loss, x: loss is IndexTargets)
    monkeypatch.setattr(triton_rows, "run", kernel)
    for mine, plain in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, plain)
    assert kernel.call_count == 9  # three chunks each; the reduced one leaves ignored rows out


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [  # in bfloat16 only with a sum in float32, as oneDNN's scratch is more than what is left here
        (torch.float32, (64, 32, 2000, 16)),
        (torch.float32, (72, 64, 8000, 8)),
        (torch.bfloat16, (72, 64, 8000, 8)),
    ],
)
@pytest.mark.parametrize("options", [(0.0, 0.0, False), (5.0, 0.1, True)])
def test_what_it_allocates_is_what_the_formula_says(
    row_kernel: None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    options: tuple[float, float, bool],
) -> None:
    rows, width, classes, chunk_rows = shape
    softcap, smoothing, weighted = options
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    target = torch.randint(0, classes, (rows,))
    weight = torch.rand(classes) if weighted else None
    wanted = [True, True, False]
    args = (x, w, None, target, weight, -100, smoothing, 1.0, softcap, chunk_rows, wanted, True)
    formula_bytes = linear_cross_entropy.scratch_bytes(*args)
    assert_scratch_is(formula_bytes, partial(linear_cross_entropy.REDUCED, *args))


@pytest.mark.parametrize(
    ("loss", "dtype", "capability", "installed", "expected"),
    [
        (IndexTargets, torch.bfloat16, (9, 0), True, True),
        (IndexTargets, torch.float32, (8, 0), True, True),
        (IndexTargets, torch.float64, (9, 0), True, False),
        (SoftTargets, torch.bfloat16, (9, 0), True, False),
        (IndexTargets, torch.bfloat16, (7, 5), True, False),
        (IndexTargets, torch.bfloat16, (9, 0), False, False),
    ],
)
def test_it_runs_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    loss: type[RowLoss],
    dtype: torch.dtype,
    capability: tuple[int, int],
    installed: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(serving, "_triton_is_installed", lambda: installed)
    with FakeTensorMode():
        x = torch.empty(1, dtype=dtype, device="cuda")
    assert chunks.has_row_kernel(loss, x) is expected
    assert not chunks.has_row_kernel(loss, torch.empty(1, dtype=dtype))
