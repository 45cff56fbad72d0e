"""The operators without logits in memory: their results, their bytes and where they serve."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from memopt._torch import FakeTensorMode
from memopt.errors import ConfigError
from memopt.kernels import cross_entropy_rows, cut_launches, linear_cross_entropy
from memopt.kernels import cut_cross_entropy as cut
from memopt.kernels.head import Sizes
from tests.idle_kernels import IdleKernels
from tests.kernels.cut_cases import FULL, Case, arguments
from tests.references import LOW_PRECISION, assert_draws_within_reference_error
from tests.scratch import scratch_of

Tensor = torch.Tensor


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators may be cut on the CPU too, where kernels are interpreted."""
    monkeypatch.setattr(cut, "serves", lambda a: not a.target.is_floating_point())


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_the_operators_are_as_near_to_float64_as_chunks_are(
    served: None, dtype: torch.dtype
) -> None:

    def results(case: Case, chunk_rows: int) -> list[Tensor]:
        a = arguments(case, chunk_rows=chunk_rows)
        value, *gradients, factor = linear_cross_entropy.REDUCED(*a, True)
        return [
            value,
            *(gradient * factor for gradient in gradients),
            *cross_entropy_rows.ROWS(*a),
            *cross_entropy_rows.ROWS_BACKWARD(*a, case.g, case.h),
        ]

    def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        case = Case.draw(60, 32, 300, dtype=dtype, **FULL)
        case.loss.target_N[::7] = -100
        mine, plain = results(case, 0), results(case, 16)
        assert [t.dtype for t in mine] == [t.dtype for t in plain]
        return mine, results(case.double, 16), plain

    assert_draws_within_reference_error(draw, 3)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [((200, 64, 520), {}), ((40, 32, 5000), FULL), ((2500, 8, 300), {"smoothing": 0.1})],
    ids=str,
)
def test_what_it_allocates_is_what_the_formula_says(
    served: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(cut_launches, "kernels", IdleKernels())
    case = Case.draw(*shape, dtype=dtype, **options)
    a, g = arguments(case), torch.randn(shape[0])
    frozen = a._replace(wanted=(False,) * 3)
    for operator, args in (
        (linear_cross_entropy.REDUCED, (*a, True)),
        (linear_cross_entropy.REDUCED, (*frozen, True)),
        (cross_entropy_rows.ROWS, a),
        (cross_entropy_rows.ROWS_BACKWARD, (*a, g, g)),
    ):
        measured = scratch_of(partial(operator, *args))
        assert abs(linear_cross_entropy.scratch_bytes(*args) - measured) <= 16  # single numbers


def test_scratch_grows_with_neither_rows_nor_classes_but_for_a_few_numbers_a_row() -> None:
    small, large = (
        cut.scratch_bytes(
            Sizes(rows, 4096, classes, torch.bfloat16, (True, True, False)), smoothed=False
        )
        for rows, classes in ((4096, 32_000), (65_536, 256_000))
    )
    assert small == large == 2048 * 2048 * 2 + 2048 * 4096 * 4


def test_zero_rows_of_a_chunk_are_refused_where_logits_are_needed() -> None:
    case = Case.draw(4, 16, 8)
    with pytest.raises(ConfigError, match=r"chunk_rows=0.*cpu.*give a number of rows"):
        linear_cross_entropy.REDUCED(*arguments(case), True)


@pytest.mark.parametrize(
    ("dtype", "target", "capability", "expected"),
    [
        (torch.bfloat16, torch.int64, (9, 0), True),
        (torch.float32, torch.int64, (8, 0), True),
        (torch.float64, torch.int64, (9, 0), False),
        (torch.bfloat16, torch.float32, (9, 0), False),
        (torch.bfloat16, torch.int64, (7, 5), False),
    ],
)
def test_it_serves_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    target: torch.dtype,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    a = arguments(Case.draw(4, 16, 8))
    assert not cut.serves(a)
    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=dtype, device="cuda")
        y = torch.empty((4, 8) if target.is_floating_point else (4,), dtype=target, device="cuda")
    assert cut.serves(a._replace(x=x, target=y)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_compiled_it_allocates_what_the_formula_says(dtype: torch.dtype) -> None:
    case = Case.draw(8192, 1024, 50_304, dtype=dtype, device="cuda")
    args = (*arguments(case), True)
    measured = scratch_of(partial(linear_cross_entropy.REDUCED, *args), "cuda")
    assert abs(linear_cross_entropy.scratch_bytes(*args) - measured) <= 2**16  # rounded to blocks
