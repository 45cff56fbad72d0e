"""The Triton code of `memopt.kernels.gated` and `memopt.kernels.gated_packed`.

A program takes a tile of a few rows and some of their columns. Tensors that are contiguous are one
long row, so that no width leaves lanes idle.

Legend: ``N`` rows, ``F`` entries of a row.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels import gated_packed
from memopt.kernels.gated import SIGMOIDAL, unwritten, unwritten_backward
from memopt.kernels.gated_packed import halves
from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import warps
from memopt.kernels.spec import Results
from memopt.kernels.triton_tiles import read, tile, write

_TILE = 1024
_NARROWEST = 256  # columns: where rows start inside a sector, each tile moves one more
_PER_THREAD = 8  # entries, 128 bits of bfloat16
_BUSY = 7 / 8  # lanes: more than that is not worth narrower tiles


@triton.jit
def _sigmoids(x):
    """Sigmoids of ``x`` and ``-x``: no exponential overflows, and no difference cancels."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    """The activation and its derivative, in float32.

    Args:
        x: float32.
        ACTIVATION: its name.
        LINEAR: where it is ``x sigmoid(LINEAR x + CUBIC x^3)``.
        CUBIC: the same.
    """
    if ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        slope = tl.where(x < 0, 0.0, x)
        value = slope * slope
        slope *= 2.0
    elif ACTIVATION == "sigmoid":
        value, above = _sigmoids(x)
        slope = value * above
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * (tl.exp(-0.5 * x * x) * 0.3989422804014327)
    else:
        near = tl.minimum(tl.maximum(x, -1.0e4), 1.0e4)  # a cube beyond may be inf, times 0
        inner, rise = LINEAR * x, LINEAR * near
        if CUBIC != 0:
            inner += CUBIC * (x * x * x)
            rise += (3 * CUBIC) * (near * near * near)
        below, above = _sigmoids(inner)
        value = x * below
        slope = below + below * above * rise
    return value, slope


@triton.jit
def gated_forward(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows,
    width,
    gate_row,
    up_row,
    ACTIVATION: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gated activations of one tile.

    Args:
        gate_ptr: `(N, F)`.
        up_ptr: `(N, F)`.
        y_ptr: `(N, F)`, contiguous; takes the result.
        rows: ``N``.
        width: ``F``.
        gate_row: elements from one row of ``gate_ptr`` to the next.
        up_row: the same of ``up_ptr``.
        ACTIVATION: its name.
        LINEAR: as `_activated` has it.
        CUBIC: as `_activated` has it.
        ROWS: of a tile, a power of two.
        BLOCK: columns of a tile, a power of two.
    """
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    gate = read(gate_ptr + row * gate_row, column, inside)
    up = read(up_ptr + row * up_row, column, inside)
    value, _ = _activated(gate, ACTIVATION, LINEAR, CUBIC)
    write(y_ptr + row * width, column, inside, value * up)


@triton.jit
def gated_backward(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    y_ptr,
    rows,
    width,
    dy_row,
    gate_row,
    up_row,
    dgate_row,
    dup_row,
    ACTIVATION: tl.constexpr,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one tile.

    Args:
        dy_ptr: `(N, F)`.
        gate_ptr: `(N, F)`.
        up_ptr: `(N, F)`.
        dgate_ptr: `(N, F)`; takes the gate's gradient.
        dup_ptr: `(N, F)`; takes up's.
        y_ptr: `(N, F)`, contiguous; takes the result once more, or None.
        rows: ``N``.
        width: ``F``.
        dy_row: elements from one row of ``dy_ptr`` to the next.
        gate_row: the same of ``gate_ptr``.
        up_row: the same of ``up_ptr``.
        dgate_row: the same of ``dgate_ptr``.
        dup_row: the same of ``dup_ptr``.
        ACTIVATION: its name.
        LINEAR: as `_activated` has it.
        CUBIC: as `_activated` has it.
        ROWS: of a tile, a power of two.
        BLOCK: columns of a tile, a power of two.
    """
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    dy = read(dy_ptr + row * dy_row, column, inside)
    gate = read(gate_ptr + row * gate_row, column, inside)
    up = read(up_ptr + row * up_row, column, inside)
    value, slope = _activated(gate, ACTIVATION, LINEAR, CUBIC)
    write(dgate_ptr + row * dgate_row, column, inside, slope * dy * up)
    write(dup_ptr + row * dup_row, column, inside, dy * value)
    if y_ptr is not None:
        write(y_ptr + row * width, column, inside, value * up)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    """As `(N, F)` all of them."""
    if all(t.is_contiguous() for t in tensors):
        return [t.view(1, -1) for t in tensors]
    return [by_rows(t) for t in tensors]


def _block(width: int) -> int:
    """Columns of a tile: the widest of those that leave the fewest lanes idle."""
    widest: int = min(_TILE, triton.next_power_of_2(width))
    narrower = (widest >> halvings for halvings in range(1, widest.bit_length()))
    blocks = [widest, *(block for block in narrower if block >= _NARROWEST)]
    return max(blocks, key=lambda b: min(_BUSY, width / (triton.cdiv(width, b) * b)))


def _tiles(like: Tensor, activation: str) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a launch over `(N, F)`."""
    rows, width = like.shape
    block = _block(width)
    each = min(_TILE // block, triton.next_power_of_2(rows))
    linear, cubic = SIGMOIDAL.get(activation, (0.0, 0.0))
    constants = {
        "ACTIVATION": activation,
        "LINEAR": linear,
        "CUBIC": cubic,
        "ROWS": each,
        "BLOCK": block,
        "num_warps": warps(max(32, each * block // _PER_THREAD)),
        "enable_fp_fusion": True,
    }
    return (triton.cdiv(rows, each) * triton.cdiv(width, block),), constants


def forward(gate: Tensor, up: Tensor, activation: str) -> Results:
    """As the operator ``memopt::gated``."""
    y = unwritten(gate, up, activation)
    if y.numel():  # a grid of no programs is an error
        gate, up, flat = _laid_out(gate, up, y)
        grid, constants = _tiles(flat, activation)
        gated_forward[grid](gate, up, flat, *flat.shape, gate.stride(0), up.stride(0), **constants)
    return (y,)


def packed_forward(x: Tensor, activation: str, gate_last: bool) -> Results:
    """As the operator ``memopt::gated_packed``."""
    return forward(*halves(x, gate_last), activation)


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> Results:
    """As the operator ``memopt::gated_backward``."""
    results = unwritten_backward(dy, gate, up, activation, again)
    _write_gradients((dy, gate, up), results, activation)
    return results


def packed_backward(
    dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool
) -> Results:
    """As the operator ``memopt::gated_packed_backward``."""
    dx, y = gated_packed.unwritten_backward(dy, x, activation, gate_last, again)
    _write_gradients((dy, *halves(x, gate_last)), (*halves(dx, gate_last), y), activation)
    return dx, y


def _write_gradients(given: Results, results: Results, activation: str) -> None:
    """From gradient, gate and up to the gradients of the two, and to the result if it has room."""
    *gradients, y = results
    if given[0].numel():
        tensors = _laid_out(*given, *gradients)
        grid, constants = _tiles(tensors[0], activation)
        gated_backward[grid](
            *tensors, y if y.numel() else None, *tensors[0].shape,
            *(t.stride(0) for t in tensors), **constants,
        )  # fmt: skip
