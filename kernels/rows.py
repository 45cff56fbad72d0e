"""Losses by rows: each is a value per row of logits, and that value's gradient.

Every loss of the form ``reduce(f(logits))``, with ``f`` working on one row at a time, is a
``RowLoss``. Kernels hand it blocks of rows in float32 or wider, together with their softmax, so
a cross-entropy neither exponentiates nor allocates anything of a block's size. A loss that reads
more than targets, such as another model's logits, makes it for the rows it is asked about.

Legend: ``R`` rows of a block, ``V`` entries of a row.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class RowLoss(Protocol):
    """One value per row of logits."""

    def at(self, rows: slice | Tensor) -> "BlockLoss":
        """The loss of some of the rows, with what these need made ready."""
        ...


class BlockLoss(RowLoss, Protocol):
    """A loss of rows whose logits ``z_RV`` are at hand."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        """The loss of each row.

        Args:
            z_RV: logits, float32 or wider.
            lse_R: their log-sum-exp.
        """
        ...

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        """Turn softmax into gradient, in place.

        Args:
            p_RV: softmax of the logits; receives the gradient with respect to them.
            z_RV: logits, float32 or wider.
            lse_R: their log-sum-exp.
            g_R: upstream gradient of each row's value.
            h_R: upstream gradient of each row's log-sum-exp, or None.
        """
        ...


@dataclass(frozen=True)
class IndexTargets:
    """Cross-entropy against one class per row: ``torch.nn.functional.cross_entropy``.

    With class weights ``w``, smoothing ``e`` and target ``y`` the value of a row is ``(1 - e)
    w_y (lse - z_y) + e / V sum_v w_v (lse - z_v)``.

    Attributes:
        target_N: class of each row, int64; every one is in ``[0, V)``.
        weight_V: class weights, or None for ones.
        smoothing: label smoothing in ``[0, 1]``.
    """

    target_N: Tensor
    weight_V: Tensor | None
    smoothing: float

    def at(self, rows: slice | Tensor) -> "IndexTargets":
        return replace(self, target_N=self.target_N[rows])

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        target = self.target_N
        loss = lse_R - z_RV.gather(1, target[:, None])[:, 0]
        if self.weight_V is not None:
            loss *= self.weight_V[target]
        if not self.smoothing:
            return loss
        if self.weight_V is None:
            spread = lse_R * z_RV.shape[1] - z_RV.sum(1)
        else:
            spread = lse_R * self.weight_V.sum() - z_RV @ self.weight_V
        return loss.mul_(1 - self.smoothing).add_(spread, alpha=self.smoothing / z_RV.shape[1])

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        target, size, weight = self.target_N, p_RV.shape[1], self.weight_V
        own = g_R * (1 - self.smoothing)
        if weight is not None:
            own = own * weight[target]
        factor = own
        if self.smoothing:
            total = float(size) if weight is None else weight.sum()
            factor = own + g_R * (self.smoothing / size) * total
        p_RV.mul_((factor if h_R is None else factor + h_R)[:, None])
        if self.smoothing:
            each = g_R[:, None] * (self.smoothing / size)
            p_RV.sub_(each if weight is None else each * weight)
        p_RV.scatter_add_(1, target[:, None], -own[:, None])


@dataclass(frozen=True)
class SoftTargets:
    """Cross-entropy against a distribution per row.

    The value is ``sum_v w_v t_v (lse - z_v)`` where ``t`` is smoothed to ``(1 - e) t + e / V``.

    Attributes:
        target_NV: weight of each class in each row.
        weight_V: class weights, or None for ones.
        smoothing: label smoothing in ``[0, 1]``.
    """

    target_NV: Tensor
    weight_V: Tensor | None
    smoothing: float

    def at(self, rows: slice | Tensor) -> "SoftTargets":
        return replace(self, target_NV=self.target_NV[rows])

    def _weights(self, dtype: torch.dtype) -> Tensor:
        target = self.target_NV.to(dtype)
        if self.smoothing:
            target = target * (1 - self.smoothing) + self.smoothing / target.shape[1]
        return target if self.weight_V is None else target * self.weight_V

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        target = self._weights(z_RV.dtype)
        return target.sum(1) * lse_R - (target * z_RV).sum(1)

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        target = self._weights(p_RV.dtype)
        factor = g_R * target.sum(1)
        p_RV.mul_((factor if h_R is None else factor + h_R)[:, None])
        p_RV.sub_(target * g_R[:, None])


def log_sum_exp(z_RV: Tensor, p_RV: Tensor) -> Tensor:
    """Log-sum-exp of rows whose softmax is at hand, without a second exponential per entry.

    The largest softmax of a row is ``exp(max z - lse)`` and at least ``1 / V``, so its logarithm
    is accurate.
    """
    return z_RV.amax(1) - torch.log(p_RV.amax(1))
