"""The chunked cross-entropy of what users hand in: checked, computed, reduced with a z-loss."""

import torch
from torch import Tensor

from memopt.kernels import inputs
from memopt.kernels.cross_entropy_rows import ROWS
from memopt.kernels.linear_cross_entropy import REDUCED, Arguments


def checked_arguments(
    head: inputs.Head,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    scale_and_softcap: tuple[float, float],
    chunk_rows: int | None,
) -> Arguments:
    """What both operators of the cross-entropy take."""
    hidden, weight, _ = head
    if class_weight is not None:
        inputs.per_class("class_weight", class_weight, len(weight))
        inputs.constant("class_weight", class_weight)
    return Arguments(
        *head,
        target,
        class_weight,
        ignore_index,
        label_smoothing,
        *scale_and_softcap,
        inputs.chunk_size(chunk_rows, len(hidden), len(weight), hidden.device),
        inputs.wanted(*head),
    )


def reduced_cross_entropy(a: Arguments, reduction: str, z_loss: float) -> Tensor:
    """A scalar, or `(N,)` for ``"none"``; the z-loss is a mean over the rows that count."""
    with inputs.no_autocast(a.x):
        if reduction != "none" and not z_loss:
            loss: Tensor = REDUCED(*a, reduction == "mean")[0]
            return loss
        values: Tensor
        values, lse = ROWS(*a)
    if not z_loss:
        return values
    counted = torch.ones_like(lse, dtype=torch.bool)
    if not a.target.is_floating_point():
        counted = a.target != a.ignore_index
    penalty = z_loss * torch.where(counted, lse, 0.0).square()
    if reduction == "mean":
        return values.sum() / _total_weight(a, counted) + penalty.sum() / counted.sum()
    each = values + penalty
    return each.sum() if reduction == "sum" else each


def _total_weight(a: Arguments, counted: Tensor) -> Tensor:
    """What the mean divides by."""
    if a.class_weight is None or a.target.is_floating_point():
        return counted.sum()
    target = torch.where(counted, a.target, 0)
    return (a.class_weight.to(a.wide)[target] * counted).sum()
