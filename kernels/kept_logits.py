"""Linear layer and cross-entropy in one operator that returns the product too.

A chunk of the product is copied before its gradient takes its place. So logits that a model
returns cost a copy, and no product of their own. They have no gradient.

Pays: where the logits are read after every step. Does not otherwise: they exist whole.
"""

from typing import Any

import torch
from torch import Tensor

from memopt.kernels import forward_gradients
from memopt.kernels.blocks import pieces
from memopt.kernels.linear_cross_entropy import SCHEMA, Arguments, Work, reduced

_NAME = "memopt::linear_cross_entropy_kept"
torch.library.define(
    _NAME, f"({SCHEMA}, bool mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

KEPT = torch.ops.memopt.linear_cross_entropy_kept.default
LOGITS = 5
"""Position of the product `(N, V)` among the results."""


@torch.library.impl(_NAME, "default")
def _kept(*args: Any) -> tuple[Tensor, ...]:
    """The reduced loss, its gradients, the factor that these lack, and the product."""
    *shared, mean = args
    a = Arguments(*shared)
    kept = a.x.new_empty(len(a.x), len(a.weight))
    results = reduced(a, mean, kept)
    if a.chunk_rows == 0:  # the loop has no chunks
        Work.of(a).head.product(a.x, kept)
    else:
        _fill_ignored(a, kept)
    return *results, kept


def _fill_ignored(a: Arguments, kept_NV: Tensor) -> None:
    """The product of rows that the loop has left out, as many at a time."""
    work = Work.of(a)
    if work.rows is None:
        return
    left = (work.counted_N == 0).nonzero()[:, 0]
    raw = kept_NV.new_empty(min(a.chunk_rows, len(left)), kept_NV.shape[1])
    for part in pieces(len(left), a.chunk_rows):
        own = left[part]
        kept_NV[own] = work.head.product(a.x[own], raw[: len(own)])


def _fake(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args[:-1])
    scalar = a.x.new_empty((), dtype=a.wide)
    gradients = forward_gradients.like(a.x, a.weight, a.wanted)
    kept = a.x.new_empty(a.x.shape[0], a.weight.shape[0])
    return scalar, *gradients, torch.empty_like(scalar), kept


torch.library.register_fake(_NAME, _fake)
forward_gradients.register(_NAME, Arguments._fields.index("wanted"))
