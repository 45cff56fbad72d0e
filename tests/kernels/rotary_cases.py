"""Queries, keys and tables of angles that the rotary tests share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def heads(
    batch: int = 2, count: int = 4, positions: int = 5, size: int = 8, dtype: Any = torch.float64
) -> Tensor:
    """Queries or keys `(B, H, S, D)`, in memory `(B, S, H, D)`."""
    return torch.randn(batch, positions, count, size, dtype=dtype).transpose(1, 2)


def tables(
    batch: int = 2, positions: int = 5, width: int = 4, dtype: Any = torch.float64
) -> Pair:
    """Cosines and sines `(B, S, W)`."""
    angles = torch.rand(batch, positions, width, dtype=torch.float64) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def by_halves(table: Tensor) -> Tensor:
    """A table for each pair as one for each entry, where a pair lies half of the width apart."""
    return torch.cat([table, table], -1)


def by_neighbours(table: Tensor) -> Tensor:
    """The same where a pair lies side by side."""
    return table.repeat_interleave(2, -1)


def with_gradients(
    function: Callable[[Tensor, Tensor], Pair], q: Tensor, k: Tensor
) -> list[Tensor]:
    """Both results, and the gradients under upstream ones that every dtype can hold."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k)]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(r.shape, generator=generator, dtype=torch.bfloat16).to(r.dtype)
        for r in results
    ]
    gradients = torch.autograd.grad(results, leaves, upstream)
    return [*(r.detach() for r in results), *gradients]
