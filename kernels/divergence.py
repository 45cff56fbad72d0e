"""Distillation from a teacher's head, by chunks of rows: neither head's logits ever exist.

Each chunk takes the student's product and the teacher's, turns the student's logits into their
gradient in place, and takes the two products that bring this to the student's inputs. With
``p`` the student's distribution of a row and ``q`` the teacher's, ``beta`` selects one divergence
of a family:

- 0: forward, ``KL(q || p) = sum_v q_v (log q_v - log p_v)``;
- 1: reverse, ``KL(p || q)``;
- between: generalised Jensen-Shannon, ``beta KL(q || m) + (1 - beta) KL(p || m)`` with
  ``m = beta q + (1 - beta) p``. Its limits at 0 and 1 are zero, which is why the ends stand for
  the divergences that it tends to once divided by ``beta`` or ``1 - beta``.

Pays: where ``N * V`` is large against ``N * H`` and ``V * H``. Does not: with few classes, or
where the teacher's logits are at hand anyway.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.

Source: the family and its convention are generalised knowledge distillation's (Agarwal et al.,
2024, arXiv:2306.13649), as TRL's ``GKDTrainer`` computes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels import forward_gradients, inputs
from memopt.kernels.head import HALF_UNIT, Head, run_chunks
from memopt.kernels.rows import BlockLoss


class Arguments(NamedTuple):
    """What the operator takes, in the order of its schema.

    Attributes:
        x: the student's hidden states `(N, H)`.
        weight: `(V, H)`.
        bias: `(V,)` or None.
        teacher_x: the teacher's hidden states `(N, H')`.
        teacher_weight: `(V, H')`.
        teacher_bias: `(V,)` or None.
        target: classes `(N,)`, int64, read only to leave rows out; or None.
        ignore_index: rows with this class count for nothing.
        beta: which divergence, in ``[0, 1]``.
        scale: factor on the student's product and on the teacher's.
        softcap: bound on the student's logits and on the teacher's; 0 for none.
        reduction: ``"batchmean"`` over rows, ``"mean"`` over rows and classes, or ``"sum"``.
        chunk_rows: rows whose logits exist at a time.
        wanted: whether the gradients of ``x``, ``weight`` and ``bias`` are.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_x: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    target: Tensor | None
    ignore_index: int
    beta: float
    scale: Sequence[float]
    softcap: Sequence[float]
    reduction: str
    chunk_rows: int
    wanted: Sequence[bool]

    @property
    def student(self) -> Head:
        return Head(self.x, self.weight, self.bias, self.scale[0], self.softcap[0])

    @property
    def teacher(self) -> Head:
        own = (self.teacher_x, self.teacher_weight, self.teacher_bias)
        return Head(*own, self.scale[1], self.softcap[1])


_NAME = "memopt::linear_divergence"
torch.library.define(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor teacher_x, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor? target, int ignore_index, float beta, float[2] scale, "
    "float[2] softcap, str reduction, SymInt chunk_rows, bool[3] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_NAME, "default")
def _divergence(*args: Any) -> tuple[Tensor, ...]:
    """The reduced divergence, its gradients, and the factor that these still lack."""
    a = Arguments(*args)
    student = a.student
    counted, rows = _counted_rows(a, student.wide)
    size = torch.ones_like(counted.sum()) if a.reduction == "sum" else counted.sum()
    if a.reduction == "mean":
        size = size * len(a.weight)
    share = torch.where(size > 0, 1 / size, 0.0)
    half = a.x.dtype == torch.float16
    upstream = counted * (HALF_UNIT if half else share) if any(a.wanted) else None
    loss = FromTeacher(a.teacher, a.beta)
    values, _, gradients = run_chunks(student, loss, a.chunk_rows, a.wanted, upstream, rows=rows)
    lacking = share / HALF_UNIT if half else torch.ones_like(share)
    return ((values * counted).sum() / size, *gradients, lacking)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args)
    dtype = torch.float32 if a.x.dtype == torch.float16 else a.x.dtype
    x, weight, bias = a.wanted
    scalar = a.x.new_empty((), dtype=a.student.wide)
    return (
        scalar,
        a.x.new_empty(a.x.shape if x else (0,), dtype=dtype),
        a.x.new_empty(a.weight.shape if weight else (0,), dtype=dtype),
        a.x.new_empty(a.weight.shape[:1] if bias else (0,), dtype=dtype),
        torch.empty_like(scalar),
    )


torch.library.register_fake(_NAME, _fake)
forward_gradients.register(_NAME, wanted_at=Arguments._fields.index("wanted"))


def reduced_divergence(
    beta: float,
    student: inputs.Head,
    teacher: inputs.Head,
    target: Tensor | None,
    *,
    temperature: float,
    reduction: str,
    ignore_index: int,
    scale: tuple[float, float],
    softcap: tuple[float, float],
    chunk_rows: int | None,
) -> Tensor:
    """Check and flatten the inputs, and compute; the temperature becomes a part of the scales."""
    inputs.one_of("reduction", reduction, "batchmean", "mean", "sum")
    inputs.positive("temperature", temperature)
    leading, other = student[0].shape[:-1], teacher[0].shape[:-1]
    if leading != other:
        raise ConfigError(
            f"rows of hidden are {tuple(leading)} and of teacher_hidden {tuple(other)}: all sizes "
            "but the last are to be the same"
        )
    x, weight, bias = inputs.head("", *student)
    fixed = inputs.head("teacher_", *teacher)
    classes = len(weight)
    if classes != len(fixed[1]):
        raise ConfigError(
            f"weight has {classes} rows and teacher_weight {len(fixed[1])}: allowed are the same "
            "classes for both; leave out the padding of the longer"
        )
    a = Arguments(
        x,
        weight,
        bias,
        *fixed,
        None if target is None else inputs.target(target, leading, classes, soft=False),
        ignore_index,
        inputs.within("beta", beta, 0, 1),
        [factor / temperature for factor in scale],
        [inputs.within("softcap", cap, 0) / temperature for cap in softcap],
        reduction,
        inputs.chunk_size(chunk_rows, len(x), classes, x.device),
        inputs.wanted(x, weight, bias),
    )
    with inputs.no_autocast(x):
        loss: Tensor = torch.ops.memopt.linear_divergence(*a)[0]
    return loss


def _counted_rows(a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """1 for rows that count and 0 for others; which they are, where the host may look."""
    if a.target is None:
        return a.x.new_ones(len(a.x), dtype=dtype), None
    valid = a.target != a.ignore_index
    skip = valid.device.type == "cpu" and not bool(valid.all())
    return valid.to(dtype), valid.nonzero()[:, 0] if skip else None


@dataclass(frozen=True)
class FromTeacher:
    """A row loss that makes the teacher's logits itself, for the rows it is asked about.

    Attributes:
        teacher: the frozen head.
        beta: which divergence, in ``[0, 1]``.
    """

    teacher: Head
    beta: float

    def at(self, rows: slice | Tensor) -> BlockLoss:
        x = self.teacher.x_NH[rows]
        raw = self.teacher.product(x, x.new_empty(len(x), len(self.teacher.weight_VH)))
        if self.beta == 0:
            return ForwardKL(self.teacher, raw)
        if self.beta == 1:
            return ReverseKL(self.teacher, raw)
        return JensenShannon(self.teacher, raw, self.beta)


_Some = TypeVar("_Some", bound="_Divergence")


@dataclass(frozen=True)
class _Divergence:
    """What every divergence of some rows holds.

    Attributes:
        teacher: maps its raw product to logits.
        raw_RV: its raw product of these rows.
    """

    teacher: Head
    raw_RV: Tensor

    def at(self: _Some, rows: slice | Tensor) -> _Some:
        return replace(self, raw_RV=self.raw_RV[rows])

    @cached_property
    def log_q(self) -> Tensor:
        """The teacher's log-probabilities."""
        return torch.log_softmax(self.teacher.activate(self.raw_RV), 1)


@dataclass(frozen=True)
class ForwardKL(_Divergence):
    """``sum_v q_v (log q_v - log p_v)``, whose gradient is ``p - q``."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        log_p = z_RV - lse_R[:, None]
        return (self.log_q.exp() * (self.log_q - log_p)).sum(1)

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        p_RV.mul_((g_R if h_R is None else g_R + h_R)[:, None])
        p_RV.sub_(self.log_q.exp().mul_(g_R[:, None]))


@dataclass(frozen=True)
class ReverseKL(_Divergence):
    """``sum_v p_v (log p_v - log q_v)``."""

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        log_p = z_RV - lse_R[:, None]
        return (log_p.exp() * (log_p - self.log_q)).sum(1)

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        _through_softmax_(p_RV, z_RV - lse_R[:, None] - self.log_q, g_R, h_R)


@dataclass(frozen=True)
class JensenShannon(_Divergence):
    """``beta sum_v q_v (log q_v - log m_v) + (1 - beta) sum_v p_v (log p_v - log m_v)``.

    Attributes:
        beta: the teacher's share of the mixture ``m``, between 0 and 1.
    """

    beta: float

    def values(self, z_RV: Tensor, lse_R: Tensor) -> Tensor:
        log_p = z_RV - lse_R[:, None]
        log_m = self._log_m(log_p)
        of_q = (self.log_q.exp() * (self.log_q - log_m)).sum(1)
        of_p = (log_p.exp() * (log_p - log_m)).sum(1)
        return self.beta * of_q + (1 - self.beta) * of_p

    def gradient_(
        self, p_RV: Tensor, z_RV: Tensor, lse_R: Tensor, g_R: Tensor, h_R: Tensor | None
    ) -> None:
        log_p = z_RV - lse_R[:, None]
        w = log_p.sub_(self._log_m(log_p)).mul_(1 - self.beta)
        _through_softmax_(p_RV, w, g_R, h_R)

    def _log_m(self, log_p_RV: Tensor) -> Tensor:
        """Log-probabilities of the mixture."""
        of_q = self.log_q + math.log(self.beta)
        return torch.logaddexp(of_q, log_p_RV + math.log1p(-self.beta))


def _through_softmax_(p_RV: Tensor, w_RV: Tensor, g_R: Tensor, h_R: Tensor | None) -> None:
    """Derivatives with respect to the probabilities ``p_RV`` to those of the logits, in place.

    Args:
        p_RV: the probabilities; receives the gradient.
        w_RV: derivative of each row's value with respect to them; overwritten.
        g_R: upstream gradient of each row's value.
        h_R: upstream gradient of each row's log-sum-exp, or None.
    """
    w_RV.sub_((p_RV * w_RV).sum(1, keepdim=True)).mul_(g_R[:, None])
    if h_R is not None:
        w_RV.add_(h_R[:, None])
    p_RV.mul_(w_RV)
