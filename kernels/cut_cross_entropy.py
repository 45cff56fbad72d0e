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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memopt.kernels.blocks import pieces
from memopt.kernels.chunks import has_row_kernel
from memopt.kernels.head import Gradients, Head
from memopt.kernels.rows import IndexTargets

if TYPE_CHECKING:
    from memopt.kernels.cut_launches import Problem, Upstream
    from memopt.kernels.linear_cross_entropy import Arguments

# Rows and classes of a block. The sums that it is added to are read and written once per block,
# and so many steps of a product hide that.
BLOCK = 2048
# Classes that one program of the forward adds up.
PART = 2048
# A block is a whole number of tiles; the sides of these are from the one to the other.
_LEAST_TILE, _LARGEST_TILE = 32, 128


def serves(a: "Arguments") -> bool:
    """Whether these arguments can do without logits in memory: ``chunk_rows`` may be 0.

    Args:
        a: the operator's arguments, fake or real.
    """
    return not a.target.is_floating_point() and has_row_kernel(IndexTargets, a.x)


def run(
    head: Head,
    loss: IndexTargets,
    wanted: Sequence[bool],
    g_N: Tensor | None,
    h_N: Tensor | None = None,
    *,
    skip_below: float = 0.0,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Values, log-sum-exps and gradients of all rows, as ``chunks.run_chunks`` gives them.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        wanted: whether the gradients of the hidden states, the weight and the bias are.
        g_N: upstream gradient of every row's value, or None for values only.
        h_N: upstream gradient of every row's log-sum-exp.
        skip_below: leave out tiles of the gradient whose entries are all below this share of
            their row's upstream gradient; with 0 nothing is left out. ``2**-12`` is a sixteenth
            of what bfloat16 tells from 1.
        block: rows and classes of a block.
    """
    from memopt.kernels import cut_launches

    target, weight = loss.target_N, loss.weight_V
    inside = (target >= 0).logical_and_(target < len(head.weight_VH)).all()
    torch.ops.aten._assert_async.msg(inside, "a target is out of bounds")
    problem = cut_launches.Problem(
        head.x_NH,
        head.weight_VH,
        None if head.bias_V is None else head.bias_V.contiguous(),
        target.contiguous(),
        weight,
        None if weight is None else weight.sum(),
        loss.smoothing,
        head.scale,
        head.softcap,
        cut_launches.tiles_of(head.x_NH, head.weight_VH),
    )
    with torch.cuda.device_of(head.x_NH):  # type: ignore[no-untyped-call]
        values, lse = cut_launches.losses(problem)
        if g_N is None or not any(wanted):
            return values, lse, Gradients(None, None, None).results(head)
        gradients = _results(head, wanted)
        h = None if h_N is None else h_N.float().contiguous()
        upstream = cut_launches.Upstream(lse, g_N.float().contiguous(), h, skip_below)
        _Backward(problem, upstream, block).fill(gradients)
    return values, lse, gradients.results(head)


def _results(head: Head, wanted: Sequence[bool]) -> Gradients:
    """What the sweeps fill; without rows there is nothing to sweep."""
    x, weight, bias = wanted
    dtype = head.wide if head.x_NH.dtype == torch.float16 else head.x_NH.dtype
    make = head.x_NH.new_empty if len(head.x_NH) else head.x_NH.new_zeros
    return Gradients(
        make(head.x_NH.shape, dtype=dtype) if x else None,
        make(head.weight_VH.shape, dtype=dtype) if weight else None,
        make(len(head.weight_VH), dtype=head.wide) if bias else None,
        empty=False,
    )


@dataclass(frozen=True)
class _Backward:
    """The gradients, block by block.

    Attributes:
        problem: the head and its targets.
        upstream: what a block is made of besides.
        size: rows and classes of a block.
    """

    problem: "Problem"
    upstream: "Upstream"
    size: int

    def fill(self, to: Gradients) -> None:
        """Write what is wanted, in one sweep or, where sums are not results, in two."""
        narrow = to.x_NH is not None and to.x_NH.dtype == torch.bfloat16
        if narrow and to.weight_VH is not None:
            self._sweep(Gradients(to.x_NH, None, None))
            self._sweep(Gradients(None, to.weight_VH, to.bias_V))
        else:
            self._sweep(to)

    def _sweep(self, to: Gradients) -> None:
        """Make every block once: all rows of some classes, or all classes of some rows."""
        from memopt.kernels import cut_launches

        p, up = self.problem, self.upstream
        rows, classes = (list(pieces(len(t), self.size)) for t in (p.x_NH, p.weight_VH))
        by_class = to.weight_VH is not None
        sides = block_sides(len(p.x_NH), len(p.weight_VH), self.size)
        block, alive = p.x_NH.new_empty(sides), None
        if up.skip_below:
            alive = block.new_empty([side // _LEAST_TILE for side in sides], dtype=torch.int32)
        sums = self._sums(to.weight_VH if by_class else to.x_NH)
        outer, inner = (classes, rows) if by_class else (rows, classes)
        for pair in itertools.product(outer, inner):
            part, own = pair if by_class else pair[::-1]
            cut_launches.gradient(p, own, part, up, block, alive)
            if to.x_NH is not None:
                ends = part.start == 0, part.stop == len(p.weight_VH)
                straight = cut_launches.Factors(p.tiles, block, p.weight_VH[part], alive)
                cut_launches.add_product(straight, sums, to.x_NH[own], *ends)
            if to.weight_VH is not None:
                ends = own.start == 0, own.stop == len(p.x_NH)
                notes = None if alive is None else alive.t()
                flipped = cut_launches.Factors(p.tiles, block.t(), p.x_NH[own], notes)
                cut_launches.add_product(flipped, sums, to.weight_VH[part], *ends)
            if to.bias_V is not None:
                count = own.stop - own.start
                cut_launches.add_columns(
                    p.tiles, block, count, to.bias_V[part], first=own.start == 0
                )

    def _sums(self, result: Tensor | None) -> Tensor | None:
        """Float32 sums of a block's rows; None where the result can hold them."""
        if result is None or result.dtype == torch.float32:
            return None
        height = min(self.size, len(result))
        return result.new_empty(height, result.shape[1], dtype=torch.float32)


def block_sides(rows: int, classes: int, size: int) -> tuple[int, int]:
    """Sides of the tensor that blocks of at most ``size`` by ``size`` are written to."""
    row_tiles, class_tiles = (-(-min(size, n) // _LARGEST_TILE) for n in (rows, classes))
    return row_tiles * _LARGEST_TILE, class_tiles * _LARGEST_TILE


def scratch_bytes(
    rows: int, width: int, classes: int, dtype: torch.dtype, wanted: Sequence[bool], smoothed: bool
) -> int:
    """What ``run`` allocates at most at a time, its results left out.

    Args:
        rows: ``N``.
        width: ``H``.
        classes: ``V``.
        dtype: of the hidden states and the weight.
        wanted: whether the gradients of the hidden states, the weight and the bias are; none
            where there is no upstream gradient.
        smoothed: whether there is label smoothing.
    """
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
