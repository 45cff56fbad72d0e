"""Cross-entropy of a linear layer by tiles: the logits never exist in memory, not even a chunk.

The forward turns tiles of logits into log-sum-exps while they are in registers. The backward makes
them again, as softmax minus target: a block of a few MiB, which two products bring to the
gradients while it is in the GPU's shared cache. A block's share of a gradient is added up in
float32, so in bfloat16, where the result is not the sum itself, each block is made twice: in the
order of rows for the hidden states, in the order of classes for the weight.

Pays: where memory is short. Besides the results there are a block, float32 sums of as many rows or
classes, and a few numbers per row; by more than a few chunks a bfloat16 weight's gradient is added
up in float32 as a whole. Does not: where large chunks fit, which take three products; this takes
four, in bfloat16 five.

Source: Cut Cross-Entropy (Wijmans et al., 2024), which adds up tiles under locks, in the order in
which they come. Here the order is fixed, and tiles are left out only where that is asked for.
"""

from typing import TYPE_CHECKING

import torch

from memopt.kernels.chunks import has_row_kernel
from memopt.kernels.head import Sizes
from memopt.kernels.rows import IndexTargets
from memopt.kernels.serving import launched

if TYPE_CHECKING:
    from memopt.kernels.linear_cross_entropy import Arguments

# Rows and classes of a block. The sums that it is added to are read and written once per block,
# and so many steps of a product hide that.
BLOCK = 2048
# Classes that one program of the forward adds up.
PART = 2048
# A block is a whole number of tiles; the sides of these are from the one to the other.
LEAST_TILE, _LARGEST_TILE = 32, 128


def serves(a: "Arguments") -> bool:
    """Whether these arguments can do without logits in memory: ``chunk_rows`` may be 0.

    Args:
        a: the operator's arguments, fake or real.
    """
    return not a.target.is_floating_point() and has_row_kernel(IndexTargets, a.x)


run = launched("cut_sweeps", "run")


def block_sides(rows: int, classes: int, size: int) -> tuple[int, int]:
    """Sides of the tensor that blocks of at most ``size`` by ``size`` are written to."""
    row_tiles, class_tiles = (-(-min(size, n) // _LARGEST_TILE) for n in (rows, classes))
    return row_tiles * _LARGEST_TILE, class_tiles * _LARGEST_TILE


def scratch_bytes(sizes: Sizes, *, smoothed: bool) -> int:
    """What ``run`` allocates at most at a time, its results left out.

    Args:
        sizes: of the head.
        smoothed: whether there is label smoothing.
    """
    rows, width, classes, dtype, wanted = sizes
    forward = 4 * rows * (1 + (1 + smoothed) * -(-classes // PART))
    if not any(wanted):
        return forward
    x, weight, bias = wanted
    height, breadth = block_sides(rows, classes, BLOCK)
    backward = height * breadth * dtype.itemsize
    if dtype == torch.bfloat16:
        backward += 4 * width * max(x * min(BLOCK, rows), weight * min(BLOCK, classes))
        backward += 2 * classes * bias
    return max(forward, backward)
