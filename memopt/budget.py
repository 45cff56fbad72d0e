"""The memory budget: how a user may write it, and the one form it has afterwards."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Literal, SupportsFloat

from memopt.errors import ConfigError, shown

UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
LEAST_BYTES = 1024
MOST_BYTES = 2**63 - 1

_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d{1,3})?\s*([a-z]*)")
_ALLOWED = (
    "allowed are a float in (0, 1] (a fraction of the peak with everything kept), an int of "
    "bytes, a size such as '6GiB' or '512MB', 'min', or None"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on the peak of a step, in bytes above what is resident when it starts.

    Attributes:
        kind: ``"none"`` bounds nothing, ``"fraction"`` is relative to the peak with everything
            kept, ``"bytes"`` is absolute, ``"min"`` asks for the lowest peak there is.
        value: the fraction or the number of bytes; 0 for the other two kinds.
    """

    kind: Literal["none", "fraction", "bytes", "min"] = "none"
    value: float | int = 0

    @classmethod
    def parse(cls, value: object) -> "Budget":
        """The budget that a user wrote.

        Raises:
            ConfigError: it is none of the allowed forms, or the number is out of range.
        """
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls("min") if value.strip().lower() == "min" else cls("bytes", _size(value))
        if isinstance(value, Integral) and not isinstance(value, bool):
            return cls("bytes", _in_range(value, int(value)))
        if isinstance(value, Real) and not isinstance(value, bool):
            return cls("fraction", _fraction(value))
        raise _refusal(value, f"it is a {type(value).__name__}")

    def limit_bytes(self, baseline_peak_bytes: int) -> int | None:
        """The bound in bytes; None where the kind has none of its own (``"none"``, ``"min"``).

        Args:
            baseline_peak_bytes: the peak with everything kept.
        """
        if self.kind == "fraction":
            return int(self.value * baseline_peak_bytes)
        return int(self.value) if self.kind == "bytes" else None

    def __str__(self) -> str:
        """A form that ``parse`` turns back into this budget, for all but a fraction and none."""
        if self.kind == "bytes":
            return f"{self.value} B"
        return repr(self.value) if self.kind == "fraction" else self.kind


def as_float(value: SupportsFloat) -> float:
    """``value`` as a float; infinity where no float is as large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refusal(value: object, reason: str) -> ConfigError:
    return ConfigError(f"option 'memory_budget' = {shown(value)}: {reason}; {_ALLOWED}")


def _fraction(value: Real) -> float:
    fraction = as_float(value)
    if 0 < fraction <= 1:
        return fraction
    if LEAST_BYTES <= fraction <= MOST_BYTES:
        raise _refusal(value, f"a float is a fraction; for bytes write the int {int(fraction)}")
    raise _refusal(value, "a float is a fraction, and this one is not in (0, 1]")


def _in_range(seen: object, size: int) -> int:
    if 0 < size < LEAST_BYTES:
        reason = f"{size} B is less than {LEAST_BYTES} B; for a fraction write a float"
        raise _refusal(seen, reason + (", 1.0 for everything kept" if size == 1 else ""))
    if size <= 0:
        raise _refusal(seen, "it leaves no byte; the lowest peak there is has the name 'min'")
    if size > MOST_BYTES:
        raise _refusal(seen, "it is more than any device can address; None bounds nothing")
    return size


def _size(text: str) -> int:
    """Bytes of ``"1.5 GiB"``, rounded down so that the bound is never wider than written."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise _refusal(text, "it is not a number followed by a unit")
    digits, exponent, unit = match.groups()
    if unit and unit not in UNITS:
        units = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise _refusal(text, f"{unit!r} is not one of the units {units}")
    number = Decimal(digits + (exponent or ""))
    if not unit and 0 < number <= 1:
        raise _refusal(text, f"a fraction is a float, not a string: write {float(number)!r}")
    return _in_range(text, int(number * UNITS.get(unit, 1)))
