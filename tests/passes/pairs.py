"""Pairs of embeddings for contrastive losses in both directions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS, SIZE = 300, 8


class Inputs:
    """Embeddings of both sides `(pairs, SIZE)`, a scale and a bias."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, pairs: int = PAIRS) -> None:
        self.x, self.y = (torch.randn(pairs, SIZE, dtype=dtype) for _ in range(2))
        self.scale = torch.tensor(1.7, dtype=dtype)
        self.bias = torch.tensor(-10.0, dtype=dtype)
        for tensor in self.trained:
            tensor.requires_grad_()

    @property
    def trained(self) -> list[Tensor]:
        return [self.x, self.y, self.scale, self.bias]


Function = Callable[[Inputs], Any]


def both(z: Tensor, other: Tensor | None = None) -> Tensor:
    """The mean of both directions' losses; the second may have a product of its own."""
    labels = torch.arange(len(z), device=z.device)
    other = z.t() if other is None else other
    return (F.cross_entropy(z, labels) + F.cross_entropy(other, labels)) / 2


def autocast(function: Function) -> Function:
    """In bfloat16 where autocast says so."""

    def run(i: Inputs) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(i)

    return run
