"""The Triton code of `memopt.kernels.norm`, whose ``plain`` is its reference.

A program of the forward holds a few rows; one of the backward goes over many and keeps the sums
of the weight's and the bias's gradients in registers, which one more sum over programs ends. All
sums are in a fixed order.

Legend: ``N`` rows, ``H`` entries of a row, ``P`` programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import processors, warps
from memopt.kernels.spec import Results

# Entries that a program holds at a time, and those of a thread: 128 bits of bfloat16. Of the
# backward it is bytes, two times 128 bits a thread, so that one program for each processor keeps
# memory busy: each writes a row of sums. Of float32 a program holds half the rows, adds up twice
# as often, and needs another one beside it to be as exact as torch.
_FORWARD_TILE, _FORWARD_PER_THREAD = 2048, 8
_BACKWARD_BYTES, _BACKWARD_BYTES_PER_THREAD = 2**14, 32


@triton.jit
def _parameters(ptr, columns, width, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A vector of parameters in float32 for each of the rows, 0 beyond its end.

    Read once for every row, as wide as the rows are: for a single one threads would have less
    than 128 bits each.
    """
    place = tl.broadcast_to(columns[None, :], (ROWS, BLOCK))
    return tl.load(ptr + place, mask=place < width, other=0.0).to(tl.float32) + offset


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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < width)[None, :]
    place = row[:, None] * width + columns[None, :]
    z = tl.load(x_ptr + row[:, None] * x_row + columns[None, :], mask=inside, other=0.0)
    z = z.to(tl.float32)
    if residual_ptr is not None:
        there = residual_ptr + row[:, None] * residual_row + columns[None, :]
        z += tl.load(there, mask=inside, other=0.0).to(tl.float32)
        rounded = z.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, rounded, mask=inside)
        z = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(z, axis=1) / width
        tl.store(mean_ptr + row, mean, mask=row < rows)
        z = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(z * z, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = z * rstd[:, None]
    if weight_ptr is not None:
        y *= _parameters(weight_ptr, columns, width, offset, ROWS, BLOCK)
    if bias_ptr is not None:
        y += _parameters(bias_ptr, columns, width, 0.0, ROWS, BLOCK)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


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
        ROWS: rows that are worked on at a time, a power of two.
        BLOCK: ``width``, rounded up to a power of two.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * rows_each
    last = tl.minimum(first + rows_each, rows)
    columns = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        weight = _parameters(weight_ptr, columns, width, offset, ROWS, BLOCK)
    if y_ptr is not None and bias_ptr is not None:
        bias = _parameters(bias_ptr, columns, width, 0.0, ROWS, BLOCK)
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (columns < width)[None, :]
        place = row[:, None] * width + columns[None, :]
        there = row[:, None] * total_row + columns[None, :]
        normal = tl.load(total_ptr + there, mask=inside, other=0.0).to(tl.float32)
        there = row[:, None] * dy_row + columns[None, :]
        g = tl.load(dy_ptr + there, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        if mean_ptr is not None:
            normal -= tl.load(mean_ptr + row, mask=row < last, other=0.0)[:, None]
            normal = tl.where(inside, normal, 0.0)
        normal *= rstd
        if dweight_ptr is not None:
            of_weight += g * normal
        if dbias_ptr is not None:
            of_bias += g
        if y_ptr is not None:
            y = normal
            if weight_ptr is not None:
                y *= weight
            if bias_ptr is not None:
                y += bias
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
        if weight_ptr is not None:
            g *= weight
        dx = g - normal * (tl.sum(g * normal, axis=1) / width)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / width)[:, None]
        dx *= rstd
        if dtotal_ptr is not None:
            there = row[:, None] * dtotal_row + columns[None, :]
            dx += tl.load(dtotal_ptr + there, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    there = program * width + columns
    if dweight_ptr is not None:
        total = tl.sum(of_weight, axis=0).to(dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + there, total, mask=columns < width)
    if dbias_ptr is not None:
        total = tl.sum(of_bias, axis=0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + there, total, mask=columns < width)


def _tile(width: int, entries: int, per_thread: int) -> tuple[int, int, int]:
    """Rows that a program holds at a time, entries of each, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, entries // block)
    return rows, block, warps(max(32, rows * block // per_thread))


def _backward_tile(x: Tensor) -> tuple[int, int, int]:
    size = x.element_size()
    return _tile(x.shape[-1], _BACKWARD_BYTES // size, _BACKWARD_BYTES_PER_THREAD // size)


def programs(x: Tensor, rows: int) -> int:
    """Programs of the backward: one or two for each processor, each with rows to go over."""
    tile, *_ = _backward_tile(x)
    return max(1, min(processors(x) * x.element_size() // 2, rows // (4 * tile)))


def _row(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> Results:
    """As the operator ``memopt::norm``."""
    shape, width = x.shape, x.shape[-1]
    empty, statistics = x.new_empty(0), torch.float32
    y = x.new_empty(shape)
    total = empty if residual is None else x.new_empty(shape)
    mean = x.new_empty(shape[:-1] if centred else 0, dtype=statistics)
    rstd = x.new_empty(shape[:-1], dtype=statistics)
    flat, added = by_rows(x), None if residual is None else by_rows(residual)
    rows, block, warps_each = _tile(width, _FORWARD_TILE, _FORWARD_PER_THREAD)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        norm_forward[(triton.cdiv(len(flat), rows),)](
            flat, added, weight, bias, y, total, mean, rstd, len(flat), width, _row(flat),
            _row(added), eps, offset, CENTRED=centred, ROWS=rows, BLOCK=block,
            num_warps=warps_each, enable_fp_fusion=True,
        )  # fmt: skip
    return y, total, mean, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    wanted: list[bool],
    again: bool,
) -> Results:
    """As the operator ``memopt::norm_backward``."""
    width = dy.shape[-1]
    flat, more, stream = by_rows(dy), None if dtotal is None else by_rows(dtotal), by_rows(total)
    count = programs(dy, len(flat))
    parts = [
        _part(like, count) if on and like is not None else None
        for on, like in zip(wanted, (weight, bias), strict=True)
    ]
    dx = total.new_empty(total.shape)
    y = total.new_empty(total.shape if again else 0)
    rows, block, warps_each = _backward_tile(dy)
    with torch.cuda.device_of(dy):
        norm_backward[(count,)](
            flat, more, stream, weight, bias, mean if mean.numel() else None, rstd, dx, *parts,
            y if again else None, len(flat), width, _row(flat), _row(more), _row(stream), offset,
            triton.cdiv(len(flat), count), ROWS=rows, BLOCK=block, num_warps=warps_each,
            enable_fp_fusion=True,
        )  # fmt: skip
    return dx, _sum(parts[0], weight, rstd), _sum(parts[1], bias, rstd), y


def _part(like: Tensor, count: int) -> Tensor:
    """What each program's part of a gradient is written to: the result itself where one runs."""
    if count == 1:
        return like.new_empty(like.shape)
    return like.new_empty(count, len(like), dtype=torch.float32)


def _sum(part: Tensor | None, like: Tensor | None, otherwise: Tensor) -> Tensor:
    """The sum of all programs' parts; empty where there are none, of this or the other dtype."""
    if part is None:
        return (otherwise if like is None else like).new_empty(0)
    assert like is not None
    return part if part.dim() == 1 else part.sum(0).to(like.dtype)
