"""The Triton code of `memopt.kernels.norm`, whose ``plain`` is its reference.

A program of the forward holds a few rows; one of the backward goes over many and keeps the sums
of the weight's and the bias's gradients in registers, which one more sum over programs ends. All
sums are in a fixed order.

Legend: ``N`` rows, ``H`` entries of a row, ``P`` programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.norm import Arguments, BackwardArguments, unwritten, unwritten_backward
from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import processors, warps
from memopt.kernels.spec import Results
from memopt.kernels.triton_tiles import read, write

# Entries that a program holds at a time, and those of a thread: 128 bits of bfloat16. Of the
# backward it is bytes, two times 128 bits a thread, so that one program for each processor keeps
# memory busy: each writes a row of sums.
_FORWARD_TILE, _FORWARD_PER_THREAD = 2048, 8
_BACKWARD_BYTES, _BACKWARD_BYTES_PER_THREAD = 2**14, 32


@triton.jit
def _parameters(ptr, columns, width, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A vector of parameters in float32 for each of the rows, 0 beyond its end.

    Read once for every row, as wide as the rows are: for a single one threads would have less
    than 128 bits each.
    """
    place = tl.broadcast_to(columns, (ROWS, BLOCK))
    return tl.load(ptr + place, mask=place < width, other=0.0).to(tl.float32) + offset


@triton.jit
def _add(total, lost, part, COMPENSATED: tl.constexpr):
    """A running sum with one part more, and what rounding took from it (Kahan, 1965)."""
    if not COMPENSATED:
        return total + part, lost
    part -= lost
    longer = total + part
    return longer, (longer - total) - part


@triton.jit
def _write_sum(ptr, parts, program, columns, width):
    """The sum of the rows' parts of a gradient, as the program's part of it."""
    total = tl.sum(parts, axis=0)[None, :]
    write(ptr + program * width, columns, columns < width, total)


