"""The last linear layer of a model and the loss of its rows, a few rows at a time.

The product of ``N`` hidden states with ``V`` weight rows is the largest tensor of many models.
Here it exists one chunk at a time: a buffer of ``C`` rows takes a product, a row loss turns it
into its own gradient in place, and two more products bring that to the hidden state and to the
weight.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memopt.kernels.blocks import block_rows, pieces
from memopt.kernels.head import MAX_ROUNDINGS, Gradients, Head, Sizes
from memopt.kernels.rows import CrossEntropy, IndexTargets, RowLoss, log_sum_exp
from memopt.kernels.serving import launched, serves

_row_kernel: Callable[..., tuple[Tensor, Tensor]] = launched("triton_rows", "run")
# Numbers per row of a chunk that a row loss holds at most: values, normalisers, targets, factors.
_VECTORS = 9


def run_chunks(
    head: Head,
    loss: RowLoss,
    chunk_rows: int,
    wanted: Sequence[bool],
    g_N: Tensor | None,
    h_N: Tensor | None = None,
    rows: Tensor | None = None,
    kept_NV: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Values, log-sum-exps and gradients of all rows, chunk by chunk.

    What it allocates does not depend on ``rows``: see ``scratch_bytes``.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        chunk_rows: rows whose logits exist at a time.
        wanted: whether the gradients of the hidden states, the weight and the bias are.
        g_N: upstream gradient of every row's value, or None for values only.
        h_N: upstream gradient of every row's log-sum-exp.
        rows: the rows to visit, or None for all; the others' values and gradients are 0.
        kept_NV: takes the raw product of the rows that are visited.
        in_place: whether a chunk's hidden states make room for their gradient, of the same dtype.
    """
    count = len(head.x_NH) if rows is None else len(rows)
    size = min(chunk_rows, len(head.x_NH))
    most = -(-len(head.x_NH) // chunk_rows)
    gradients = Gradients.of(head, wanted, most, sparse=rows is not None, in_place=in_place)
    values = head.x_NH.new_zeros(len(head.x_NH), dtype=head.wide)
    lse = torch.zeros_like(values)
    raw = head.x_NH.new_empty(size, len(head.weight_VH))
    spare = head.x_NH.new_empty(size, head.x_NH.shape[1])
    block = softmax_block(head, loss, raw, trained=g_N is not None)
    for part in pieces(count, chunk_rows):
        if rows is None:
            own: slice | Tensor = part
            x = head.x_NH[part]
        else:
            own = rows[part]
            x = torch.index_select(head.x_NH, 0, own, out=spare[: len(own)])
        chunk = head.product(x, raw[: len(x)])
        if kept_NV is not None:
            kept_NV[own] = chunk
        values[own], lse[own] = run_rows(head, loss, chunk, own, g_N, h_N, block)
        if g_N is not None:
            gradients.add_(chunk, x, head, own, spare)
    del raw, spare, block
    return values, lse, gradients.results(head)


def scratch_bytes(sizes: Sizes, chunk_rows: int, *, blocks: int, held: int) -> int:
    """What ``run_chunks`` allocates at most at a time, its results left out.

    Args:
        sizes: of the head.
        chunk_rows: rows of a chunk.
        blocks: tensors of the size of a block that a row loss and the head hold at a time.
        held: how many of them are there during the products too.
    """
    rows, width, classes, dtype, (of_x, of_weight, _) = sizes
    half, itemsize = dtype == torch.float16, dtype.itemsize
    size, wide = min(chunk_rows, rows), max(4, itemsize)
    block = min(size, block_rows(classes, wide)) * classes * wide
    chunk = size * ((classes + width) * itemsize + _VECTORS * wide)
    many = dtype == torch.bfloat16 and -(-rows // chunk_rows) > MAX_ROUNDINGS
    product = 0  # converted before it goes to where a gradient is added up
    if of_weight and (half or many):
        product = min(classes, block_rows(width, 4))
    if of_x and half:
        product = max(product, size)
    loop = max(blocks * block, held * block + product * width * (itemsize + 4))
    if of_weight and many:  # the sum is no result, and the result is not there before the end
        sums = classes * width * (4 - itemsize)
        return max(chunk + loop + sums, classes * width * 4) + rows * 3 * wide
    return chunk + loop + rows * 3 * wide


def softmax_block(head: Head, loss: RowLoss, raw_CV: Tensor, *, trained: bool) -> Tensor | None:
    """Takes the softmax of a block of rows; None where it may take its logits' place, or is none.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        raw_CV: the product of a chunk.
        trained: whether gradients are computed.
    """
    in_place = isinstance(loss, CrossEntropy) and not head.softcap
    if in_place or not trained or has_row_kernel(type(loss), raw_CV):
        return None
    rows, classes = raw_CV.shape
    height = min(rows, block_rows(classes, head.wide.itemsize))
    return raw_CV.new_empty(height, classes, dtype=head.wide)


def run_rows(
    head: Head,
    loss: RowLoss,
    raw_CV: Tensor,
    rows: slice | Tensor,
    g_N: Tensor | None,
    h_N: Tensor | None = None,
    block_RV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values and log-sum-exps of one chunk; with ``g_N`` its gradient replaces ``raw_CV``.

    What follows the choice of a kernel is the reference for it.

    Args:
        head: maps the raw product to logits.
        loss: what to compute.
        raw_CV: the raw product; overwritten, with its gradient if there is an upstream one.
        rows: which rows of the whole the chunk is.
        g_N: upstream gradient of every row's value, or None for values only.
        h_N: upstream gradient of every row's log-sum-exp.
        block_RV: what ``softmax_block`` returned, if it is at hand.
    """
    if block_RV is None:
        block_RV = softmax_block(head, loss, raw_CV, trained=g_N is not None)
    chunk = loss.at(rows)
    if has_row_kernel(type(loss), raw_CV):
        assert isinstance(chunk, IndexTargets)
        g_C, h_C = (None if t is None else t[rows] for t in (g_N, h_N))
        return _row_kernel(raw_CV, chunk, head.scale, head.softcap, g_C, h_C)
    values, normalisers = [], []
    for part in pieces(len(raw_CV), block_rows(raw_CV.shape[1], head.wide.itemsize)):
        own, block, raw = _rows_of(rows, part), chunk.at(part), raw_CV[part]
        z = head.activate(raw, in_place=True)
        p = z if block_RV is None else block_RV[: len(z)]
        top = z.amax(1)
        if isinstance(block, CrossEntropy):
            offset = block.offset(z)
            lse = log_sum_exp(top, torch.softmax(z, 1, out=p))
            value = block.factor(z.shape[1], z.dtype) * lse - offset
        else:
            apart = None if block_RV is None else p
            lse = log_sum_exp(top, torch.softmax(z, 1, out=apart))
            value = block.values(z, lse)
        values.append(value)
        normalisers.append(lse)
        if g_N is not None:
            block.gradient_(p, z, lse, g_N[own], None if h_N is None else h_N[own])
            head.deactivate_(p, z)
            raw.copy_(p)
        del z, p  # before the next block takes their place
    return torch.cat(values), torch.cat(normalisers)


def _rows_of(rows: slice | Tensor, part: slice) -> slice | Tensor:
    """Rows of the whole that a part of the chunk ``rows`` covers."""
    if isinstance(rows, Tensor):
        return rows[part]
    return slice(rows.start + part.start, rows.start + part.stop)


def has_row_kernel(loss: type[RowLoss], x: Tensor) -> bool:
    """Whether ``run_rows`` is one Triton kernel, which holds nothing of a block's size.

    So it is for cross-entropy against classes on a GPU that Triton knows well, NVIDIA's since
    Ampere and AMD's, if Triton is installed.

    Args:
        loss: what is computed of each row.
        x: a tensor, fake or real, of the dtype and on the device of the products.
    """
    return issubclass(loss, IndexTargets) and serves(x)
