"""The forward of `memopt.kernels.cut_cross_entropy`, and the sweeps over blocks of its gradient.

All of it needs Triton.

Legend: ``N`` rows, ``H`` hidden size, ``V`` classes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memopt.kernels.blocks import pieces
from memopt.kernels.cut_cross_entropy import BLOCK, LEAST_TILE, block_sides
from memopt.kernels.cut_launches import (
    Factors,
    Problem,
    Upstream,
    add_columns,
    add_product,
    gradient,
    losses,
    tiles_of,
)
from memopt.kernels.head import Gradients, Head
from memopt.kernels.rows import IndexTargets


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
    """What ``run_chunks`` of `memopt.kernels.chunks` returns for the same first five arguments.

    Args:
        head: maps hidden states to logits.
        loss: what to compute.
        wanted: which gradients are.
        g_N: upstream gradients of the values, or None.
        h_N: upstream gradients of the log-sum-exps, or None.
        skip_below: leave out tiles of the gradient whose entries are all below this share of
            their row's upstream gradient; with 0 nothing is left out. ``2**-12`` is a sixteenth
            of what bfloat16 tells from 1.
        block: rows and classes of a block.
    """
    target, weight = loss.target_N, loss.weight_V
    inside = (target >= 0).logical_and_(target < len(head.weight_VH)).all()
    torch.ops.aten._assert_async.msg(inside, "a target is out of bounds")
    problem = Problem(
        head.x_NH,
        head.weight_VH,
        None if head.bias_V is None else head.bias_V.contiguous(),
        target.contiguous(),
        weight,
        None if weight is None else weight.sum(),
        loss.smoothing,
        head.scale,
        head.softcap,
        tiles_of(head.x_NH, head.weight_VH),
    )
    with torch.cuda.device_of(head.x_NH):  # type: ignore[no-untyped-call]
        values, lse = losses(problem)
        if g_N is None or not any(wanted):
            return values, lse, Gradients(None, None, None).results(head)
        gradients = _results(head, wanted)
        h = None if h_N is None else h_N.float().contiguous()
        upstream = Upstream(lse, g_N.float().contiguous(), h, skip_below)
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

    problem: Problem
    upstream: Upstream
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
        p, up = self.problem, self.upstream
        rows, classes = (list(pieces(len(t), self.size)) for t in (p.x_NH, p.weight_VH))
        by_class = to.weight_VH is not None
        sides = block_sides(len(p.x_NH), len(p.weight_VH), self.size)
        block, alive = p.x_NH.new_empty(sides), None
        if up.skip_below:
            alive = block.new_empty([side // LEAST_TILE for side in sides], dtype=torch.int32)
        sums = self._sums(to.weight_VH if by_class else to.x_NH)
        outer, inner = (classes, rows) if by_class else (rows, classes)
        for pair in itertools.product(outer, inner):
            part, own = pair if by_class else pair[::-1]
            gradient(p, own, part, up, block, alive)
            if to.x_NH is not None:
                ends = part.start == 0, part.stop == len(p.weight_VH)
                straight = Factors(p.tiles, block, p.weight_VH[part], alive)
                add_product(straight, sums, to.x_NH[own], *ends)
            if to.weight_VH is not None:
                ends = own.start == 0, own.stop == len(p.x_NH)
                notes = None if alive is None else alive.t()
                flipped = Factors(p.tiles, block.t(), p.x_NH[own], notes)
                add_product(flipped, sums, to.weight_VH[part], *ends)
            if to.bias_V is not None:
                count = own.stop - own.start
                add_columns(p.tiles, block, count, to.bias_V[part], first=own.start == 0)

    def _sums(self, result: Tensor | None) -> Tensor | None:
        """Float32 sums of a block's rows; None where the result can hold them."""
        if result is None or result.dtype == torch.float32:
            return None
        height = min(self.size, len(result))
        return result.new_empty(height, result.shape[1], dtype=torch.float32)
