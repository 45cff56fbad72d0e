"""A memory budget is read in every form that people write, and in no other."""

import contextlib
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.budget import LEAST_BYTES, MOST_BYTES, Budget
from memopt.errors import ConfigError

SIZES = st.integers(LEAST_BYTES, MOST_BYTES)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("6GiB", 6 * 2**30),
        ("512MB", 512_000_000),
        ("1.5 GiB", 3 * 2**29),
        (" 64 kib ", 65536),
        ("2e9", 2_000_000_000),
        ("2e9 B", 2_000_000_000),
        ("1.5e1 TB", 15_000_000_000_000),
        (".5TiB", 2**39),
        ("3.GB", 3_000_000_000),
        ("1073741824", 2**30),
        ("2 KB", 2000),
        ("7 mIb", 7 * 2**20),
        (1024, 1024),
        (6 * 2**30, 6 * 2**30),
        (np.int64(4096), 4096),
    ],
)
def test_bytes_are_read(written: object, size: int) -> None:
    assert Budget.parse(written) == Budget("bytes", size)


@pytest.mark.parametrize("fraction", [0.5, 1.0, 1e-9, np.float32(0.25), Fraction(3, 4)])
def test_a_number_that_is_no_integer_is_a_fraction(fraction: float) -> None:
    assert Budget.parse(fraction) == Budget("fraction", float(fraction))


def test_none_bounds_nothing() -> None:
    assert Budget.parse(None) == Budget()
    assert Budget().limit_bytes(100) is None


@pytest.mark.parametrize("written", ["min", "MIN", " Min\n"])
def test_min_is_read_in_any_case(written: str) -> None:
    assert Budget.parse(written) == Budget("min")
    assert Budget.parse(written).limit_bytes(100) is None


def test_a_fraction_is_of_the_baseline_and_rounds_down() -> None:
    assert Budget.parse(0.5).limit_bytes(1001) == 500
    assert Budget.parse("1 KiB").limit_bytes(7) == 1024


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "not a number followed by a unit"),
        ("  ", "not a number followed by a unit"),
        ("max", "not a number followed by a unit"),
        ("50%", "not a number followed by a unit"),
        ("-6GiB", "not a number followed by a unit"),
        ("nan", "not a number followed by a unit"),
        ("inf GB", "not a number followed by a unit"),
        ("1_000_000 B", "not a number followed by a unit"),
        ("6 gigs", "'gigs' is not one of the units"),
        ("6G", "'g' is not one of the units B, KB, MB"),
        ("0.5", "write 0.5"),
        ("1", "write 1.0"),
        ("1B", "less than 1024 B"),
        ("0 GiB", "leaves no byte"),
        ("1e-999GB", "leaves no byte"),
        ("1e999TB", "more than any device can address"),
        (10**30, "more than any device can address"),
        (1, "1.0 for everything kept"),
        (512, "less than 1024 B; for a fraction write a float"),
        (0, "leaves no byte"),
        (-5, "leaves no byte"),
        (0.0, "not in (0, 1]"),
        (-0.5, "not in (0, 1]"),
        (1.5, "not in (0, 1]"),
        (math.nan, "not in (0, 1]"),
        (math.inf, "not in (0, 1]"),
        (Fraction(10**400), "not in (0, 1]"),
        (6e9, "write the int 6000000000"),
        (True, "it is a bool"),
        (False, "it is a bool"),
        ([1], "it is a list"),
        (b"6GiB", "it is a bytes"),
        (1j, "it is a complex"),
    ],
)
def test_anything_else_is_refused_with_the_reason_and_the_forms(
    written: object, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.parse(written)
    message = str(caught.value)
    assert message.startswith(f"option 'memory_budget' = {written!r}: ")
    assert reason in message
    assert "a float in (0, 1]" in message
    assert "'6GiB'" in message


@given(SIZES)
def test_bytes_survive_a_round_trip_through_text(size: int) -> None:
    budget = Budget("bytes", size)
    assert Budget.parse(str(budget)) == budget == Budget.parse(size)


@given(SIZES.filter(lambda size: size <= MOST_BYTES // 2**20), st.sampled_from(["MiB", "mib"]))
def test_a_whole_number_of_units_is_exact(count: int, unit: str) -> None:
    assert Budget.parse(f"{count}{unit}").value == count * 2**20


@given(st.floats(0.001, 1000, allow_nan=False))
def test_a_part_of_a_unit_is_never_rounded_up(count: float) -> None:
    value = Budget.parse(f"{count!r} GiB").value
    assert value <= Fraction(repr(count)) * 2**30 < value + 1


@given(st.text())
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        Budget.parse(text)


def test_a_budget_is_a_value() -> None:
    budget = Budget.parse("6GiB")
    assert pickle.loads(pickle.dumps(budget)) == budget
    assert hash(budget) == hash(Budget("bytes", 6 * 2**30))
