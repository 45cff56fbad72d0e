"""Losses by rows: each is a value per row of logits, and that value's gradient.

Every loss of the form ``reduce(f(logits))``, with ``f`` working on one row at a time, is a
``RowLoss``. Kernels hand it blocks of rows in float32 or wider, together with their softmax, so
that no loss exponentiates again. A ``CrossEntropy`` is done with its logits before the softmax,
which may then take their place. A loss that reads more than targets, such as another model's
logits, makes it for the rows it is asked about.

Legend: ``R`` rows of a block, ``V`` entries of a row.
"""

from abc import ABC, abstractmethod
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


class CrossEntropy(ABC):
    """A loss whose rows are worth ``factor * lse - offset(z)``: its gradient needs no logits."""

    @abstractmethod
    def at(self, rows: slice | Tensor) -> "CrossEntropy":
        """The loss of some of the rows."""

    @abstractmethod
    def factor(self, classes: int, dtype: torch.dtype) -> Tensor | float:
        """What the log-sum-exp of each row counts for.

        Args:
            classes: ``V``.
            dtype: of the logits.
        """

    @abstractmethod
    def offset(self, z_RV: Tensor) -> Tensor:
        """What is subtracted from it, a combination of the row's logits."""

    @abstractmethod
    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        """As ``BlockLoss.gradient_``, without reading ``z_RV``."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        """The loss of each row, as ``BlockLoss.values``."""
        return self.factor(z_RV.shape[1], z_RV.dtype) * lse_R - self.offset(z_RV)


@dataclass(frozen=True)
class IndexTargets(CrossEntropy):
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

    def factor(self, classes: int, dtype: torch.dtype) -> Tensor | float:
        if self.weight_V is None:
            return 1.0
        own = self.weight_V[self.target_N] * (1 - self.smoothing)
        return own + self.weight_V.sum() * (self.smoothing / classes) if self.smoothing else own

    def offset(self, z_RV: Tensor) -> Tensor:
        taken = z_RV.gather(1, self.target_N[:, None])[:, 0]
        if self.weight_V is not None:
            taken *= self.weight_V[self.target_N]
        if not self.smoothing:
            return taken
        spread = z_RV.sum(1) if self.weight_V is None else z_RV @ self.weight_V
        taken *= 1 - self.smoothing
        return taken.add_(spread, alpha=self.smoothing / z_RV.shape[1])

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        target, size, weight = self.target_N, p_RV.shape[1], self.weight_V
        own = g_R * (1 - self.smoothing)
        if weight is not None:
            own = own * weight[target]
        factor = g_R * self.factor(size, p_RV.dtype)
        p_RV.mul_((factor if h_R is None else factor + h_R)[:, None])
        if self.smoothing:
            each = g_R[:, None] * (self.smoothing / size)
            if weight is None:
                p_RV.sub_(each)
            else:
                p_RV.addr_(each[:, 0], weight, alpha=-1)
        p_RV.scatter_add_(1, target[:, None], -own[:, None])


@dataclass(frozen=True)
class SoftTargets(CrossEntropy):
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
        if not self.smoothing and self.weight_V is None:
            return self.target_NV.to(dtype)
        target = self.target_NV.to(dtype, copy=True)
        if self.smoothing:
            target.mul_(1 - self.smoothing).add_(self.smoothing / target.shape[1])
        return target if self.weight_V is None else target.mul_(self.weight_V)

    def factor(self, classes: int, dtype: torch.dtype) -> Tensor | float:
        return self._weights(dtype).sum(1)

    def offset(self, z_RV: Tensor) -> Tensor:
        return (self._weights(z_RV.dtype) * z_RV).sum(1)

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        target = self._weights(p_RV.dtype)
        factor = g_R * target.sum(1)
        p_RV.mul_((factor if h_R is None else factor + h_R)[:, None])
        p_RV.sub_(target * g_R[:, None])


def log_sum_exp(top_R: Tensor, p_RV: Tensor) -> Tensor:
    """Log-sum-exp of rows whose softmax is at hand, without a second exponential per entry.

    The largest softmax of a row is ``exp(max z - lse)`` and at least ``1 / V``, so its logarithm
    is accurate.

    Args:
        top_R: the largest logit of each row.
        p_RV: their softmax.
    """
    return top_R - torch.log(p_RV.amax(1))
