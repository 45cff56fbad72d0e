"""Where an entry of a tensor lies in a space of rows and columns: digits of a mixed radix.

An index into a tensor is one tuple of digits per dimension, the most significant first, and a
digit is ``(axis // inner) % size``. Shapes are taken apart and put together again by their sizes
alone, so a reshape moves digits and multiplies nothing; sympy sees the offset in memory at the
end. Rows may be symbolic, columns are numbers.

Legend: ``R`` rows, ``W`` columns of a row.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy

ROW = sympy.Symbol("row", integer=True, nonnegative=True)
COLUMN = sympy.Symbol("column", integer=True, nonnegative=True)

Size = Any  # an int, or a sympy expression of size symbols
Axis = Literal["row", "column"]


class UnfusableError(Exception):
    """What cannot be part of a fused region, and why; the region is made without it."""


class Quotient(sympy.Function):  # type: ignore[misc]
    """``a // b`` of numbers that are not negative."""

    nargs = 2
    is_integer = True


class Remainder(sympy.Function):  # type: ignore[misc]
    """``a % b`` of numbers that are not negative."""

    nargs = 2
    is_integer = True


@dataclass(frozen=True, slots=True)
class Digit:
    """``(axis // inner) % size``: one digit of a row's or a column's number.

    Attributes:
        axis: whose.
        inner: what the digit counts in.
        size: how many values it takes.
    """

    axis: Axis
    inner: Size
    size: Size


Index = tuple[tuple[Digit, ...], ...]


