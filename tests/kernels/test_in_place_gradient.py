"""The gradient of the hidden states in their own memory: the same bits, and fewer bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.meter import Meter
from memopt.errors import ConfigError
from memopt.kernels.in_place_gradient import IN_PLACE
from memopt.kernels.linear_cross_entropy import REDUCED, scratch_bytes

TOKENS, HIDDEN, CLASSES = 96, 64, 300
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def arguments(dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """What the operator takes, by name and in order."""
    values = {
        "x": torch.randn(TOKENS, HIDDEN, dtype=dtype),
        "weight": torch.randn(CLASSES, HIDDEN, dtype=dtype),
        "bias": torch.randn(CLASSES, dtype=dtype),
        "target": torch.randint(0, CLASSES, (TOKENS,)),
        "class_weight": None,
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "scale": 0.5,
        "softcap": 0.0,
        "chunk_rows": 32,
        "wanted": (True, True, True),
        "mean": True,
    }
    return {**values, **changes}


def both(given: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results with a gradient of its own, and with one that took the hidden states' place."""
    x = given["x"].clone()
    loss, *others = IN_PLACE(*{**given, "x": x}.values())
    return REDUCED(*given.values()), (loss, x, *others)


def assert_same_bits(given: dict[str, Any]) -> None:
    for own, in_place in zip(*both(given), strict=True):
        assert torch.equal(own, in_place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [7, 32, TOKENS, 2 * TOKENS])
def test_every_result_is_the_same_to_the_bit(dtype: torch.dtype, chunk_rows: int) -> None:
    assert_same_bits(arguments(dtype, chunk_rows=chunk_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_ignored_get_zeros(dtype: torch.dtype) -> None:
    given = arguments(dtype, chunk_rows=7)
    given["target"][::3] = -100
    given["x"][0] = torch.nan  # eager reads it too, and its gradient is 0 all the same
    given["label_smoothing"] = 0.0
    assert_same_bits(given)
    assert torch.equal(both(given)[1][1][::3], torch.zeros(TOKENS // 3, HIDDEN, dtype=dtype))


def test_with_nothing_but_ignored_rows_all_are_zero() -> None:
    given = arguments(torch.float32, target=torch.full((TOKENS,), -100), mean=False)
    assert_same_bits(given)
    assert not both(given)[1][1].any()


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 30.0},
        {"wanted": (True, False, False)},
        {"mean": False},
        {"target": torch.rand(TOKENS, CLASSES).softmax(-1)},
        {"class_weight": torch.rand(CLASSES)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_change_nothing(changes: dict[str, Any]) -> None:
    assert_same_bits(arguments(torch.float32, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"chunk_rows": 0},
        {"wanted": (False, True, True)},
        {"x": torch.randn(HIDDEN, TOKENS).t()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_cannot_be_is_an_error_and_overwrites_nothing(changes: dict[str, Any]) -> None:
    given = arguments(torch.float32, **changes)
    before = given["x"].clone()
    with pytest.raises(ConfigError, match="cannot take their place"):
        IN_PLACE(*given.values())
    assert torch.equal(given["x"], before)


def test_float16_is_refused_as_its_gradient_is_float32() -> None:
    with pytest.raises(ConfigError, match="float16"):
        IN_PLACE(*arguments(torch.float16).values())


def test_a_class_out_of_range_overwrites_nothing() -> None:
    given = arguments(torch.float32)
    given["target"][-1] = CLASSES
    before = given["x"].clone()
    with pytest.raises(IndexError, match="out of bounds"):
        IN_PLACE(*given.values())
    assert torch.equal(given["x"], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 500])
def test_scratch_is_no_more_than_is_foretold(dtype: torch.dtype, ignored: int) -> None:
    given = arguments(dtype, x=torch.randn(2000, HIDDEN, dtype=dtype), chunk_rows=256)
    given["target"] = torch.randint(0, CLASSES, (2000,))
    given["target"][:ignored] = -100
    IN_PLACE(*given.values())
    with Meter("cpu") as meter:
        results = IN_PLACE(*given.values())
    assert meter.peak_bytes - meter.end_bytes <= scratch_bytes(*given.values())
    assert sum(r.nbytes for r in results) < meter.end_bytes + 256 < 2000 * HIDDEN * 8
    del results


def test_the_operator_keeps_torchs_contracts() -> None:
    given = arguments(torch.float32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(IN_PLACE, tuple(given.values()), test_utils=tests)
