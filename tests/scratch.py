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
    _assert_some_scratch(
        lambda measured: abs(formula_bytes - measured) <= measured // 100 + _PAGE_BYTES, call
    )


def assert_scratch_is_stated(spec: KernelSpec, *args: Any) -> None:
    """The same, of what a kernel states of itself."""
    assert_scratch_is(spec.scratch(*args), partial(spec.operator, *args))


def assert_scratch_is_within(spec: KernelSpec, *args: Any) -> None:
    """It is no more than a kernel states of itself, of small arguments and other layouts too."""
    limit_bytes = spec.scratch(*args) + _PAGE_BYTES + _TRANSPOSED_BYTES
    _assert_some_scratch(lambda measured: measured <= limit_bytes, partial(spec.operator, *args))


def _assert_some_scratch(holds: Callable[[int], bool], call: Callable[[], object]) -> None:
    """One of three calls takes such scratch.

    The meter goes by the clock, which on a shared machine may once put a release behind an
    allocation that followed it. What a call truly takes, it takes every time.
    """
    seen: list[int] = []
    while len(seen) < 3 and not any(map(holds, seen)):
        seen.append(scratch_of(call))
    assert any(map(holds, seen)), f"{call} takes {seen} bytes"
