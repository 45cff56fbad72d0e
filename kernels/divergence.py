"""Distillation from a teacher, by chunks of rows: the student's logits never exist.

Each chunk takes the student's product and the teacher's, turns the student's logits into their
gradient in place, and takes the two products that bring this to the student's inputs. The
teacher is a head, or logits that are at hand. Which divergence is the business of
``memopt.kernels.teachers``.

Two forms. ``linear_divergence`` reduces to a scalar and computes the gradients in the forward:
four products with the teacher's. ``linear_divergence_rows`` returns a value per row, whose
upstream gradient is not known in advance: its backward makes both heads' logits again.

Pays: where ``N * V`` is large against ``N * H`` and ``V * H``. Does not: with few classes.

Legend: ``N`` tokens, ``H`` hidden size, ``V`` vocabulary, ``C`` rows of a chunk, ``R`` rows of a
block.

Source: see ``memopt.kernels.teachers`` and ``memopt.kernels.linear_cross_entropy``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels import forward_gradients, inputs
from memopt.kernels.chunks import run_chunks
from memopt.kernels.chunks import scratch_bytes as chunks_scratch_bytes
from memopt.kernels.forward_gradients import refuse_double_backward
from memopt.kernels.head import HALF_UNIT, Head, Sizes
from memopt.kernels.rows import RowLoss
from memopt.kernels.teachers import FromHead, FromLogits, blocks

Three = tuple[Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """What all operators of this file take, in the order of ``SCHEMA``.

    Attributes:
        x: the student's hidden states `(N, H)`.
        weight: `(V, H)`.
        bias: `(V,)` or None.
        teacher_x: the teacher's hidden states `(N, H')`, or its logits `(..., V)` in `N` rows.
        teacher_weight: `(V, H')`, or None for logits.
        teacher_bias: `(V,)` or None.
        target: classes `(N,)`, int64, read only to leave rows out; or None.
        ignore_index: rows with this class count for nothing.
        beta: which divergence, in ``[0, 1]``.
        cross: whether the forward one leaves out the teacher's entropy.
        scale: factor on the student's product and on the teacher's.
        softcap: bound on the student's logits and on the teacher's; 0 for none.
        chunk_rows: rows whose logits exist at a time.
        wanted: whether the gradients of ``x``, ``weight`` and ``bias`` are.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_x: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    target: Tensor | None
    ignore_index: int
    beta: float
    cross: bool
    scale: Sequence[float]
    softcap: Sequence[float]
    chunk_rows: int
    wanted: Sequence[bool]

    @property
    def student(self) -> Head:
        return Head(self.x, self.weight, self.bias, self.scale[0], self.softcap[0])

    @property
    def loss(self) -> RowLoss:
        """Of a row; with buffers of a chunk's size where the teacher's logits are to be made."""
        options = self.scale[1], self.softcap[1]
        if self.teacher_weight is None:
            teacher = Head(self.teacher_x, self.teacher_x, None, *options)
            return FromLogits(teacher, self.beta, self.cross)
        teacher = Head(self.teacher_x, self.teacher_weight, self.teacher_bias, *options)
        return FromHead.of(teacher, self.beta, cross=self.cross, chunk_rows=self.chunk_rows)


SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor teacher_x, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? target, int ignore_index, float beta, bool cross, "
    "float[2] scale, float[2] softcap, SymInt chunk_rows, bool[3] wanted"
)
_NAME = "memopt::linear_divergence"
_REDUCED = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
torch.library.define(_NAME, f"({SCHEMA}, str reduction) -> {_REDUCED}")
torch.library.define(f"{_NAME}_rows", f"({SCHEMA}) -> Tensor")
torch.library.define(f"{_NAME}_rows_backward", f"({SCHEMA}, Tensor g) -> (Tensor, Tensor, Tensor)")

REDUCED = torch.ops.memopt.linear_divergence.default
ROWS = torch.ops.memopt.linear_divergence_rows.default
ROWS_BACKWARD = torch.ops.memopt.linear_divergence_rows_backward.default
_TENSORS = Arguments._fields.index("ignore_index")


@torch.library.impl(_NAME, "default")
def _reduced(*args: Any) -> tuple[Tensor, ...]:
    """The reduced divergence, its gradients, and the factor that these still lack.

    The reduction is ``"batchmean"`` over rows, ``"mean"`` over rows and classes, or ``"sum"``.
    """
    *shared, reduction = args
    a = Arguments(*shared)
    student = a.student
    counted, rows = counted_rows(a, student.wide)
    size = torch.ones_like(counted.sum()) if reduction == "sum" else counted.sum()
    if reduction == "mean":
        size = size * len(a.weight)
    share = torch.where(size > 0, 1 / size, 0.0)
    half = a.x.dtype == torch.float16
    upstream = counted * (HALF_UNIT if half else share) if any(a.wanted) else None
    values, _, gradients = run_chunks(student, a.loss, a.chunk_rows, a.wanted, upstream, rows=rows)
    lacking = share / HALF_UNIT if half else torch.ones_like(share)
    return (torch.where(counted > 0, values, 0.0).sum() / size, *gradients, lacking)


