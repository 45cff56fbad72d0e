"""What a call allocates and frees again: measured, and held against a formula."""

from collections.abc import Callable

from bench.meter import Meter


def scratch_of(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that a call allocates beside its result, at their peak; a first call warms up."""
    call()
    with Meter(device) as meter:
        result = call()
    del result
    return meter.peak_bytes - meter.end_bytes


def assert_scratch_is(formula_bytes: int, call: Callable[[], object]) -> None:
    """To a hundredth, and a page for single numbers and vectors."""
    measured = scratch_of(call)
    assert abs(formula_bytes - measured) <= measured // 100 + 4096
