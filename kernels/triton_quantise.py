"""The Triton code of `memopt.kernels.quantise`, whose ``plain`` is its reference.

A program holds a few groups, each in a row of its tile. Codes are computed with the operations of
the reference in its order, none of them fused with another, so that they are the same numbers.

Legend: ``N`` rows, ``H`` entries of a row, ``G`` groups of a row, ``B`` bytes of a row's codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from memopt.kernels.quantise import check_packed, unwritten
from memopt.kernels.row_views import by_rows
from memopt.kernels.serving import warps
from memopt.kernels.spec import Results
from memopt.kernels.triton_tiles import read, write

# Entries of a program, and of a thread. A thread reads two or four times 128 bits of codes: there
# are loads of scales and zero points besides.
_QUANTISED_TILE = 2048
_QUANTISED_PER_THREAD = 16
_TILE = 4096
_PER_THREAD = 64


@triton.jit
def _tile(groups, groups_each, width, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Numbers of this program's groups; rows and columns of their entries, and which there are.

    Args:
        groups: of all rows.
        groups_each: of a row.
        width: entries of a row, or bytes.
        GROUPS: of a program.
        GROUP: entries or bytes of each.
    """
    number = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    column = (number % groups_each)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (number < groups)[:, None] & (column < width)
    return number, (number // groups_each)[:, None], column, inside


@triton.jit
def quantise_groups(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    groups,
    groups_each,
    width,
    width_bytes,
    x_row,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Codes of a few groups.

    Args:
        x_ptr: `(N, H)`.
        packed_ptr: `(N, B)`, contiguous; takes the codes.
        scale_ptr: `(N, G)`, contiguous, float32; takes the scales.
        zero_ptr: `(N, G)`, contiguous, float32; takes the zero points; None if symmetric.
        groups: ``N * G``.
        groups_each: ``G``.
        width: ``H``.
        width_bytes: ``B``.
        x_row: elements from one row of ``x_ptr`` to the next.
        BITS: 8 or 4.
        GROUPS: groups of a program, a power of two.
        GROUP: entries of each, a power of two.
    """
    number, row, column, inside = _tile(groups, groups_each, width, GROUPS, GROUP)
    x = read(x_ptr + row * x_row, column, inside)
    finite = tl.abs(x) < float("inf")  # a maximum drops NaN
    if zero_ptr is None:
        span = tl.max(tl.where(finite, tl.abs(x), float("inf")), axis=1)
        scale = tl.maximum(tl.div_rn(span, 2 ** (BITS - 1) - 1.0), 2.0**-126)
        scale = tl.where(span < 2.0**127, scale, float("nan"))
        codes = libdevice.rint(x * tl.div_rn(1.0, scale)[:, None]) + 2 ** (BITS - 1)
    else:
        high = tl.where(inside, tl.where(finite, x, float("inf")), float("-inf"))
        low = tl.where(inside, tl.where(finite, x, float("-inf")), float("inf"))
        zero = tl.min(low, axis=1)
        span = tl.max(high, axis=1) - zero
        scale = tl.maximum(tl.div_rn(span, 2.0**BITS - 1.0), 2.0**-126)
        scale = tl.where(span < 2.0**127, scale, float("nan"))
        zero = tl.where(span < 2.0**127, zero, float("nan"))
        tl.store(zero_ptr + number, zero, mask=number < groups)
        codes = libdevice.rint((x - zero[:, None]) * tl.div_rn(1.0, scale)[:, None])
    tl.store(scale_ptr + number, scale, mask=number < groups)
    whole = tl.where(inside & (codes == codes), codes, 0.0).to(tl.int32)
    if BITS == 4:
        low_half, high_half = tl.split(tl.reshape(whole, (GROUPS, GROUP // 2, 2)))
        whole = low_half | (high_half << 4)
    _, row, column, inside = _tile(groups, groups_each, width_bytes, GROUPS, GROUP * BITS // 8)
    write(packed_ptr + row * width_bytes, column, inside, whole)


@triton.jit
def dequantise_groups(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    groups,
    groups_each,
    width,
    width_bytes,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Numbers of a few groups.

    Args:
        packed_ptr: `(N, B)`, contiguous.
        scale_ptr: `(N, G)`, contiguous.
        zero_ptr: `(N, G)`, contiguous; None if symmetric.
        y_ptr: `(N, H)`, contiguous; takes the numbers.
        groups: ``N * G``.
        groups_each: ``G``.
        width: ``H``.
        width_bytes: ``B``.
        BITS: 8 or 4.
        GROUPS: groups of a program, a power of two.
        GROUP: entries of each, a power of two.
    """
    _, row, column, inside = _tile(groups, groups_each, width_bytes, GROUPS, GROUP * BITS // 8)
    codes = tl.load(packed_ptr + row * width_bytes + column, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), (GROUPS, GROUP))
    number, row, column, inside = _tile(groups, groups_each, width, GROUPS, GROUP)
    scale = tl.load(scale_ptr + number, mask=number < groups, other=0.0).to(tl.float32)
    if zero_ptr is None:
        y = (codes - 2 ** (BITS - 1)).to(tl.float32) * scale[:, None]
    else:
        zero = tl.load(zero_ptr + number, mask=number < groups, other=0.0).to(tl.float32)
        y = codes.to(tl.float32) * scale[:, None] + zero[:, None]
    write(y_ptr + row * width, column, inside, y)


def quantise(x: Tensor, bits: int, group: int, symmetric: bool) -> Results:
    """As the operator ``memopt::quantise``."""
    packed, scale, zero = unwritten(x, bits, group, symmetric)
    if x.numel():
        flat, each = by_rows(x), max(1, _QUANTISED_TILE // group)
        quantise_groups[(triton.cdiv(scale.numel(), each),)](
            flat, packed, scale, None if symmetric else zero, scale.numel(), scale.shape[-1],
            x.shape[-1], packed.shape[-1], flat.stride(0), BITS=bits, GROUPS=each, GROUP=group,
            num_warps=warps(_QUANTISED_TILE // _QUANTISED_PER_THREAD), enable_fp_fusion=False,
        )  # fmt: skip
    return packed, scale, zero


def dequantise(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    bits: int,
    group: int,
) -> Results:
    """As the operator ``memopt::dequantise``, of float32 scales."""
    check_packed(packed, scale, zero, shape, bits, group)
    y = packed.new_empty(shape, dtype=dtype)
    if y.numel():
        each = max(1, _TILE // group)
        dequantise_groups[(triton.cdiv(scale.numel(), each),)](
            packed.contiguous(), scale.contiguous(), zero.contiguous() if zero.numel() else None,
            y, scale.numel(), scale.shape[-1], shape[-1], packed.shape[-1], BITS=bits,
            GROUPS=each, GROUP=group, num_warps=warps(_TILE // _PER_THREAD), enable_fp_fusion=True,
        )  # fmt: skip
    return (y,)
