"""Triton kernels of the cross-entropy without logits; `cut_launches` launches them.

Three products, each by tiles with float32 accumulators: logits to log-sum-exps, logits to a block
of their gradient, and that block times the weight or the hidden states. No program writes where
another one does and nothing is atomic, so results do not depend on the order of programs.

Indices beyond an edge are moved onto it when reading, so that the loops need no masks, and what
comes of them is left out when writing. Offsets of rows are 64-bit.

Legend: ``N`` rows of hidden states, ``H`` their size, ``V`` classes. The others in upper case are
known at compile time: a tile is ``ROWS`` by ``CLASSES``, and its inner dimension goes by ``STEP``.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _tile_of_logits(
    x, weight, bias, rows, classes, N, V, H, x_row, x_col, w_row, w_col, factor, softcap,
    CAPPED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of some rows and classes; beyond the edges those of the last row and class."""
    row = tl.minimum(rows, N - 1).to(tl.int64)
    column = tl.minimum(classes, V - 1).to(tl.int64)
    inner = tl.arange(0, STEP)
    x_at = x + row[:, None] * x_row + inner[None, :] * x_col
    w_at = weight + column[None, :] * w_row + inner[:, None] * w_col
    z = tl.zeros((ROWS, CLASSES), tl.float32)
    for start in range(0, H, STEP):
        if EVEN:
            x_tile = tl.load(x_at)
            w_tile = tl.load(w_at)
        else:
            x_tile = tl.load(x_at, mask=inner[None, :] < H - start, other=0.0)
            w_tile = tl.load(w_at, mask=inner[:, None] < H - start, other=0.0)
        z = tl.dot(x_tile, w_tile, z, input_precision=PRECISION)
        x_at += STEP * x_col
        w_at += STEP * w_col
    if bias is not None:
        z += tl.load(bias + column).to(tl.float32)[None, :]
    z *= factor
    if CAPPED:
        z = softcap * libdevice.tanh(z)
    return z