def _fake_reduced(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args[:-1])
    scalar = a.x.new_empty((), dtype=a.student.wide)
    return (scalar, *forward_gradients.like(a.x, a.weight, a.wanted), torch.empty_like(scalar))


torch.library.register_fake(_NAME, _fake_reduced)
forward_gradients.register(_NAME, wanted_at=Arguments._fields.index("wanted"))


@torch.library.impl(f"{_NAME}_rows", "default")
def _rows(*args: Any) -> Tensor:
    """Divergences `(N,)`, 0 for rows that do not count; float32 or wider."""
    a = Arguments(*args)
    counted, rows = counted_rows(a, a.student.wide)
    values, *_ = run_chunks(a.student, a.loss, a.chunk_rows, [False] * 3, None, rows=rows)
    return torch.where(counted > 0, values, 0.0)


def _fake_rows(*args: Any) -> Tensor:
    a = Arguments(*args)
    return a.x.new_empty(a.x.shape[0], dtype=a.student.wide)


@torch.library.impl(f"{_NAME}_rows_backward", "default")
def _rows_gradients(*args: Any) -> Three:
    """Gradients under upstream gradients `(N,)`; where the host may look, rows with 0 are left."""
    *shared, g = args
    a = Arguments(*shared)
    counted, rows = counted_rows(a, a.student.wide)
    upstream = torch.where(counted > 0, g, 0.0).to(counted.dtype)
    if g.device.type == "cpu":
        rows = upstream.nonzero()[:, 0]
        rows = None if len(rows) == len(g) else rows
    return run_chunks(a.student, a.loss, a.chunk_rows, a.wanted, upstream, rows=rows)[2]


def _fake_rows_gradients(*args: Any) -> Three:
    a = Arguments(*args[:-1])
    return forward_gradients.like(a.x, a.weight, a.wanted)


torch.library.register_fake(f"{_NAME}_rows", _fake_rows)
torch.library.register_fake(f"{_NAME}_rows_backward", _fake_rows_gradients)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]
    wanted = zip(inputs[:3], Arguments(*inputs).wanted, strict=True)
    ctx.dtypes = [t.dtype if on and t is not None else None for t, on in wanted]
    ctx.unused = (None,) * (len(inputs) - 3)


def _rows_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    gradients = zip(ROWS_BACKWARD(*ctx.saved_tensors, *ctx.options, g), ctx.dtypes, strict=True)
    typed = [None if dtype is None else gradient.to(dtype) for gradient, dtype in gradients]
    return (*typed, *ctx.unused)


torch.library.register_autograd(f"{_NAME}_rows", _rows_backward, setup_context=_save_rows)


def counted_rows(a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """1 for rows that count and 0 for others; which they are, where the host may look."""
    if a.target is None:
        return a.x.new_ones(len(a.x), dtype=dtype), None
    valid = a.target != a.ignore_index
    skip = valid.device.type == "cpu" and not bool(valid.all())
    return valid.to(dtype), valid.nonzero()[:, 0] if skip else None


def scratch_bytes(*args: Any) -> int:
    """What any of the operators of this file allocates besides its results, in bytes.

    Args:
        *args: its arguments, fake or real.
    """
    a = Arguments(*args[: len(Arguments._fields)])
    trained = any(a.wanted) and len(args) > len(a)  # the rows' forward makes no gradients
    sizes, wide = Sizes.of(a.x, a.weight, a.wanted if trained else ()), a.student.wide.itemsize
    apart = a.x.dtype != a.student.wide
    of_teacher = 0
    if a.teacher_weight is not None:
        entries = sizes.classes + size_hint(a.teacher_x.shape[1])
        of_teacher = min(sizes.rows, a.chunk_rows) * entries * a.teacher_x.element_size()
    targets = sizes.rows * (8 + wide * (2 if trained else 1))
    return (
        of_teacher
        + targets
        + chunks_scratch_bytes(
            sizes,
            a.chunk_rows,
            blocks=trained + apart + blocks(a.beta, cross=a.cross),
            held=trained,
        )
    )


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
        False,
        [factor / temperature for factor in scale],
        [inputs.within("softcap", cap, 0) / temperature for cap in softcap],
        inputs.chunk_size(chunk_rows, len(x), classes, x.device),
        inputs.wanted(x, weight, bias),
    )
    with inputs.no_autocast(x):
        loss: Tensor = torch.ops.memopt.linear_divergence(*a, reduction)[0]
    return loss
