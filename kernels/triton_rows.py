"""Cross-entropy by rows in one Triton kernel: products become loss and gradient in place.

It does on a GPU what ``run_rows`` in `memopt.kernels.chunks` does with `IndexTargets`, which is
its reference. One program takes one row: a first pass keeps the largest logit and the sum of
exponentials beside it, a second one, from the end of the row backwards, where the cache still has
it, writes the gradient over what it reads. Two reads and a write of the chunk, and no other memory
of its size; all sums in float32 and in a fixed order, so two runs are bitwise equal.

A row whose upstream gradients are zero, as those of ignored rows are, gets zeros whatever its
logits are, and is read once.

Pays: wherever it runs. Reads are of 128 bits where rows have a multiple of 16 classes.

Source: the one-pass softmax statistics of Milakov and Gimelshein (2018), "Online normalizer
calculation for softmax", arXiv:1805.02867.

Legend: ``C`` rows of a chunk, ``V`` classes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from memopt.kernels.rows import IndexTargets

# A thread of a warp holds 16 logits of a block. Twice as many spill where there are class weights
# and a cap, too.
_CLASSES_PER_WARP = 512
_MOST_WARPS = 16


@triton.jit
def _logits(raw_ptr, columns, classes, factor, softcap, CAPPED: tl.constexpr):
    """Logits of one block in float32, 0 beyond the last class; with a cap also its tangents."""
    raw = tl.load(raw_ptr + columns, mask=columns < classes, other=0.0).to(tl.float32)
    z = raw * factor
    if CAPPED:
        tangent = libdevice.tanh(z)
        return tangent * softcap, tangent
    return z, z


@triton.jit
def cross_entropy_rows(
    raw_ptr,
    own_ptr,
    target_ptr,
    weight_ptr,
    g_ptr,
    h_ptr,
    value_ptr,
    lse_ptr,
    row_stride,
    classes,
    scale,
    factor,
    softcap,
    kept,
    each,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, log-sum-exp and, with ``g_ptr``, gradient of one row.

    Args:
        raw_ptr: `(C, V)` products, overwritten with their gradient if there is ``g_ptr``.
        own_ptr: `(C,)` products of the rows' own classes.
        target_ptr: `(C,)` those classes, int64.
        weight_ptr: `(V,)` class weights, float32, or None.
        g_ptr: `(C,)` upstream gradients of the values, float32, or None.
        h_ptr: `(C,)` upstream gradients of the log-sum-exps, float32, or None.
        value_ptr: `(C,)` losses, float32.
        lse_ptr: `(C,)` log-sum-exps, float32.
        row_stride: elements from one row of ``raw_ptr`` to the next.
        classes: ``V``.
        scale: derivative of the logits by the products, without the cap.
        factor: on the products: ``scale``, or with a cap ``scale / softcap``.
        softcap: bound on the logits; read only where ``CAPPED``.
        kept: one less the label smoothing.
        each: label smoothing of each class.
        CAPPED: whether there is a softcap.
        SMOOTHED: whether there is label smoothing.
        BLOCK: classes that are worked on at a time, a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * row_stride
    own = tl.load(own_ptr + row).to(tl.float32) * factor
    if CAPPED:
        own = libdevice.tanh(own) * softcap
    target = tl.load(target_ptr + row)
    own_weight = 1.0
    if weight_ptr is not None:
        own_weight = tl.load(weight_ptr + target)

    # Finite, so that a block of nothing but -inf does not make NaN of a difference.
    largest = -3.4028234663852886e38
    total = 0.0  # of exponentials, relative to the largest
    logits = 0.0  # weighted sum of logits
    weights = 0.0
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, _ = _logits(raw_ptr, columns, classes, factor, softcap, CAPPED)
        if SMOOTHED:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + columns, mask=columns < classes, other=0.0)
                weights += tl.sum(weight, axis=0)
                logits += tl.sum(weight * z, axis=0)
            else:
                logits += tl.sum(z, axis=0)
        z = tl.where(columns < classes, z, float("-inf"))
        larger = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), axis=0)
        largest = larger

    lse = largest + tl.log(total)
    value = (lse - own) * own_weight
    if SMOOTHED:
        if weight_ptr is None:
            weights += classes
        value = value * kept + (lse * weights - logits) * each
    tl.store(value_ptr + row, value)
    tl.store(lse_ptr + row, lse)

    if g_ptr is not None:
        g = tl.load(g_ptr + row)
        h = 0.0
        if h_ptr is not None:
            h = tl.load(h_ptr + row)
        of_target = g * kept * own_weight
        of_softmax = of_target + h
        if SMOOTHED:
            of_softmax += g * each * weights
        blocks = tl.cdiv(classes, BLOCK)
        if (g == 0.0) & (h == 0.0):
            for block in range(blocks):
                columns = block * BLOCK + tl.arange(0, BLOCK)
                nothing = tl.zeros((BLOCK,), raw_ptr.dtype.element_ty)
                tl.store(raw_ptr + columns, nothing, mask=columns < classes)
        else:
            of_softmax /= total
            for block in range(blocks):
                columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
                z, tangent = _logits(raw_ptr, columns, classes, factor, softcap, CAPPED)
                gradient = tl.exp(z - largest) * of_softmax
                if SMOOTHED:
                    if weight_ptr is not None:
                        weight = tl.load(weight_ptr + columns, mask=columns < classes, other=0.0)
                        gradient -= g * each * weight
                    else:
                        gradient -= g * each
                gradient -= tl.where(columns == target, of_target, 0.0)
                if CAPPED:
                    gradient *= 1.0 - tangent * tangent
                gradient = (gradient * scale).to(raw_ptr.dtype.element_ty)
                tl.store(raw_ptr + columns, gradient, mask=columns < classes)


def block_and_warps(classes: int) -> tuple[int, int]:
    """Classes of a block, and warps of a program, for rows of this length."""
    block = min(_MOST_WARPS * _CLASSES_PER_WARP, triton.next_power_of_2(classes))
    return block, max(1, block // _CLASSES_PER_WARP)


def run(
    raw_CV: Tensor,
    loss: IndexTargets,
    scale: float,
    softcap: float,
    g_C: Tensor | None,
    h_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values and log-sum-exps of one chunk; with ``g_C`` its gradient replaces ``raw_CV``.

    Args:
        raw_CV: products, float32, bfloat16 or float16, contiguous within rows.
        loss: of these rows. A class out of range fails as it does in eager code: torch gathers
            the rows' own products, and checks.
        scale: factor on the products.
        softcap: bound on the logits; 0 for none.
        g_C: upstream gradient of every row's value, or None for values only.
        h_C: upstream gradient of every row's log-sum-exp.

    Returns:
        Both `(C,)`, float32.
    """
    rows, classes = raw_CV.shape
    assert raw_CV.stride(1) == 1, f"rows are not contiguous: strides {raw_CV.stride()}"
    target, weight, g, h = (
        None if t is None else t.contiguous() for t in (loss.target_N, loss.weight_V, g_C, h_C)
    )
    own = raw_CV.gather(1, loss.target_N[:, None])
    values, lse = raw_CV.new_empty(2, rows, dtype=torch.float32)
    block, warps = block_and_warps(classes)
    with torch.cuda.device_of(raw_CV):  # Triton launches on the current device
        cross_entropy_rows[(rows,)](
            raw_CV,
            own,
            target,
            weight,
            g,
            h,
            values,
            lse,
            raw_CV.stride(0),
            classes,
            scale,
            scale / (softcap or 1.0),
            softcap,
            1.0 - loss.smoothing,
            loss.smoothing / classes,
            CAPPED=softcap != 0.0,
            SMOOTHED=loss.smoothing != 0.0,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,  # said, because Triton 3.9 warns where it is not
        )
    return values, lse