@triton.jit
def norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    x_row,
    residual_row,
    eps,
    offset,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Norms of a few rows.

    Args:
        x_ptr: `(N, H)`.
        residual_ptr: `(N, H)`, or None.
        weight_ptr: `(H,)`, or None.
        bias_ptr: `(H,)`, or None.
        y_ptr: `(N, H)`, contiguous; takes the norm.
        total_ptr: `(N, H)`, contiguous; takes the sum where there is a residual.
        mean_ptr: `(N,)`; takes the means where they are subtracted.
        rstd_ptr: `(N,)`; takes the reciprocal standard deviations.
        rows: ``N``.
        width: ``H``.
        x_row: elements from one row of ``x_ptr`` to the next.
        residual_row: the same of ``residual_ptr``.
        eps: added to the variance.
        offset: added to the weight.
        CENTRED: whether the mean is subtracted.
        ROWS: rows of a program, a power of two.
        BLOCK: ``width``, rounded up to a power of two.
    """
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, columns = number[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (columns < width)
    z = read(x_ptr + row * x_row, columns, inside)
    if residual_ptr is not None:
        z += read(residual_ptr + row * residual_row, columns, inside)
        z = z.to(total_ptr.dtype.element_ty)
        write(total_ptr + row * width, columns, inside, z)
        z = z.to(tl.float32)
    if CENTRED:
        mean = tl.sum(z, axis=1) / width
        tl.store(mean_ptr + number, mean, mask=number < rows)
        z = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(z * z, axis=1) / width + eps)
    tl.store(rstd_ptr + number, rstd, mask=number < rows)
    y = z * rstd[:, None]
    if weight_ptr is not None:
        y *= _parameters(weight_ptr, columns, width, offset, ROWS, BLOCK)
    if bias_ptr is not None:
        y += _parameters(bias_ptr, columns, width, 0.0, ROWS, BLOCK)
    write(y_ptr + row * width, columns, inside, y)


@triton.jit
def norm_backward(
    dy_ptr,
    dtotal_ptr,
    total_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    y_ptr,
    rows,
    width,
    dy_row,
    dtotal_row,
    total_row,
    offset,
    rows_each,
    COMPENSATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the rows of one program.

    Args:
        dy_ptr: `(N, H)`.
        dtotal_ptr: `(N, H)`, or None.
        total_ptr: `(N, H)`.
        weight_ptr: `(H,)`, or None.
        bias_ptr: `(H,)`, or None; read where ``y_ptr`` is given.
        mean_ptr: `(N,)`, or None where it was not subtracted.
        rstd_ptr: `(N,)`.
        dx_ptr: `(N, H)`, contiguous; takes the gradient of the sum.
        dweight_ptr: `(P, H)`; takes the program's part of the weight's, or None.
        dbias_ptr: `(P, H)`; the same of the bias's, or None.
        y_ptr: `(N, H)`, contiguous; takes the norm once more, or None.
        rows: ``N``.
        width: ``H``.
        dy_row: elements from one row of ``dy_ptr`` to the next.
        dtotal_row: the same of ``dtotal_ptr``.
        total_row: the same of ``total_ptr``.
        offset: added to the weight.
        rows_each: rows of a program.
        COMPENSATED: whether what rounding takes from the sums over rows is made up for.
        ROWS: rows that are worked on at a time, a power of two.
        BLOCK: ``width``, rounded up to a power of two.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    columns = tl.arange(0, BLOCK)[None, :]
    if weight_ptr is not None:
        weight = _parameters(weight_ptr, columns, width, offset, ROWS, BLOCK)
    if y_ptr is not None and bias_ptr is not None:
        bias = _parameters(bias_ptr, columns, width, 0.0, ROWS, BLOCK)
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    lost_weight, lost_bias = of_weight, of_bias
    for start in range(0, rows_each, ROWS):
        number = first + start + tl.arange(0, ROWS)
        row = number[:, None]
        inside = (row < last) & (columns < width)
        normal = read(total_ptr + row * total_row, columns, inside)
        g = read(dy_ptr + row * dy_row, columns, inside)
        rstd = tl.load(rstd_ptr + number, mask=number < last, other=0.0)[:, None]
        if mean_ptr is not None:
            normal -= tl.load(mean_ptr + number, mask=number < last, other=0.0)[:, None]
            normal = tl.where(inside, normal, 0.0)
        normal *= rstd
        if dweight_ptr is not None:
            of_weight, lost_weight = _add(of_weight, lost_weight, g * normal, COMPENSATED)
        if dbias_ptr is not None:
            of_bias, lost_bias = _add(of_bias, lost_bias, g, COMPENSATED)
        if y_ptr is not None:
            y = normal
            if weight_ptr is not None:
                y *= weight
            if bias_ptr is not None:
                y += bias
            write(y_ptr + row * width, columns, inside, y)
        if weight_ptr is not None:
            g *= weight
        dx = g - normal * (tl.sum(g * normal, axis=1) / width)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / width)[:, None]
        dx *= rstd
        if dtotal_ptr is not None:
            dx += read(dtotal_ptr + row * dtotal_row, columns, inside)
        write(dx_ptr + row * width, columns, inside, dx)
    if dweight_ptr is not None:
        _write_sum(dweight_ptr, of_weight, program, columns, width)
    if dbias_ptr is not None:
        _write_sum(dbias_ptr, of_bias, program, columns, width)


def _tile(width: int, entries: int, per_thread: int) -> tuple[int, int, int]:
    """Rows that a program holds at a time, entries of each, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, entries // block)
    return rows, block, warps(max(32, rows * block // per_thread))


def _backward_tile(x: Tensor) -> tuple[int, int, int]:
    size = x.element_size()
    return _tile(x.shape[-1], _BACKWARD_BYTES // size, _BACKWARD_BYTES_PER_THREAD // size)


def programs(x: Tensor, rows: int) -> int:
    """Programs of the backward: one for each processor, where each has rows to go over."""
    tile, *_ = _backward_tile(x)
    return max(1, min(processors(x), rows // (4 * tile)))


def _row(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(*args: Any) -> Results:
    """As the operator ``memopt::norm``."""
    a = Arguments(*args)
    results = unwritten(*args)
    x, residual = by_rows(a.x), None if a.residual is None else by_rows(a.residual)
    count, width = x.shape
    rows, block, warps_each = _tile(width, _FORWARD_TILE, _FORWARD_PER_THREAD)
    norm_forward[(triton.cdiv(count, rows),)](
        x, residual, a.weight, a.bias, *results, count, width, _row(x), _row(residual), a.eps,
        a.offset, CENTRED=a.centred, ROWS=rows, BLOCK=block, num_warps=warps_each,
        enable_fp_fusion=True,
    )  # fmt: skip
    return results


def backward(*args: Any) -> Results:
    """As the operator ``memopt::norm_backward``."""
    a = BackwardArguments(*args)
    dx, of_weight, of_bias, y = unwritten_backward(*args)
    dy, total = by_rows(a.dy), by_rows(a.total)
    dtotal = None if a.dtotal is None else by_rows(a.dtotal)
    count, width = dy.shape
    grid = programs(a.dy, count)
    parts = [_part(of, grid) for of in (of_weight, of_bias)]
    rows, block, warps_each = _backward_tile(a.dy)
    norm_backward[(grid,)](
        dy, dtotal, total, a.weight, a.bias, _given(a.mean), a.rstd, dx, *parts, _given(y), count,
        width, _row(dy), _row(dtotal), _row(total), a.offset, triton.cdiv(count, grid),
        COMPENSATED=dy.dtype == torch.float32, ROWS=rows, BLOCK=block, num_warps=warps_each,
        enable_fp_fusion=True,
    )  # fmt: skip
    for of, part in zip((of_weight, of_bias), parts, strict=True):
        if part is not None and grid > 1:
            _sum_into(of, part)
    return dx, of_weight, of_bias, y


def _given(t: Tensor) -> Tensor | None:
    """None for what is left out, which is an empty tensor among an operator's results."""
    return t if t.numel() else None


def _sum_into(of: Tensor, part: Tensor) -> None:
    """The gradient from each program's part of it, added up in float32 and rounded once."""
    if of.dtype == part.dtype:
        torch.sum(part, 0, out=of)
    else:
        of.copy_(part.sum(0))


def _part(of: Tensor, grid: int) -> Tensor | None:
    """What each program's part of a gradient is written to: the result itself where one runs."""
    if grid == 1 or not of.numel():
        return _given(of)
    return of.new_empty(grid, len(of), dtype=torch.float32)