@dataclass(frozen=True, slots=True)
class Space:
    """What a fused region goes over.

    Attributes:
        rows: ``R``.
        width: ``W``.
    """

    rows: Size
    width: int

    def index(self, shape: Sequence[Size]) -> Index:
        """The index of a tensor with the same number of entries for every row.

        Raises:
            UnfusableError: it has not, or not a divisor of the width.
        """
        lanes = ratio(product(shape), self.rows)
        if not isinstance(lanes, int) or lanes < 1 or self.width % lanes:
            raise UnfusableError(f"a shape of {tuple(shape)} has no whole part for each row")
        digits = [Digit("row", 1, self.rows), *self.columns(lanes)]
        return regroup(digits, shape)

    def columns(self, lanes: int) -> list[Digit]:
        """The digit that counts ``lanes`` equal groups of columns."""
        return [] if lanes == 1 else [Digit("column", self.width // lanes, lanes)]

    def is_row(self, digits: Sequence[Digit]) -> bool:
        """Whether the digits are the whole number of the row and no more."""
        return merged(digits) == (Digit("row", 1, self.rows),)


def product(sizes: Iterable[Size]) -> Size:
    """Of sizes; an int where all are."""
    return math.prod(sizes)


def ratio(whole: Size, part: Size) -> Size | None:
    """``whole / part`` where that is a whole number for all sizes, else None."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = sympy.cancel(sympy.sympify(whole) / part)
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def merged(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """The same number with neighbouring digits of one axis in one."""
    result: list[Digit] = []
    for low in digits:
        high = result[-1] if result else None
        if high is not None and high.axis == low.axis and high.inner == low.inner * low.size:
            result[-1] = Digit(low.axis, low.inner, high.size * low.size)
        else:
            result.append(low)
    return tuple(result)


def regroup(digits: Iterable[Digit], shape: Sequence[Size]) -> Index:
    """The digits of a number as the index into a shape of as many entries.

    Raises:
        UnfusableError: a dimension would take a part of a digit that does not divide it.
    """
    left = list(merged(digits))
    index: list[tuple[Digit, ...]] = []
    for size in reversed(shape):
        taken: list[Digit] = []
        need = size
        while need != 1:
            if not left:
                raise UnfusableError(f"a shape of {tuple(shape)} does not fit into the rows")
            low = left.pop()
            rest = ratio(need, low.size)
            if rest is not None:  # the whole digit
                need = rest
                taken.insert(0, low)
                continue
            high = ratio(low.size, need)
            if high is None:
                raise UnfusableError(f"a shape of {tuple(shape)} splits rows unevenly")
            left.append(Digit(low.axis, low.inner * need, high))
            taken.insert(0, Digit(low.axis, low.inner, need))
            need = 1
        index.append(tuple(taken))
    if left:
        raise UnfusableError(f"a shape of {tuple(shape)} is only a part of the rows")
    return tuple(reversed(index))


def flat(index: Index) -> list[Digit]:
    """All digits of an index, the most significant first."""
    return [digit for digits in index for digit in digits]


def broadcast(index: Index, shape: Sequence[Size]) -> Index:
    """The index into a smaller shape that is broadcast to the index's own."""
    aligned = index[len(index) - len(shape) :] if shape else ()
    return tuple(() if size == 1 else digits for digits, size in zip(aligned, shape, strict=True))


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a lane's entry lies, in elements from the tensor's first.

    Attributes:
        terms: digits with their strides; a stride of 0 is left out.
        start: the first one that is reached.
    """

    terms: tuple[tuple[Digit, Size], ...]
    start: int = 0

    @classmethod
    def of(cls, index: Index, strides: Sequence[Size], start: int = 0) -> "Offset":
        """The offset of an index into a tensor with these strides."""
        terms: list[tuple[Digit, Size]] = []
        for digits, step in zip(index, strides, strict=True):
            for place, digit in enumerate(digits):
                inner = step * product(d.size for d in digits[place + 1 :])
                if inner != 0:
                    terms.append((digit, inner))
        return cls(_joined(terms), start)

    @property
    def rows(self) -> bool:
        """Whether it depends on the row."""
        return any(digit.axis == "row" for digit, _ in self.terms)

    @property
    def entries(self) -> Size:
        """How many entries it reaches over all rows and columns."""
        return product(digit.size for digit, _ in self.terms)

    @property
    def group(self) -> int:
        """How many neighbouring columns share an entry; 0 where all do."""
        return min((d.inner for d, _ in self.terms if d.axis == "column"), default=0)

    @property
    def column_stride(self) -> Size:
        """Elements from one group of columns to the next; 0 where there are none."""
        group = self.group
        return next((s for d, s in self.terms if d.axis == "column" and d.inner == group), 0)

    def expression(self, space: Space, group: int) -> sympy.Expr:
        """As arithmetic on the row's number and on that of the group of columns.

        Args:
            space: the rows and columns.
            group: how many columns make a group; at most the offset's own.
        """
        total: sympy.Expr = sympy.Integer(self.start)
        for digit, step in self.terms:
            if digit.axis == "row":
                total += step * _digit(ROW, digit.inner, digit.size, space.rows)
            else:
                inner, lanes = digit.inner // group, space.width // group
                total += step * _digit(lane(group), inner, digit.size, lanes)
        return total


def lane(group: int) -> sympy.Symbol:
    """The number of a group of so many columns."""
    name = "column" if group <= 1 else f"column_{group}"
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _digit(axis: sympy.Symbol, inner: Size, size: Size, extent: Size) -> sympy.Expr:
    top = inner * size == extent
    number = axis if inner == 1 else Quotient(axis, inner)
    return number if top else Remainder(number, size)


def _joined(terms: list[tuple[Digit, Size]]) -> tuple[tuple[Digit, Size], ...]:
    """Neighbouring digits of one axis in one where memory goes on from one to the other."""
    result: list[tuple[Digit, Size]] = []
    for low, step in terms:
        if result:
            high, outer = result[-1]
            follows = high.axis == low.axis and high.inner == low.inner * low.size
            if follows and outer == step * low.size:
                result[-1] = (Digit(low.axis, low.inner, high.size * low.size), step)
                continue
        result.append((low, step))
    return tuple(result)
