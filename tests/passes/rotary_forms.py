"""Queries, keys, tables, and ways to turn them, that the tests of the pass share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCH, HEADS, LENGTH, SIZE, PART = 2, 3, 5, 8, 4


def tables(size: int, interleaved: bool, dtype: torch.dtype) -> list[Tensor]:
    """Cosines and sines `(BATCH, LENGTH, size)`, each angle twice."""
    angles = torch.rand(BATCH, LENGTH, size // 2) * 6
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def draw(
    size: int = SIZE, interleaved: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Queries and keys `(BATCH, LENGTH, HEADS * SIZE)`, as layers make them, and the tables."""
    states = torch.randn(2, BATCH, LENGTH, HEADS * SIZE).to(dtype)
    trained = [t.detach().requires_grad_() for t in states]
    return [*trained, *tables(size, interleaved, dtype)]


def heads(x: Tensor) -> Tensor:
    return x.view(BATCH, -1, HEADS, SIZE).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate_half(x: Tensor) -> Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotate_chunks(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def rotate_unbound(x: Tensor) -> Tensor:
    x1, x2 = x.view(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((-x2, x1), dim=-1).flatten(start_dim=-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, rotate: Any = rotate_half) -> Tensor:
    rotated: Tensor = rotate(x)
    return (x * cos) + (rotated * sin)
