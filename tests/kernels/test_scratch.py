"""What the operators allocate besides their results is what their formulas say."""

from functools import partial
from typing import Any

import pytest
import torch

from memopt.kernels import divergence, linear_cross_entropy
from memopt.kernels.divergence import Arguments
from tests.references import LOW_PRECISION
from tests.scratch import assert_scratch_is

Tensor = torch.Tensor


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", [(64, 32, 2000, 16), (300, 64, 30000, 100), (270, 64, 8000, 30)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("softcap", "smoothing", "weighted"), [(0.0, 0.0, False), (5.0, 0.1, True), (0.0, 0.1, True)]
)
def test_the_formula_of_the_cross_entropy_holds_whatever_is_ignored(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    trained: bool,
    ignored: bool,
    softcap: float,
    smoothing: float,
    weighted: bool,
) -> None:
    rows, width, classes, chunk_rows = shape
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    target = torch.randint(0, classes, (rows,))
    if ignored:
        target[::5] = -100
    weight = torch.rand(classes) if weighted else None
    wanted = [trained, trained, False]
    args = (x, w, None, target, weight, -100, smoothing, 1.0, softcap, chunk_rows, wanted, True)
    assert_scratch_is(
        linear_cross_entropy.scratch_bytes(*args), partial(linear_cross_entropy.REDUCED, *args)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("trained", [False, True])
def test_the_formula_of_the_cross_entropy_knows_what_distributions_as_targets_cost(
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    smoothing: float,
    weighted: bool,
    trained: bool,
) -> None:
    x, w = torch.randn(60, 32, dtype=dtype), torch.randn(20000, 32, dtype=dtype)
    target = torch.randn(60, 20000).softmax(1).to(target_dtype)
    weight = torch.rand(20000) if weighted else None
    wanted = [trained, trained, False]
    args = (x, w, None, target, weight, -100, smoothing, 1.0, 0.0, 20, wanted, True)
    assert_scratch_is(
        linear_cross_entropy.scratch_bytes(*args), partial(linear_cross_entropy.REDUCED, *args)
    )


# rows, hidden sizes, classes and rows of a chunk: one block a chunk, two, and many chunks
SHAPES = [
    (torch.float32, (64, 32, 48, 2000, 16)),
    (torch.float32, (90, 16, 8, 35000, 64)),
    (torch.bfloat16, (90, 16, 8, 35000, 64)),
    (torch.bfloat16, (270, 32, 64, 3000, 30)),
    (torch.float16, (90, 16, 8, 3500, 30)),
    (torch.float16, (270, 32, 64, 3000, 30)),
]


@pytest.mark.parametrize(("dtype", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize(
    ("form", "ignored"),
    [("reduced", False), ("reduced", True), ("rows", True), ("backward", True)],
)
@pytest.mark.parametrize(
    ("beta", "softcap", "given"),
    [(0.0, 0.0, False), (1.0, 5.0, False), (0.5, 5.0, True)],
)
def test_the_formula_of_the_divergences_holds_whatever_is_ignored(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    form: str,
    ignored: bool,
    beta: float,
    softcap: float,
    given: bool,
) -> None:
    rows, width, other, classes, chunk_rows = shape
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    given_to, matrix = torch.randn(rows, classes if given else other, dtype=dtype), None
    if not given:
        matrix = torch.randn(classes, other, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.int64)
    if ignored:
        target[::5] = -100
    args: tuple[Any, ...] = Arguments(
        x, w, None, given_to, matrix, None, target, -100, beta, False, [1.0, 1.0],
        [softcap] * 2, chunk_rows, [True, True, False],
    )  # fmt: skip
    if form == "backward":
        args = (*args, torch.ones(rows))
    elif form == "reduced":
        args = (*args, "batchmean")
    operators = {
        "reduced": divergence.REDUCED,
        "rows": divergence.ROWS,
        "backward": divergence.ROWS_BACKWARD,
    }
    assert_scratch_is(divergence.scratch_bytes(*args), partial(operators[form], *args))
