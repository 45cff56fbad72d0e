"""Contrastive loss by chunks of rows: the matrix of similarities never exists.

Row ``i`` of ``x`` and row ``i`` of ``y`` are a pair, every other row of ``y`` is a negative: the
loss is the cross-entropy of ``scale * x @ y.T`` against its diagonal. In one direction (InfoNCE)
a chunk's softmax is its gradient, and the loss costs its three products. In both (CLIP) the
gradient needs the log-sum-exp of every column beforehand, which a first pass collects: a fourth
product. Memory grows with ``N``, not with its square.

Pays: where ``N`` is large against ``D``. Does not: in batches of a few hundred pairs.

Legend: ``N`` pairs, ``M >= N`` rows of ``y``, ``D`` embedding size, ``C`` rows of a chunk, ``R``
rows of a block.

Source: the loss is InfoNCE (van den Oord et al., 2018), in both directions that of CLIP (Radford
et al., 2021); running log-sum-exps are Milakov and Gimelshein's online softmax (2018).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels import forward_gradients
from memopt.kernels.blocks import block_rows, pieces
from memopt.kernels.head import HALF_UNIT, Gradients, Head


class Arguments(NamedTuple):
    """What the operator takes, in the order of its schema.

    Attributes:
        x: embeddings `(N, D)`.
        y: embeddings `(M, D)`; `M = N` for both directions.
        scale: factor on the similarities, 0-dimensional.
        chunk_rows: rows whose similarities exist at a time.
        wanted: whether the gradients of ``x``, ``y`` and ``scale`` are.
        both: whether to average with the direction from ``y`` to ``x``.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    chunk_rows: int
    wanted: Sequence[bool]
    both: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the loss."""
        return torch.promote_types(self.x.dtype, torch.float32)


_NAME = "memopt::contrastive"
torch.library.define(
    _NAME,
    "(Tensor x, Tensor y, Tensor scale, SymInt chunk_rows, bool[3] wanted, bool both) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

CONTRASTIVE = torch.ops.memopt.contrastive.default


@torch.library.impl(_NAME, "default")
def _contrastive(*args: Any) -> tuple[Tensor, ...]:
    """The loss, its gradients, and the factors that these still lack.

    What it allocates is known in advance: see ``scratch_bytes``.
    """
    a = Arguments(*args)
    x, y, scale = a.wanted
    trained = x or y or scale
    work = _Buffers.of(a)
    columns = _Columns(a) if a.both else None
    lse_M = None
    if columns is not None and trained:
        for rows in pieces(len(a.x), a.chunk_rows):
            for _, z in work.similarities(a, work.product(a, rows)):
                columns.add_(z, work.spare_RM)
        lse_M, columns = columns.lse(), None
    # The gradient of the scale is the product of either side with that side's own gradient. Both
    # sides are to be equally exact, and small: no rounding between chunks.
    head, chunks = Head(a.x, a.y), -(-len(a.x) // a.chunk_rows)
    gradients = Gradients.of(head, (x or (scale and not y), y, False), chunks, exact=chunks > 1)
    losses_N, pairs_N = a.x.new_empty(2, len(a.x), dtype=a.wide)
    for rows in pieces(len(a.x), a.chunk_rows):
        chunk = work.product(a, rows)
        for part, z in work.similarities(a, chunk):
            first = rows.start + part.start
            own = slice(first, first + len(z))
            pairs_N[own] = z.diagonal(first)
            if not trained:
                if columns is not None:
                    columns.add_(z, work.spare_RM)
                losses_N[own] = _softmax_(z)
                continue
            losses_N[own] = _gradient_(z, first, lse_M, work.spare_RM)
            if a.x.dtype == torch.float16:
                z.mul_(HALF_UNIT)
            if z.dtype != chunk.dtype:
                chunk[part].copy_(z)
        if trained:
            gradients.add_(chunk, a.x[rows], head, rows)
    loss = (losses_N - pairs_N).mean()
    if columns is not None:
        lse_M = columns.lse()
    if lse_M is not None:
        loss = (loss + (lse_M - pairs_N).mean()) / 2
    del work, chunk, z
    return (loss, *_results(a, head, gradients), _lacking(a))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args)
    dtype = torch.float32 if a.x.dtype == torch.float16 else a.x.dtype
    x, y, scale = a.wanted
    return (
        a.x.new_empty((), dtype=a.wide),
        a.x.new_empty(a.x.shape if x else (0,), dtype=dtype),
        a.x.new_empty(a.y.shape if y else (0,), dtype=dtype),
        a.x.new_empty(() if scale else (0,), dtype=a.wide),
        a.x.new_empty(3, dtype=a.wide),
    )


torch.library.register_fake(_NAME, _fake)
forward_gradients.register(_NAME, wanted_at=Arguments._fields.index("wanted"))


class _Columns:
    """Log-sum-exp of every column, from blocks of rows."""

    def __init__(self, a: Arguments) -> None:
        self._top_M = a.y.new_full(a.y.shape[:1], -torch.inf, dtype=a.wide)
        self._sum_M = torch.zeros_like(self._top_M)

    def add_(self, z_RM: Tensor, spare_RM: Tensor) -> None:
        top = torch.maximum(self._top_M, z_RM.amax(0))
        self._sum_M.mul_((self._top_M - top).exp_())
        self._sum_M.add_(torch.sub(z_RM, top, out=spare_RM[: len(z_RM)]).exp_().sum(0))
        self._top_M = top

    def lse(self) -> Tensor:
        return self._sum_M.log_().add_(self._top_M)


@dataclass(frozen=True)
class _Buffers:
    """What every chunk and every block overwrites again.

    Attributes:
        raw_CM: a chunk of the product, in the embeddings' dtype.
        z_RM: a block of similarities in the wide dtype; empty where that is the same.
        spare_RM: another, for exponentials by column; empty for one direction.
    """

    raw_CM: Tensor
    z_RM: Tensor
    spare_RM: Tensor

    @classmethod
    def of(cls, a: Arguments) -> "_Buffers":
        size, width = min(a.chunk_rows, len(a.x)), len(a.y)
        height = min(size, block_rows(width, a.wide.itemsize))
        blocks = [height if on else 0 for on in (a.x.dtype != a.wide, a.both)]
        z, spare = (a.x.new_empty(rows, width, dtype=a.wide) for rows in blocks)
        return cls(a.x.new_empty(size, width), z, spare)

    def product(self, a: Arguments, rows: slice) -> Tensor:
        """A chunk of ``x @ y.T``."""
        return torch.mm(a.x[rows], a.y.t(), out=self.raw_CM[: rows.stop - rows.start])

    def similarities(self, a: Arguments, chunk_CM: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of scaled similarities, with their rows in the chunk."""
        for part in pieces(len(chunk_CM), block_rows(chunk_CM.shape[1], a.wide.itemsize)):
            z = chunk_CM[part]
            if len(self.z_RM):
                z = self.z_RM[: len(z)].copy_(z)
            yield part, z.mul_(a.scale)