@triton.jit
def log_sum_exps_kernel(
    x, weight, bias, target, class_weight, lse, picked, spread,
    N, V, H, x_row, x_col, w_row, w_col, factor, softcap,
    CAPPED: tl.constexpr, EVEN: tl.constexpr, TURNS: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over one part of the classes: log-sum-exps, weighted sums, and the targets in this part.

    ``lse`` and ``spread`` are `(parts, N)`, ``picked`` is `(N,)`; ``spread`` may be None.
    """
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    part = tl.program_id(1)
    if tile * ROWS >= N:
        return
    rows = tile * ROWS + tl.arange(0, ROWS)
    known = rows < N
    own = tl.load(target + rows, mask=known, other=-1).to(tl.int32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    hit = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    left = tl.cdiv(V - part * TURNS * CLASSES, CLASSES)
    for turn in range(tl.minimum(TURNS, left)):
        classes = (part * TURNS + turn) * CLASSES + tl.arange(0, CLASSES)
        inside = classes < V
        z = _tile_of_logits(
            x, weight, bias, rows, classes, N, V, H, x_row, x_col, w_row, w_col, factor, softcap,
            CAPPED, EVEN, ROWS, CLASSES, STEP, PRECISION,
        )  # fmt: skip
        hit += tl.sum(tl.where(classes[None, :] == own[:, None], z, 0.0), 1)
        if spread is not None:
            own_z = tl.where(inside[None, :], z, 0.0)  # the last class may be infinite
            if class_weight is not None:
                own_z *= tl.load(class_weight + classes, mask=inside, other=0.0)[None, :]
            sums += tl.sum(own_z, 1)
        z = tl.where(inside[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(z - finite[:, None]), 1)
        top = higher
    at = part.to(tl.int64) * N + rows
    tl.store(lse + at, top + tl.log(total), mask=known)
    first = part * TURNS * CLASSES
    tl.store(picked + rows, hit, mask=known & (own >= first) & (own < first + TURNS * CLASSES))
    if spread is not None:
        tl.store(spread + at, sums, mask=known)


@triton.jit
def losses_kernel(
    lse, picked, spread, target, class_weight, weight_sum, values, whole, N, V, parts, smoothing,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The parts' log-sum-exps together, and each row's loss: see ``rows.IndexTargets``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = rows < N
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * N + rows
        one = tl.load(lse + at, mask=known, other=0.0)
        higher = tl.maximum(top, one)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.exp(one - finite)
        top = higher
        if spread is not None:
            sums += tl.load(spread + at, mask=known, other=0.0)
    normaliser = top + tl.log(total)
    value = normaliser - tl.load(picked + rows, mask=known, other=0.0)
    if class_weight is not None:
        own = tl.load(target + rows, mask=known, other=0)
        value *= tl.load(class_weight + own, mask=known, other=0.0)
    if spread is not None:
        weights = tl.cast(V, tl.float32)
        if class_weight is not None:
            weights = tl.load(weight_sum)
        value = (1.0 - smoothing) * value + smoothing / V * (normaliser * weights - sums)
    tl.store(values + rows, value, mask=known)
    tl.store(whole + rows, normaliser, mask=known)


@triton.jit(do_not_specialize=["first_class"])
def gradient_kernel(
    x, weight, bias, target, class_weight, weight_sum, lse, g, h, block, alive,
    N, V, H, x_row, x_col, w_row, w_col, factor, softcap, scale, smoothing, skip_below,
    first_class, all_classes, stride, alive_row,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, SKIPS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile's raw product, and 0 beyond the edges; see ``rows.IndexTargets``.

    ``V`` classes from ``first_class`` on, of ``all_classes``; ``block`` is a whole number of
    tiles. With ``SKIPS`` it is noted in ``alive`` which tiles have entries of their row's upstream
    times ``skip_below``.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    z = _tile_of_logits(
        x, weight, bias, rows, classes, N, V, H, x_row, x_col, w_row, w_col, factor, softcap,
        CAPPED, EVEN, ROWS, CLASSES, STEP, PRECISION,
    )  # fmt: skip
    known = rows < N
    upstream = tl.load(g + rows, mask=known, other=0.0)
    label = tl.load(target + rows, mask=known, other=0)
    normaliser = tl.load(lse + rows, mask=known, other=0.0)
    inside = classes < V
    own = upstream
    if SMOOTHED:
        own = upstream * (1.0 - smoothing)
    if class_weight is not None:
        own *= tl.load(class_weight + label, mask=known, other=0.0)
    all_p = own
    each = upstream
    if SMOOTHED:
        each = upstream * (smoothing / all_classes)
        if class_weight is not None:
            all_p += each * tl.load(weight_sum)
        else:
            all_p += each * all_classes
    if h is not None:
        all_p += tl.load(h + rows, mask=known, other=0.0)
    gradient = tl.exp(z - normaliser[:, None]) * all_p[:, None]
    if SMOOTHED:
        if class_weight is not None:
            share = tl.load(class_weight + first_class + classes, mask=inside, other=0.0)
            gradient -= each[:, None] * share[None, :]
        else:
            gradient -= each[:, None]
    hit = (first_class + classes)[None, :] == label[:, None]
    gradient = tl.where(hit, gradient - own[:, None], gradient)
    if SKIPS:
        size = tl.maximum(tl.abs(all_p), tl.abs(own))
        counts = inside[None, :] & (tl.abs(gradient) >= (skip_below * size)[:, None])
        counts = counts & (size > 0.0)[:, None]
        at = tl.program_id(0) * alive_row + tl.program_id(1)
        tl.store(alive + at, tl.max(counts.to(tl.int32)))
    if CAPPED:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    # A row without upstream has no gradient, whatever it holds.
    counted = known & ((all_p != 0.0) | (own != 0.0))
    gradient = tl.where(counted[:, None] & inside[None, :], gradient * scale, 0.0)
    at = rows.to(tl.int64)[:, None] * stride + classes[None, :]
    tl.store(block + at, gradient.to(block.dtype.element_ty))


@triton.jit(do_not_specialize=["old", "kept"])
def product_kernel(
    block, operand, wide, result, alive, M, K, H, block_row, block_col, o_row, o_col,
    wide_row, result_row, alive_row, alive_col, old, kept,
    SKIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``wide += block @ operand`` in float32, and in the end into ``result``.

    ``block`` is `(M, K)`, of either order and padded with zeros, ``operand`` `(K, H)`. Of the rows
    of ``wide`` ``old``, all or none, hold a sum already, and ``kept``, all or none, take this one;
    otherwise ``result`` does.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, STEP)
    at = rows.to(tl.int64)[:, None] * wide_row + columns[None, :]
    inside = (columns < H)[None, :]
    total = tl.load(wide + at, mask=(rows < old)[:, None] & inside, other=0.0)
    block_at = block + rows.to(tl.int64)[:, None] * block_row
    operand_at = operand + tl.minimum(columns, H - 1).to(tl.int64)[None, :] * o_col
    if SKIPS:  # the block's tiles are as large as those of this product
        note = alive + tl.program_id(0) * alive_row
        for turn in range(tl.cdiv(K, COLUMNS)):
            if tl.load(note + turn * alive_col) != 0:
                for start in range(turn * COLUMNS, (turn + 1) * COLUMNS, STEP):
                    k = (start + inner).to(tl.int64)
                    left = tl.load(block_at + k[None, :] * block_col)
                    right = tl.load(operand_at + tl.minimum(k, K - 1)[:, None] * o_row)
                    total = tl.dot(left, right, total, input_precision=PRECISION)
    else:
        for start in range(0, K, STEP):
            k = (start + inner).to(tl.int64)
            left = tl.load(block_at + k[None, :] * block_col)
            right = tl.load(operand_at + tl.minimum(k, K - 1)[:, None] * o_row)
            total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(wide + at, total, mask=(rows < kept)[:, None] & inside)
    at = rows.to(tl.int64)[:, None] * result_row + columns[None, :]
    tl.store(
        result + at, total.to(result.dtype.element_ty), mask=(rows < M - kept)[:, None] & inside
    )


@triton.jit(do_not_specialize=["old"])
def columns_kernel(block, sums, height, V, stride, old, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """``sums +=`` those of the block's ``V`` columns; ``old``, all or none, hold some already."""
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    total = tl.zeros((CLASSES,), tl.float32)
    for start in range(0, height, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        at = block + rows[:, None] * stride + classes[None, :]
        total += tl.sum(tl.load(at).to(tl.float32), 0)
    total += tl.load(sums + classes, mask=classes < old, other=0.0)
    tl.store(sums + classes, total, mask=classes < V)
