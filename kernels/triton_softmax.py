"""The Triton code of `memopt.kernels.softmax`, whose ``plain`` is its reference.

A program holds a few short rows, or one longer one, in registers. A row that does not fit is gone
over twice: a first time for what the result needs of the whole row, a second time, from its end
backwards, where the cache still has it, for the result.

Legend: ``N`` rows, ``H`` entries of a row.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import warps
from memopt.kernels.softmax import ROW_ON_CHIP, check, check_capped
from memopt.kernels.spec import Results
from memopt.kernels.triton_tiles import read, write

# Entries of a program, and of a thread; longer rows get more threads, then more entries each.
_TILE = 2048
_PER_THREAD = 16
_MOST_THREADS = 512
_LOOPED_BLOCK = 8192


@triton.jit
def _places(row, sizes, strides, LEVELS: tl.constexpr):
    """Where rows start, in elements, from their numbers and the sizes of what they run over."""
    place = row * 0
    for level in tl.static_range(LEVELS):
        place += (row % sizes[level]) * strides[level]
        row = row // sizes[level]
    return place


@triton.jit
def _logits(x_ptr, mask_ptr, columns, mask_column, inside, factor, softcap, CAPPED: tl.constexpr):
    """Logits in float32, minus infinity beyond the last one."""
    z = read(x_ptr, columns, inside) * factor
    if CAPPED:
        z = libdevice.tanh(z) * softcap
    if mask_ptr is not None:
        z += read(mask_ptr, columns * mask_column, inside)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def softmax_forward(
    x_ptr,
    mask_ptr,
    y_ptr,
    rows,
    width,
    x_row,
    sizes,
    strides,
    mask_column,
    factor,
    softcap,
    CAPPED: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax of a few rows.

    Args:
        x_ptr: `(N, H)`.
        mask_ptr: `(..., H)`, whose rows are those that ``sizes`` and ``strides`` say, or None.
        y_ptr: `(N, H)`, contiguous; takes the result.
        rows: ``N``.
        width: ``H``.
        x_row: elements from one row of ``x_ptr`` to the next.
        sizes: of the dimensions that rows run over, the last one first.
        strides: of ``mask_ptr`` in these dimensions, in elements.
        mask_column: the same in the last dimension.
        factor: on ``x``: the scale, or with a softcap the scale over it.
        softcap: bound on the logits; read only where ``CAPPED``.
        CAPPED: whether there is a softcap.
        LEVELS: how many sizes there are.
        ROWS: rows of a program, a power of two.
        BLOCK: ``width``, rounded up to a power of two.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    if mask_ptr is not None:
        mask_ptr += _places(row, sizes, strides, LEVELS)
    x_ptr += row * x_row
    z = _logits(x_ptr, mask_ptr, columns, mask_column, inside, factor, softcap, CAPPED)
    e = tl.exp(z - tl.max(z, axis=1)[:, None])
    y = e / tl.sum(e, axis=1)[:, None]
    write(y_ptr + row * width, columns, inside, y)


@triton.jit
def softmax_forward_looped(
    x_ptr,
    mask_ptr,
    y_ptr,
    width,
    x_row,
    sizes,
    strides,
    mask_column,
    factor,
    softcap,
    CAPPED: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Softmax of one row, ``BLOCK`` entries at a time; arguments as of ``softmax_forward``."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    y_ptr += row * width
    if mask_ptr is not None:
        mask_ptr += _places(row, sizes, strides, LEVELS)
    # Finite, so that a block of nothing but -inf does not make NaN of a difference.
    largest = -3.4028234663852886e38
    total = 0.0  # of exponentials, relative to the largest
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _logits(
            x_ptr, mask_ptr, columns, mask_column, columns < width, factor, softcap, CAPPED
        )
        larger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), axis=0)
        largest = larger
    blocks = tl.cdiv(width, BLOCK)
    for block in range(blocks):
        columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        z = _logits(x_ptr, mask_ptr, columns, mask_column, inside, factor, softcap, CAPPED)
        y = tl.exp(z - largest) / total
        write(y_ptr, columns, inside, y)


@triton.jit
def _gradient(dy, y, dot, x_ptr, columns, inside, factor, scale):
    """Of ``x``, from those of a block of softmaxes."""
    dx = y * (dy - dot)
    if x_ptr is not None:
        x = read(x_ptr, columns, inside)
        e = tl.exp(-2.0 * tl.abs(x * factor))
        dx *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh**2, with no difference to lose digits
    return dx * scale


@triton.jit
def softmax_backward(
    dy_ptr,
    y_ptr,
    x_ptr,
    dx_ptr,
    rows,
    width,
    dy_row,
    y_row,
    x_row,
    factor,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a few rows.

    Args:
        dy_ptr: `(N, H)`.
        y_ptr: `(N, H)`.
        x_ptr: `(N, H)`, or None without a softcap.
        dx_ptr: `(N, H)`, contiguous; takes the gradient.
        rows: ``N``.
        width: ``H``.
        dy_row: elements from one row of ``dy_ptr`` to the next.
        y_row: the same of ``y_ptr``.
        x_row: the same of ``x_ptr``.
        factor: the scale over the softcap.
        scale: on ``x``.
        ROWS: rows of a program, a power of two.
        BLOCK: ``width``, rounded up to a power of two.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    dy = read(dy_ptr + row * dy_row, columns, inside)
    y = read(y_ptr + row * y_row, columns, inside)
    if x_ptr is not None:
        x_ptr += row * x_row
    dot = tl.sum(dy * y, axis=1)[:, None]
    dx = _gradient(dy, y, dot, x_ptr, columns, inside, factor, scale)
    write(dx_ptr + row * width, columns, inside, dx)


@triton.jit
def softmax_backward_looped(
    dy_ptr,
    y_ptr,
    x_ptr,
    dx_ptr,
    width,
    dy_row,
    y_row,
    x_row,
    factor,
    scale,
    BLOCK: tl.constexpr,
):
    """Gradients of one row, ``BLOCK`` at a time; arguments as of ``softmax_backward``."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_row
    y_ptr += row * y_row
    dx_ptr += row * width
    if x_ptr is not None:
        x_ptr += row * x_row
    dot = 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        dot += tl.sum(read(dy_ptr, columns, inside) * read(y_ptr, columns, inside), axis=0)
    blocks = tl.cdiv(width, BLOCK)
    for block in range(blocks):
        columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        dy, y = read(dy_ptr, columns, inside), read(y_ptr, columns, inside)
        dx = _gradient(dy, y, dot, x_ptr, columns, inside, factor, scale)
        write(dx_ptr, columns, inside, dx)


