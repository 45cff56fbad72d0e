"""The Triton code of `memopt.kernels.rotary`, whose ``plain`` is its reference.

A program owns a few positions of one row of the batch: it reads their tables once, and goes over
the heads of queries and keys. It reads all of what it overwrites before it writes, and no other
program touches that, so results may be written in place.

Legend: ``B`` batch, ``H`` heads, ``S`` positions, ``D`` entries of a head, ``R`` of them rotated,
``W`` width of the tables.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from memopt.kernels.serving import warps
from memopt.kernels.spec import Results

# Pairs that a program holds at a time, and heads among them at most. Heads that it goes over
# divide those of queries and of keys, so that no lane is idle for lack of a head.
_PAIRS = 1024
_HEADS = 8
_PER_THREAD = 8  # pairs: two times 128 bits of bfloat16


@triton.jit
def _load_pairs(
    ptr, inside, WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second entries of the pairs of rows, in float32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, None, :]
        row = tl.load(ptr + column, mask=inside & (column < WIDTH), other=0.0)
        a, b = tl.split(tl.reshape(row, (ptr.shape[0], ptr.shape[1], PAIRS, 2)))
    else:
        column = tl.arange(0, PAIRS)[None, None, :]
        there = inside & (column < WIDTH // 2)
        a = tl.load(ptr + column, mask=there, other=0.0)
        b = tl.load(ptr + WIDTH // 2 + column, mask=there, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(
    ptr, a, b, inside, WIDTH: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The opposite."""
    a = a.to(ptr.dtype.element_ty)
    b = b.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, None, :]
        row = tl.reshape(tl.join(a, b), (ptr.shape[0], ptr.shape[1], 2 * PAIRS))
        tl.store(ptr + column, row, mask=inside & (column < WIDTH))
    else:
        column = tl.arange(0, PAIRS)[None, None, :]
        there = inside & (column < WIDTH // 2)
        tl.store(ptr + column, a, mask=there)
        tl.store(ptr + WIDTH // 2 + column, b, mask=there)


@triton.jit
def _load_table(
    ptr,
    inside,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Factors of first and of second entries, in float32."""
    if WHOLE:
        a, b = _load_pairs(ptr, inside, WIDTH, PAIRS, INTERLEAVED)
    else:
        column = tl.arange(0, PAIRS)[None, None, :]
        a = tl.load(ptr + column, mask=inside & (column < WIDTH // 2), other=0.0).to(tl.float32)
        b = a
    return a, b


@triton.jit
def _turn_heads(
    x_ptr,
    new_ptr,
    heads,
    x_strides,
    new_strides,
    batch,
    position,
    inside,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """All heads of some positions."""
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
        x = x_ptr + (batch * x_strides[0] + head * x_strides[1] + position * x_strides[2])
        new = new_ptr + (
            batch * new_strides[0] + head * new_strides[1] + position * new_strides[2]
        )
        a, b = _load_pairs(x, inside, WIDTH, PAIRS, INTERLEAVED)
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
        _store_pairs(new, new_a, new_b, inside, WIDTH, PAIRS, INTERLEAVED)
        for start in range(WIDTH, SIZE, 2 * PAIRS):
            column = start + tl.arange(0, 2 * PAIRS)[None, None, :]
            there = inside & (column < SIZE)
            tl.store(new + column, tl.load(x + column, mask=there), mask=there)


@triton.jit
def turn(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    new_q_ptr,
    new_k_ptr,
    q_heads,
    k_heads,
    positions,
    q_strides,
    k_strides,
    cos_strides,
    sin_strides,
    new_q_strides,
    new_k_strides,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """All heads of a few positions.

    Args:
        q_ptr: `(B, Hq, S, D)`.
        k_ptr: `(B, Hk, S, D)`.
        cos_ptr: `(B, S, W)`.
        sin_ptr: `(B, S, W)`.
        new_q_ptr: `(B, Hq, S, D)`; takes the rotated queries.
        new_k_ptr: `(B, Hk, S, D)`; takes the rotated keys.
        q_heads: ``Hq``.
        k_heads: ``Hk``.
        positions: ``S``.
        q_strides: of the batch, of heads and of positions, in elements; entries lie side by side.
        k_strides: the same.
        cos_strides: of the batch and of positions.
        sin_strides: the same.
        new_q_strides: as those of ``q``.
        new_k_strides: as those of ``q``.
        INTERLEAVED: whether the entries of a pair lie side by side.
        INVERSE: whether to turn back.
        WHOLE: whether ``W`` is ``R``, and not half of it.
        WIDTH: ``R``.
        SIZE: ``D``, or ``R`` where what passes through is there already.
        POSITIONS: positions of a program, a power of two.
        HEADS: heads that are worked on at a time, a power of two that divides their numbers.
        PAIRS: pairs of a head, rounded up to a power of two.
    """
    blocks = tl.cdiv(positions, POSITIONS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * POSITIONS
    position = (first + tl.arange(0, POSITIONS))[:, None, None]
    inside = position < positions
    there = cos_ptr + (batch * cos_strides[0] + position * cos_strides[1])
    cos_a, cos_b = _load_table(there, inside, WIDTH, PAIRS, INTERLEAVED, WHOLE)
    there = sin_ptr + (batch * sin_strides[0] + position * sin_strides[1])
    sin_a, sin_b = _load_table(there, inside, WIDTH, PAIRS, INTERLEAVED, WHOLE)
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    _turn_heads(
        q_ptr, new_q_ptr, q_heads, q_strides, new_q_strides, batch, position, inside,
        cos_a, cos_b, sin_a, sin_b, INTERLEAVED, WIDTH, SIZE, HEADS, PAIRS,
    )  # fmt: skip
    _turn_heads(
        k_ptr, new_k_ptr, k_heads, k_strides, new_k_strides, batch, position, inside,
        cos_a, cos_b, sin_a, sin_b, INTERLEAVED, WIDTH, SIZE, HEADS, PAIRS,
    )  # fmt: skip


def _side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    batch, position, _ = table.stride()
    return 0 if len(table) == 1 else batch, position


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    inverse: bool,
    *,
    in_place: bool,
) -> Results:
    """As the operator ``memopt::rotary``, or ``memopt::rotary_``, which returns what it is given.

    Args:
        q: `(B, Hq, S, D)`.
        k: `(B, Hk, S, D)`.
        cos: `(1 or B, S, W)`.
        sin: the same.
        rotary_dim: ``R``.
        interleaved: whether the entries of a pair lie side by side.
        inverse: whether to turn back.
        in_place: whether the results take the place of ``q`` and ``k``.
    """
    results = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    given = [_side_by_side(q), _side_by_side(k)]
    tables = [_side_by_side(cos), _side_by_side(sin)]
    batch, _, positions, size = q.shape
    counts = q.shape[1], k.shape[1]
    heads, pairs = math.gcd(*counts, _HEADS), triton.next_power_of_2(rotary_dim // 2)
    each = max(1, min(_PAIRS // (heads * pairs), triton.next_power_of_2(positions)))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        turn[(batch * triton.cdiv(positions, each),)](
            *given, *tables, *results, *counts, positions, *(t.stride()[:3] for t in given),
            *map(_table_strides, tables), *(t.stride()[:3] for t in results),
            INTERLEAVED=interleaved, INVERSE=inverse, WHOLE=cos.shape[2] == rotary_dim,
            WIDTH=rotary_dim, SIZE=rotary_dim if in_place else size, POSITIONS=each, HEADS=heads,
            PAIRS=pairs, num_warps=warps(max(32, each * heads * pairs // _PER_THREAD)),
            enable_fp_fusion=True,
        )  # fmt: skip
    return results
