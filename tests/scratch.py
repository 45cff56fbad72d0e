"""What a call allocates and frees again: measured, and held against a formula."""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.meter import Meter
from memopt.kernels.spec import KernelSpec

# What single numbers and vectors take.
_PAGE_BYTES = 4096
# What a CPU copies a transposed matrix by way of: tiles of 60 by 60 entries.
_TRANSPOSED_BYTES = 60 * 60 * 8


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
    assert abs(formula_bytes - measured) <= measured // 100 + _PAGE_BYTES


def assert_scratch_is_stated(spec: KernelSpec, *args: Any) -> None:
    """The same, of what a kernel states of itself."""
    assert_scratch_is(spec.scratch(*args), partial(spec.operator, *args))


def assert_scratch_is_within(
    spec: KernelSpec, *args: Any, run: Callable[[Any], Any] = lambda call: call
) -> None:
    """It is no more than a kernel states of itself, of small arguments and other layouts too.

    Args:
        spec: the kernel.
        args: its arguments.
        run: makes of the call what is measured.
    """
    measured = scratch_of(run(partial(spec.operator, *args)))
    assert measured <= spec.scratch(*args) + _PAGE_BYTES + _TRANSPOSED_BYTES
