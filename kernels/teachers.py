"""Row losses against a teacher: what distillation minimises, from two rows of logits.

With ``p`` the student's distribution of a row and ``q`` the teacher's, ``beta`` selects one
divergence of a family:

- 0: forward, ``KL(q || p) = sum_v q_v (log q_v - log p_v)``, or with ``cross`` without the
  teacher's entropy, ``-sum_v q_v log p_v``;
- 1: reverse, ``KL(p || q)``;
- between: generalised Jensen-Shannon, ``beta KL(q || m) + (1 - beta) KL(p || m)`` with
  ``m = beta q + (1 - beta) p``. Its limits at 0 and 1 are zero, which is why the ends stand for
  the divergences that it tends to once divided by ``beta`` or ``1 - beta``.

A class that the teacher rules out, with a logit of minus infinity, counts for nothing in the
teacher's expectations.

Blocks are used once: ``values`` first, then ``gradient_``, which finishes what ``values`` began.
So no more than a few tensors of a block's size exist at a time; see ``blocks``.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.

Source: the family and its convention are generalised knowledge distillation's (Agarwal et al.,
2024, arXiv:2306.13649), as TRL's ``GKDTrainer`` computes it.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memopt.kernels.head import Head
from memopt.kernels.rows import BlockLoss


@dataclass(frozen=True)
class FromHead:
    """A row loss that makes the teacher's logits itself, for the rows it is asked about.

    Attributes:
        teacher: the frozen head.
        beta: which divergence, in ``[0, 1]``.
        cross: whether the forward one leaves out the teacher's entropy.
        raw_CV: takes the teacher's product; the next chunk overwrites the last.
        x_CH: takes the teacher's hidden states where rows are a list.
    """

    teacher: Head
    beta: float
    cross: bool
    raw_CV: Tensor
    x_CH: Tensor

    @classmethod
    def of(cls, teacher: Head, beta: float, *, cross: bool, chunk_rows: int) -> "FromHead":
        """With buffers for chunks of so many rows."""
        rows, width = teacher.x_NH.shape
        make, size = teacher.x_NH.new_empty, min(chunk_rows, rows)
        raw, x = make(size, len(teacher.weight_VH)), make(size, width)
        return cls(teacher, beta, cross, raw, x)

    def at(self, rows: slice | Tensor) -> BlockLoss:
        if isinstance(rows, Tensor):
            x = torch.index_select(self.teacher.x_NH, 0, rows, out=self.x_CH[: len(rows)])
        else:
            x = self.teacher.x_NH[rows]
        raw = self.teacher.product(x, self.raw_CV[: len(x)])
        return _divergence(self.teacher, raw, self.beta, cross=self.cross)


@dataclass(frozen=True)
class FromLogits:
    """A row loss against logits that are at hand, of which a block is read at a time.

    Attributes:
        teacher: what its raw product is to become; the product itself stands in ``x_NH``, `(...,
            V)` with any strides.
        beta: which divergence, in ``[0, 1]``.
        cross: whether the forward one leaves out the teacher's entropy.
    """

    teacher: Head
    beta: float
    cross: bool

    def at(self, rows: slice | Tensor) -> BlockLoss:
        raw = self.teacher.x_NH
        block = _divergence(self.teacher, raw, self.beta, cross=self.cross)
        if isinstance(rows, slice) and raw.dim() == 2:
            return block.at(rows)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=raw.device)
        return replace(block, rows=rows)


def blocks(beta: float, *, cross: bool) -> int:
    """Tensors of a block's size that a divergence holds, besides the student's own."""
    if beta == 0:
        return 2 if cross else 3
    return 2 if beta == 1 else 4


@dataclass
class _Divergence:
    """What every divergence of some rows holds.

    Attributes:
        teacher: maps its raw product to logits.
        raw_RV: its raw product of these rows.
        rows: which rows of ``raw_RV``, `(..., V)` then, these are, where they have not been
            picked yet.
        kept_RV: what ``values`` leaves for ``gradient_``.
    """

    teacher: Head
    raw_RV: Tensor
    rows: Tensor | None = None
    kept_RV: Tensor = field(init=False, repr=False)

    def at(self, rows: slice | Tensor) -> "_Divergence":
        if self.rows is not None:
            return replace(self, rows=self.rows[rows])
        return replace(self, raw_RV=self.raw_RV[rows])

    def log_q(self, dtype: torch.dtype) -> Tensor:
        """The teacher's log-probabilities, a new tensor."""
        return torch.log_softmax(self.teacher.activate(self._picked()).to(dtype), 1)

    def q(self, dtype: torch.dtype) -> Tensor:
        """The teacher's probabilities, a new tensor: more exact than from their logarithms."""
        return torch.softmax(self.teacher.activate(self._picked()).to(dtype), 1)

    def _picked(self) -> Tensor:
        if self.rows is None:
            return self.raw_RV
        return self.raw_RV[torch.unravel_index(self.rows, self.raw_RV.shape[:-1])]

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        """Through the softmax, from ``kept_RV``: each row's derivative by its probabilities."""
        w = self.kept_RV
        w.sub_((p_RV * w).sum(1, keepdim=True)).mul_(g_R[:, None])
        if h_R is not None:
            w.add_(h_R[:, None])
        p_RV.mul_(w)


