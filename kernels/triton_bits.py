"""The Triton code of `memopt.kernels.bits` and `memopt.kernels.masking`.

A program goes once over a tile of entries, which has whole bytes of bits. A dense tensor is one
row of all its entries; rows at even distances are read where they are, if a row has whole bytes.

Legend: ``N`` rows, ``H`` entries of a row, ``B`` bytes of a row's bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.bits import bytes_of, check_bits, check_mask, unwritten_bits
from memopt.kernels.masking import bound_of, check_dropout, factor_of, unwritten
from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import warps
from memopt.kernels.spec import Results
from memopt.kernels.triton_tiles import read, tile, write

# Entries of a program, and of a thread: a thread that unpacks bits alone takes as many as one
# load of 128 bits has.
_TILE = 2048
_PER_THREAD = 16
_UNPACKED_TILE = 8192
_UNPACKED_PER_THREAD = 128


@triton.jit
def _read_bits(bits_ptr, rows, width_bytes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether each entry of a tile has its bit set."""
    row, column, inside = tile(rows, width_bytes, ROWS, BLOCK // 8)
    bits = tl.load(bits_ptr + row * width_bytes + column, mask=inside, other=0).to(tl.int32)
    each = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (ROWS, BLOCK)) != 0


@triton.jit
def _write_bits(bits_ptr, kept, rows, width_bytes, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of a tile's entries that are kept."""
    eights = tl.reshape(kept.to(tl.int32), (ROWS, BLOCK // 8, 8))
    bits = tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
    row, column, inside = tile(rows, width_bytes, ROWS, BLOCK // 8)
    tl.store(bits_ptr + row * width_bytes + column, bits, mask=inside)


@triton.jit
def pack_bits(
    mask_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    mask_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bits of a mask.

    Args:
        mask_ptr: `(N, H)`, uint8, 0 or 1.
        bits_ptr: `(N, B)`, contiguous; takes the bits.
        rows: ``N``.
        width: ``H``, a multiple of 8 where there are several rows.
        width_bytes: ``B``.
        mask_row: elements from one row of ``mask_ptr`` to the next.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    kept = tl.load(mask_ptr + row * mask_row + column, mask=inside, other=0)
    _write_bits(bits_ptr, kept, rows, width_bytes, ROWS, BLOCK)


@triton.jit
def unpack_bits(bits_ptr, mask_ptr, width, width_bytes, BLOCK: tl.constexpr):
    """The mask that has these bits.

    Args:
        bits_ptr: `(B,)`.
        mask_ptr: `(H,)`, uint8; takes 0 or 1.
        width: ``H``.
        width_bytes: ``B``.
        BLOCK: entries of a program, a power of two from 8.
    """
    _, column, inside = tile(1, width, 1, BLOCK)
    kept = _read_bits(bits_ptr, 1, width_bytes, 1, BLOCK)
    tl.store(mask_ptr + column, kept.to(tl.uint8), mask=inside)


@triton.jit
def dropout_bits(
    x_ptr,
    seed_ptr,
    y_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    x_row,
    bound,
    factor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries that are kept, times a factor, and the bits of which are.

    Args:
        x_ptr: `(N, H)`.
        seed_ptr: `(1,)`, int64.
        y_ptr: `(N, H)`, contiguous; takes the products.
        bits_ptr: `(N, B)`, contiguous; takes the bits.
        rows: ``N``.
        width: ``H``, a multiple of 8 where there are several rows.
        width_bytes: ``B``.
        x_row: elements from one row of ``x_ptr`` to the next.
        bound: the least signed word that keeps its entry.
        factor: on what is kept.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    _, draw, _ = tile(rows, (width - 1) // 4 + 1, ROWS, BLOCK // 4)
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), row * (width // 4) + draw)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, BLOCK))
    kept = words.to(tl.int32, bitcast=True) >= bound
    x = read(x_ptr + row * x_row, column, inside)
    write(y_ptr + row * width, column, inside, x * tl.where(kept, factor, 0.0))
    _write_bits(bits_ptr, kept & inside, rows, width_bytes, ROWS, BLOCK)


@triton.jit
def relu_bits(
    x_ptr,
    y_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    x_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is above 0, or NaN, and the bits of where that is; arguments as of ``dropout_bits``."""
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    x = read(x_ptr + row * x_row, column, inside)
    stops = x <= 0.0
    write(y_ptr + row * width, column, inside, tl.where(stops, 0.0, x))
    _write_bits(bits_ptr, stops == 0, rows, width_bytes, ROWS, BLOCK)


@triton.jit
def apply_bits(
    dy_ptr,
    bits_ptr,
    dx_ptr,
    rows,
    width,
    width_bytes,
    dy_row,
    factor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dy * factor`` where the bit is set, and 0 elsewhere.

    Args:
        dy_ptr: `(N, H)`.
        bits_ptr: `(N, B)`, contiguous.
        dx_ptr: `(N, H)`, contiguous; takes the products.
        rows: ``N``.
        width: ``H``, a multiple of 8 where there are several rows.
        width_bytes: ``B``.
        dy_row: elements from one row of ``dy_ptr`` to the next.
        factor: on what is kept.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, column, inside = tile(rows, width, ROWS, BLOCK)
    kept = _read_bits(bits_ptr, rows, width_bytes, ROWS, BLOCK)
    dy = read(dy_ptr + row * dy_row, column, inside)
    write(dx_ptr + row * width, column, inside, tl.where(kept, dy * factor, 0.0))


def _run(kernel: Any, t: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Launch a kernel over all entries of a tensor.

    Args:
        kernel: what takes the tensor, others, its sizes and the rest.
        t: not empty.
        before: arguments between the tensor and the sizes.
        after: arguments behind them.
    """
    dense = t.is_contiguous() or t.shape[-1] % 8
    flat = t.contiguous().view(1, -1) if dense else by_rows(t)
    rows, width = flat.shape
    block = max(8, min(_TILE, triton.next_power_of_2(width)))
    each = _TILE // block
    kernel[(triton.cdiv(rows, each) * triton.cdiv(width, block),)](
        flat, *before, rows, width, bytes_of(width), flat.stride(0), *after, ROWS=each,
        BLOCK=block, num_warps=warps(_TILE // _PER_THREAD), enable_fp_fusion=True,
    )  # fmt: skip


def pack(mask: Tensor) -> Results:
    """As the operator ``memopt::pack_bits``."""
    check_mask(mask)
    bits = unwritten_bits(mask)
    if mask.numel():
        _run(pack_bits, mask.view(torch.uint8), (bits,), ())
    return (bits,)


def unpack(bits: Tensor, shape: list[int]) -> Results:
    """As the operator ``memopt::unpack_bits``."""
    mask = bits.new_empty(shape, dtype=torch.bool)
    check_bits(bits, mask.numel())
    if mask.numel():
        unpack_bits[(triton.cdiv(mask.numel(), _UNPACKED_TILE),)](
            bits.contiguous(), mask.view(torch.uint8), mask.numel(), bits.numel(),
            BLOCK=_UNPACKED_TILE, num_warps=warps(_UNPACKED_TILE // _UNPACKED_PER_THREAD),
            enable_fp_fusion=True,
        )  # fmt: skip
    return (mask,)


def dropout(x: Tensor, seed: Tensor, p: float) -> Results:
    """As the operator ``memopt::dropout_bits``."""
    check_dropout(seed, p)
    y, bits = unwritten(x)
    if x.numel():
        _run(dropout_bits, x, (seed, y, bits), (bound_of(p), factor_of(p)))
    return y, bits


def relu(x: Tensor) -> Results:
    """As the operator ``memopt::relu_bits``."""
    y, bits = unwritten(x)
    if x.numel():
        _run(relu_bits, x, (y, bits), ())
    return y, bits


def apply(dy: Tensor, bits: Tensor, factor: float) -> Results:
    """As the operator ``memopt::apply_bits``."""
    check_bits(bits, dy.numel())
    dx = dy.new_empty(dy.shape)
    if dy.numel():
        _run(apply_bits, dy, (bits.contiguous(), dx), (factor,))
    return (dx,)