def _run(
    kernels: tuple[Any, Any],
    flat: Tensor,
    tensors: Sequence[Tensor | None],
    others: Sequence[Any],
    **constants: Any,
) -> None:
    """Launch the kernel for rows of this length: the one that holds them, or the looped one.

    Args:
        kernels: both.
        flat: `(N, H)`.
        tensors: the others; one of them takes a result of its size.
        others: arguments that follow the sizes.
        constants: of both kernels.
    """
    (rows, width), (whole, looped) = flat.shape, kernels
    if width > ROW_ON_CHIP:
        looped[(rows,)](
            flat, *tensors, width, *others, **constants, BLOCK=_LOOPED_BLOCK,
            num_warps=warps(_MOST_THREADS), enable_fp_fusion=True,
        )  # fmt: skip
        return
    block = triton.next_power_of_2(width)
    each = max(1, _TILE // block)
    threads = min(_MOST_THREADS, max(32, each * block // _PER_THREAD))
    whole[(triton.cdiv(rows, each),)](
        flat, *tensors, rows, width, *others, **constants, ROWS=each, BLOCK=block,
        num_warps=warps(threads), enable_fp_fusion=True,
    )  # fmt: skip


def _levels(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Sizes and strides of as few dimensions as walk the same places, the last one first."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        else:
            levels.append((size, stride))
    sizes, steps = zip(*(levels or [(1, 0)]), strict=True)
    return sizes, steps


def forward(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Results:
    """As the operator ``memopt::softmax``."""
    check(x, mask)
    y = x.new_empty(x.shape)
    if not x.numel():
        return (y,)
    flat, column = by_rows(x), 0
    sizes, strides = _levels((), ())
    if mask is not None:
        mask = mask.expand(x.shape)
        column = mask.stride(-1)
        sizes, strides = _levels(x.shape[:-1], mask.stride()[:-1])
    others = flat.stride(0), sizes, strides, column, scale / (softcap or 1.0), softcap
    _run(
        (softmax_forward, softmax_forward_looped), flat, (mask, y), others, CAPPED=softcap != 0.0,
        LEVELS=len(sizes),
    )  # fmt: skip
    return (y,)


def backward(dy: Tensor, y: Tensor, x: Tensor | None, scale: float, softcap: float) -> Results:
    """As the operator ``memopt::softmax_backward``."""
    check_capped(x, softcap)
    dx = y.new_empty(y.shape)
    if not y.numel():
        return (dx,)
    flat, results = by_rows(dy), by_rows(y)
    logits = by_rows(x) if x is not None and softcap else None
    strides = (0 if t is None else t.stride(0) for t in (flat, results, logits))
    others = (*strides, scale / (softcap or 1.0), scale)
    _run((softmax_backward, softmax_backward_looped), flat, (results, logits, dx), others)
    return (dx,)