def _gradient_(z_RM: Tensor, first: int, lse_M: Tensor | None, spare_RM: Tensor) -> Tensor:
    """Similarities to the gradient of all directions' summed losses, in place.

    Args:
        z_RM: a block of similarities.
        first: row of the whole that the block begins with.
        lse_M: log-sum-exp of the columns, or None for one direction.
        spare_RM: takes the other direction's softmax.

    Returns:
        log-sum-exp of each row.
    """
    if lse_M is None:
        lse = _softmax_(z_RM)
        z_RM.diagonal(first).sub_(1)
        return lse
    other = torch.sub(z_RM, lse_M, out=spare_RM[: len(z_RM)]).exp_()
    lse = _softmax_(z_RM)
    z_RM.add_(other).diagonal(first).sub_(2)
    return lse


def _softmax_(z_RM: Tensor) -> Tensor:
    """Softmax in place; returns the log-sum-exp of each row, as ``rows.log_sum_exp`` does."""
    top = z_RM.amax(1)
    torch.softmax(z_RM, 1, out=z_RM)
    return top - torch.log(z_RM.amax(1))


def _results(a: Arguments, head: Head, gradients: Gradients) -> tuple[Tensor, ...]:
    """Gradients of ``x``, ``y`` and ``scale``; empty where not wanted."""
    x, y, _ = gradients.results(head)
    none, (x_wanted, _, scale_wanted) = a.x.new_empty(0, dtype=a.wide), a.wanted
    if not scale_wanted:
        scale = none
    elif gradients.x_NH is not None:
        scale = _dot(a.x, gradients.x_NH, a)
    else:
        scale = _dot(a.y, y, a)
    return x if x_wanted else x.new_empty(0), y, scale


def _dot(left_ND: Tensor, right_ND: Tensor, a: Arguments) -> Tensor:
    """Sum of all products, a chunk at a time; in float64, because most of them cancel."""
    parts = list(pieces(len(left_ND), a.chunk_rows))
    sums = [(left_ND[part].double() * right_ND[part].double()).sum() for part in parts]
    return torch.stack(sums).sum().to(a.wide)


def _lacking(a: Arguments) -> Tensor:
    """Similarities were not scaled on the way back, and losses not averaged."""
    unit = HALF_UNIT if a.x.dtype == torch.float16 else 1.0
    scale = a.scale.to(a.wide)
    one = torch.ones_like(scale)
    share = 1 / (unit * len(a.x) * (2 if a.both else 1))
    return torch.stack([scale, scale, one]) * share


def scratch_bytes(*args: Any) -> int:
    """What the operator allocates at most at a time besides its results, in bytes.

    Args:
        *args: its arguments, fake or real.
    """
    a = Arguments(*args)
    (rows, width), others = map(size_hint, a.x.shape), size_hint(a.y.shape[0])
    x, y, scale = a.wanted
    wide, itemsize, trained = a.wide.itemsize, a.x.element_size(), x or y or scale
    size = min(a.chunk_rows, rows)
    height = min(size, block_rows(others, wide))
    buffers = size * others * itemsize
    buffers += ((itemsize != wide) + a.both) * height * others * wide
    kept = 2 * rows * wide
    columns = 2 * a.both * others * wide  # and as much again while a block is added
    by_row = max(3 * height, rows) * wide
    if not trained:
        return buffers + kept + columns + max(columns, by_row)

    half = a.x.dtype == torch.float16
    result = wide if half else itemsize
    added = wide if size < rows else result
    sums = y * others * width * (added - result)
    if scale and not x and not y:  # by way of a gradient that is no result
        sums += rows * width * result
    product = 0
    if half and (x or not y):
        product = size * width * (itemsize + wide)
    if y and added != itemsize:
        part = min(others, block_rows(width, 4))
        product = max(product, part * width * (itemsize + wide))
    kept += columns // 2
    adding = buffers + kept + sums + max(product, by_row)
    converted = y * (added != result) * others * width * result
    summed = min(a.chunk_rows, rows if x or not y else others)
    dot = scale * summed * width * 8 * (3 if wide < 8 else 1)
    return max(buffers + 2 * columns, adding, kept + sums + converted + dot)
