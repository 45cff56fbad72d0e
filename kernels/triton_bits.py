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

from memopt.kernels.bits import bytes_of, check_bits, check_mask
from memopt.kernels.masking import bound_of, check_dropout, factor_of
from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import warps
from memopt.kernels.spec import Results

# Entries of a program, and of a thread: a thread that unpacks bits alone takes as many as one
# load of 128 bits has.
_TILE = 2048
_PER_THREAD = 16
_UNPACKED_TILE = 8192
_UNPACKED_PER_THREAD = 128


@triton.jit
def _row_and_start(blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of this program, and its first column."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None], (program % blocks).to(tl.int64) * BLOCK


@triton.jit
def _packed(kept, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of a tile's bits."""
    eights = tl.reshape(kept.to(tl.int32), (ROWS, BLOCK // 8, 8))
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _unpacked(bits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether each entry of a tile has its bit set."""
    each = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(each, (ROWS, BLOCK)) != 0


@triton.jit
def pack_bits(
    mask_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    blocks,
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
        blocks: programs of a row.
        mask_row: elements from one row of ``mask_ptr`` to the next.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, start = _row_and_start(blocks, ROWS, BLOCK)
    columns = (start + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (columns < width)
    kept = tl.load(mask_ptr + row * mask_row + columns, mask=inside, other=0)
    columns = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    inside = (row < rows) & (columns < width_bytes)
    tl.store(bits_ptr + row * width_bytes + columns, _packed(kept, ROWS, BLOCK), mask=inside)


@triton.jit
def unpack_bits(
    bits_ptr,
    mask_ptr,
    width,
    width_bytes,
    BLOCK: tl.constexpr,
):
    """The mask that has these bits.

    Args:
        bits_ptr: `(B,)`.
        mask_ptr: `(H,)`, uint8; takes 0 or 1.
        width: ``H``.
        width_bytes: ``B``.
        BLOCK: entries of a program, a power of two from 8.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    columns = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    bits = tl.load(bits_ptr + columns, mask=columns < width_bytes, other=0)
    columns = (start + tl.arange(0, BLOCK))[None, :]
    kept = _unpacked(bits, 1, BLOCK)
    tl.store(mask_ptr + columns, kept.to(tl.uint8), mask=columns < width)


@triton.jit
def dropout_bits(
    x_ptr,
    seed_ptr,
    y_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    blocks,
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
        blocks: programs of a row.
        x_row: elements from one row of ``x_ptr`` to the next.
        bound: the least signed word that keeps its entry.
        factor: on what is kept.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, start = _row_and_start(blocks, ROWS, BLOCK)
    counter = row * (width // 4) + (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), counter)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, BLOCK))
    kept = words.to(tl.int32, bitcast=True) >= bound
    columns = (start + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (columns < width)
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    y = (x * tl.where(kept, factor, 0.0)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + columns, y, mask=inside)
    bits = _packed(kept & inside, ROWS, BLOCK)
    columns = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    inside = (row < rows) & (columns < width_bytes)
    tl.store(bits_ptr + row * width_bytes + columns, bits, mask=inside)


@triton.jit
def relu_bits(
    x_ptr,
    y_ptr,
    bits_ptr,
    rows,
    width,
    width_bytes,
    blocks,
    x_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is above 0, or NaN, and the bits of where that is; arguments as of ``dropout_bits``."""
    row, start = _row_and_start(blocks, ROWS, BLOCK)
    columns = (start + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (columns < width)
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    stops = x <= 0.0
    y = tl.where(stops, 0.0, x).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + columns, y, mask=inside)
    bits = _packed(stops == 0, ROWS, BLOCK)
    columns = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    inside = (row < rows) & (columns < width_bytes)
    tl.store(bits_ptr + row * width_bytes + columns, bits, mask=inside)


@triton.jit
def apply_bits(
    dy_ptr,
    bits_ptr,
    dx_ptr,
    rows,
    width,
    width_bytes,
    blocks,
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
        blocks: programs of a row.
        dy_row: elements from one row of ``dy_ptr`` to the next.
        factor: on what is kept.
        ROWS: rows of a program, a power of two.
        BLOCK: entries of each, a power of two from 8.
    """
    row, start = _row_and_start(blocks, ROWS, BLOCK)
    columns = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    inside = (row < rows) & (columns < width_bytes)
    bits = tl.load(bits_ptr + row * width_bytes + columns, mask=inside, other=0)
    columns = (start + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (columns < width)
    dy = tl.load(dy_ptr + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    dx = tl.where(_unpacked(bits, ROWS, BLOCK), dy * factor, 0.0)
    tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)


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
    tile, blocks = _TILE // block, triton.cdiv(width, block)
    with torch.cuda.device_of(t):  # Triton launches on the current device
        kernel[(triton.cdiv(rows, tile) * blocks,)](
            flat, *before, rows, width, bytes_of(width), blocks, flat.stride(0), *after,
            ROWS=tile, BLOCK=block, num_warps=warps(_TILE // _PER_THREAD), enable_fp_fusion=True,
        )  # fmt: skip


def pack(mask: Tensor) -> Results:
    """As the operator ``memopt::pack_bits``."""
    check_mask(mask)
    bits = mask.new_empty(bytes_of(mask.numel()), dtype=torch.uint8)
    if mask.numel():
        _run(pack_bits, mask.view(torch.uint8), (bits,), ())
    return (bits,)


def unpack(bits: Tensor, shape: list[int]) -> Results:
    """As the operator ``memopt::unpack_bits``."""
    mask = bits.new_empty(shape, dtype=torch.bool)
    check_bits(bits, mask.numel())
    if mask.numel():
        with torch.cuda.device_of(bits):
            unpack_bits[(triton.cdiv(mask.numel(), _UNPACKED_TILE),)](
                bits.contiguous(), mask.view(torch.uint8), mask.numel(), bits.numel(),
                BLOCK=_UNPACKED_TILE, num_warps=warps(_UNPACKED_TILE // _UNPACKED_PER_THREAD),
                enable_fp_fusion=True,
            )  # fmt: skip
    return (mask,)


def dropout(x: Tensor, seed: Tensor, p: float) -> Results:
    """As the operator ``memopt::dropout_bits``."""
    check_dropout(seed, p)
    y, bits = _results(x)
    if x.numel():
        _run(dropout_bits, x, (seed, y, bits), (bound_of(p), factor_of(p)))
    return y, bits


def relu(x: Tensor) -> Results:
    """As the operator ``memopt::relu_bits``."""
    y, bits = _results(x)
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


def _results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(bytes_of(x.numel()), dtype=torch.uint8)