class ForwardKL(_Divergence):
    """``sum_v q_v (log q_v - log p_v)``, whose gradient is ``p - q``."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        self.kept_RV, log_p = self.q(z_RV.dtype), torch.log_softmax(z_RV, 1)
        difference = _finite_(self.kept_RV.log()).sub_(log_p)
        return difference.mul_(self.kept_RV).sum(1)

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        p_RV.mul_((g_R if h_R is None else g_R + h_R)[:, None])
        p_RV.addcmul_(self.kept_RV, g_R[:, None], value=-1)


class CrossEntropy(ForwardKL):
    """``-sum_v q_v log p_v``: the forward divergence and the teacher's entropy."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        self.kept_RV = self.q(z_RV.dtype)
        return torch.log_softmax(z_RV, 1).mul_(self.kept_RV).sum(1).neg_()


class ReverseKL(_Divergence):
    """``sum_v p_v (log p_v - log q_v)``."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        log_q, log_p = self.log_q(z_RV.dtype), torch.log_softmax(z_RV, 1)
        self.kept_RV = log_q.neg_().add_(log_p)
        return log_p.exp_().mul_(self.kept_RV).sum(1)


@dataclass
class JensenShannon(_Divergence):
    """``beta sum_v q_v (log q_v - log m_v) + (1 - beta) sum_v p_v (log p_v - log m_v)``.

    Attributes:
        beta: the teacher's share of the mixture ``m``, between 0 and 1.
    """

    beta: float = 0.5

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        log_q, log_p = self.log_q(z_RV.dtype), torch.log_softmax(z_RV, 1)
        own, other = math.log1p(-self.beta), math.log(self.beta)
        log_m = log_q + (other - own)
        torch.logaddexp(log_m, log_p, out=log_m).add_(own)
        mean = log_q.exp()
        of_q = mean.mul_(_finite_(log_q).sub_(log_m)).sum(1)
        torch.exp(log_p, out=mean)
        of_p = mean.mul_(log_p.sub_(log_m)).sum(1)
        self.kept_RV = log_p.mul_(1 - self.beta)
        return of_q.mul_(self.beta).add_(of_p, alpha=1 - self.beta)


def _divergence(teacher: Head, raw: Tensor, beta: float, *, cross: bool) -> _Divergence:
    if beta == 0:
        return (CrossEntropy if cross else ForwardKL)(teacher, raw)
    if beta == 1:
        return ReverseKL(teacher, raw)
    return JensenShannon(teacher, raw, beta=beta)


def _finite_(log_q_RV: Tensor) -> Tensor:
    """Zero probabilities times their logarithms are to be zero, in place."""
    return log_q_RV.clamp_(min=torch.finfo(log_q_RV.dtype).min)
