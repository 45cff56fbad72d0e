"""A program's tile of a matrix, for kernels that go over one: where it lies, and its entries.

Legend: ``N`` rows, ``H`` entries of a row.
"""

import triton
import triton.language as tl


@triton.jit
def tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `(ROWS, 1)` and columns `(1, BLOCK)` of the program's tile, and which there are.

    Args:
        rows: ``N``.
        width: ``H``; what a program has of a row comes after what the one before it has.
        ROWS: of a tile, a power of two.
        BLOCK: columns of a tile, a power of two.
    """
    program = tl.program_id(0)
    tiles = (width - 1) // BLOCK + 1  # a width next to 2**31 plus BLOCK would overflow
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % tiles * BLOCK + tl.arange(0, BLOCK)  # in 64 bits where the width is
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return row[:, None], column[None, :], inside


@triton.jit
def read(ptr, column, inside):
    """Entries in float32, and 0 where there are none.

    Args:
        ptr: to where rows start.
        column: elements from there.
        inside: which of them there are.
    """
    return tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(ptr, column, inside, values):
    """Entries, rounded to what they are kept in; arguments as of ``read``."""
    tl.store(ptr + column, values.to(ptr.dtype.element_ty), mask=inside)
