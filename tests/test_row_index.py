"""Digits of a mixed radix name the entries that PyTorch's own views name."""

import math
from random import Random

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt.rows.index import (
    COLUMN,
    ROW,
    Digit,
    Offset,
    Quotient,
    Remainder,
    Space,
    UnfusableError,
    broadcast,
    flat,
    merged,
    ratio,
    regroup,
)

ROWS, WIDTH = 12, 24
SPACE = Space(ROWS, WIDTH)


def factors(number: int) -> st.SearchStrategy[list[int]]:
    """Ways to write a number as a product, ones among them."""

    @st.composite
    def draw(draw: st.DrawFn) -> list[int]:
        left, sizes = number, []
        while left > 1:
            sizes.append(draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0])))
            left //= sizes[-1]
            sizes += [1] * draw(st.integers(0, 1))
        return sizes

    return draw()


def evaluated(expression: sympy.Expr, row: int, column: int) -> int:
    plain = expression.replace(Quotient, lambda a, b: sympy.floor(a / b))
    return int(plain.replace(Remainder, sympy.Mod).subs({ROW: row, COLUMN: column}))


def reached(offset: Offset) -> list[int]:
    """The offsets of all lanes, row by row."""
    expression = offset.expression(SPACE, 1)
    return [evaluated(expression, r, c) for r in (0, 1, 5, 11) for c in (0, 1, 7, 8, 23)]


def expected(x: torch.Tensor) -> list[int]:
    rows = x.reshape(ROWS, WIDTH)
    return [int(rows[r, c]) for r in (0, 1, 5, 11) for c in (0, 1, 7, 8, 23)]


@given(factors(ROWS), factors(WIDTH))
def test_a_shape_of_rows_is_in_order(rows: list[int], columns: list[int]) -> None:
    shape = rows + columns
    x = torch.arange(ROWS * WIDTH).reshape(shape)
    assert reached(Offset.of(SPACE.index(shape), x.stride())) == expected(x)


@given(factors(ROWS), factors(WIDTH), st.randoms(use_true_random=False))
def test_strides_are_followed(rows: list[int], columns: list[int], rng: Random) -> None:
    shape = rows + columns
    order = list(range(len(shape)))
    rng.shuffle(order)
    x = torch.arange(ROWS * WIDTH).reshape([shape[i] for i in order])
    x = x.permute([order.index(i) for i in range(len(shape))])
    assert reached(Offset.of(SPACE.index(shape), x.stride())) == expected(x)


@given(factors(ROWS * WIDTH), factors(ROWS * WIDTH))
def test_a_reshape_keeps_the_order_or_is_refused(shape: list[int], other: list[int]) -> None:
    x = torch.arange(ROWS * WIDTH).reshape(other)
    try:
        index = regroup(flat(SPACE.index(shape)), other)
    except UnfusableError:
        return
    assert reached(Offset.of(index, x.stride())) == expected(x.reshape(shape))


@given(factors(ROWS), factors(WIDTH), st.integers(0, 2**12 - 1))
def test_broadcast_dimensions_are_left_out(rows: list[int], columns: list[int], ones: int) -> None:
    shape = rows + columns
    small = [1 if ones >> i & 1 else size for i, size in enumerate(shape)]
    x = torch.arange(math.prod(small)).reshape(small)
    offset = Offset.of(broadcast(SPACE.index(shape), small), x.stride())
    assert reached(offset) == expected(x.expand(shape))
    assert offset.entries == x.numel()


def test_contiguous_rows_are_one_product() -> None:
    offset = Offset.of(SPACE.index([3, 4, 6, 4]), (96, 24, 4, 1))
    assert offset.expression(SPACE, 1) == WIDTH * ROW + COLUMN


def test_groups_of_columns_share_an_entry() -> None:
    offset = Offset.of(SPACE.index([12, 3]), (3, 1))
    assert (offset.rows, offset.group, offset.column_stride) == (True, 8, 1)
    assert offset.expression(SPACE, 8) == 3 * ROW + sympy.Symbol(
        "column_8", integer=True, nonnegative=True
    )


def test_rows_may_be_symbolic() -> None:
    s, t = sympy.symbols("s t", integer=True, positive=True)
    space = Space(s * t, 64)
    offset = Offset.of(space.index((s, t, 8, 8)), (t * 64, 64, 8, 1))
    assert offset.expression(space, 1) == 64 * ROW + COLUMN
    assert ratio(s * t * 64, s * t) == 64
    assert ratio(s, t) is None


@pytest.mark.parametrize("shape", [(12, 5), (7, 24), (24, 24), (12, 48)])
def test_what_has_no_whole_part_for_each_row_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnfusableError):
        SPACE.index(shape)


def test_neighbouring_digits_of_one_axis_are_one() -> None:
    digits = [Digit("row", 1, 12), Digit("column", 8, 3), Digit("column", 1, 8)]
    assert merged(digits) == (Digit("row", 1, 12), Digit("column", 1, 24))
