"""A linear layer under a loss: random inputs, and what the forward allocates."""

from collections.abc import Callable, Sequence

import torch

from bench.meter import Meter

Tensor = torch.Tensor
Head = tuple[Tensor, Tensor, Tensor | None]


def head(rows: int, size: int, classes: int, dtype: torch.dtype, *, bias: bool) -> Head:
    """Hidden states, weight and bias."""
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(classes, size).to(dtype)
    return x, weight, torch.randn(classes).to(dtype) if bias else None


def wanted(*inputs: Tensor | None) -> list[bool]:
    """Which inputs an operator is asked for the gradients of."""
    return [t is not None and t.requires_grad for t in inputs]


def peak_bytes(loss: Callable[..., Tensor], inputs: Head, trained: Sequence[bool]) -> int:
    """Of the forward alone."""
    leaves = [
        None if t is None else t.clone().requires_grad_(on)
        for t, on in zip(inputs, trained, strict=True)
    ]
    with Meter() as meter:
        loss(*leaves)
    return meter.peak_bytes
