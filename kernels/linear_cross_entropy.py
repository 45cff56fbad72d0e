"""Linear layer and cross-entropy in one operator, by chunks of rows: the logits never exist.

Two forms. ``linear_cross_entropy`` reduces to a scalar and computes the gradients in the forward,
so the head costs its three products and nothing is saved but the gradients themselves.
``linear_cross_entropy_rows`` returns a loss and a log-sum-exp per row, whose upstream gradients
are not known in advance: its backward makes the logits again, chunk by chunk, a fourth product.
Where a graph reads the hidden states no more, ``linear_cross_entropy_`` writes their gradient over
them, each chunk's once its weight gradient has been added up; it has no autograd of its own.

Pays: where ``N * V`` is large against ``N * H`` and ``V * H``: any language model. Does not: in a
classifier with fewer classes than hidden units.

Source: computing the gradient in the forward is Liger Kernel's fused linear cross-entropy (Hsu et
al., 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels import cut_cross_entropy, forward_gradients
from memopt.kernels.forward_gradients import refuse_double_backward
from memopt.kernels.head import HALF_UNIT, Head, has_row_kernel, run_chunks
from memopt.kernels.head import scratch_bytes as head_scratch_bytes
from memopt.kernels.rows import IndexTargets, SoftTargets

Three = tuple[Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """What all operators of this file take, in the order of ``SCHEMA``.

    Attributes:
        x: hidden states `(N, H)`.
        weight: `(V, H)`.
        bias: `(V,)` or None.
        target: classes `(N,)`, int64, or distributions `(N, V)`, floating point.
        class_weight: `(V,)` or None.
        ignore_index: rows with this class count for nothing.
        label_smoothing: in ``[0, 1]``.
        scale: factor on the product.
        softcap: bound on the logits by a hyperbolic tangent; 0 for none.
        chunk_rows: rows whose logits exist at a time; 0 for none at all, where
            ``cut_cross_entropy.serves`` says that this can be.
        wanted: whether the gradients of ``x``, ``weight`` and ``bias`` are.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    scale: float
    softcap: float
    chunk_rows: int
    wanted: Sequence[bool]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of losses."""
        return torch.promote_types(self.x.dtype, torch.float32)


SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "int ignore_index, float label_smoothing, float scale, float softcap, SymInt chunk_rows, "
    "bool[3] wanted"
)
_NAME = "memopt::linear_cross_entropy"
torch.library.define(_NAME, f"({SCHEMA}, bool mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    f"{_NAME}_",
    f"({SCHEMA.replace('Tensor', 'Tensor(a!)', 1)}, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(f"{_NAME}_rows", f"({SCHEMA}) -> (Tensor, Tensor)")
torch.library.define(
    f"{_NAME}_rows_backward",
    f"({SCHEMA}, Tensor g, Tensor? h) -> (Tensor, Tensor, Tensor)",
)

REDUCED = torch.ops.memopt.linear_cross_entropy.default
IN_PLACE = torch.ops.memopt.linear_cross_entropy_.default
ROWS = torch.ops.memopt.linear_cross_entropy_rows.default
ROWS_BACKWARD = torch.ops.memopt.linear_cross_entropy_rows_backward.default


@torch.library.impl(_NAME, "default")
def _reduced(*args: Any) -> tuple[Tensor, ...]:
    *shared, mean = args
    return reduced(Arguments(*shared), mean)


@torch.library.impl(f"{_NAME}_", "default")
def _in_place(*args: Any) -> tuple[Tensor, ...]:
    """The same without the gradient of ``x``, which is in ``x``."""
    *shared, mean = args
    a = Arguments(*shared)
    if not fits_in_place(a):
        raise ConfigError(
            "the gradient of the hidden states cannot take their place: allowed are chunks, a "
            "gradient that is wanted, and contiguous hidden states in another dtype than float16"
        )
    loss, _, *others = reduced(a, mean, in_place=True)
    return (loss, *others)


def reduced(
    a: Arguments, mean: bool, kept_NV: Tensor | None = None, *, in_place: bool = False
) -> tuple[Tensor, ...]:
    """The sum or mean, its gradients, and the factor that these still lack.

    ``kept_NV`` takes the raw product of the rows that are visited; ``in_place``, ``x`` its own
    gradient.
    """
    work = Work.of(a)
    size = work.total if mean else torch.ones_like(work.total)
    share = torch.where(work.counted_N.any(), 1 / size, 0.0)  # infinite without class weight
    lacking = torch.ones_like(share)
    if a.x.dtype == torch.float16:
        lacking = torch.where(size != 0, share / HALF_UNIT, 1.0)
    upstream = torch.where(work.counted_N > 0, share / lacking, 0.0) if any(a.wanted) else None
    values, _, gradients = work.run(
        a.chunk_rows, a.wanted, upstream, kept_NV=kept_NV, in_place=in_place
    )
    return (values.sum() / size, *gradients, lacking)


def _fake_reduced(*args: Any) -> tuple[Tensor, ...]:
    arguments = Arguments(*args[:-1])
    scalar = arguments.x.new_empty((), dtype=arguments.wide)
    return (
        scalar,
        *forward_gradients.like(arguments.x, arguments.weight, arguments.wanted),
        torch.empty_like(scalar),
    )


def _fake_in_place(*args: Any) -> tuple[Tensor, ...]:
    loss, _, *others = _fake_reduced(*args)
    return (loss, *others)


torch.library.register_fake(_NAME, _fake_reduced)
torch.library.register_fake(f"{_NAME}_", _fake_in_place)
forward_gradients.register(_NAME, Arguments._fields.index("wanted"))


@torch.library.impl(f"{_NAME}_rows", "default")
def _rows(*args: Any) -> tuple[Tensor, Tensor]:
    """Losses, 0 where ignored, and log-sum-exps: `(N,)` each, float32 or wider."""
    arguments = Arguments(*args)
    work = Work.of(arguments, compact=False)
    values, lse, _ = work.run(arguments.chunk_rows, (False, False, False), None)
    return values, lse


def _fake_rows(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*args)
    rows = arguments.x.new_empty(arguments.x.shape[0], dtype=arguments.wide)
    return rows, torch.empty_like(rows)


@torch.library.impl(f"{_NAME}_rows_backward", "default")
def _rows_gradients(*args: Any) -> Three:
    """Gradients under upstream gradients `(N,)` of losses and log-sum-exps."""
    *shared, g, h = args
    arguments = Arguments(*shared)
    work = Work.of(arguments, compact=h is None)
    upstream = torch.where(work.counted_N > 0, g, 0.0).to(arguments.wide)
    return work.run(arguments.chunk_rows, arguments.wanted, upstream, h)[2]


def _fake_rows_gradients(*args: Any) -> Three:
    a = Arguments(*args[:-2])
    return forward_gradients.like(a.x, a.weight, a.wanted)


torch.library.register_fake(f"{_NAME}_rows", _fake_rows)
torch.library.register_fake(f"{_NAME}_rows_backward", _fake_rows_gradients)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.dtypes = _dtypes(Arguments(*inputs))
    ctx.unused = (None,) * (len(inputs) - 3)


def _rows_backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if g is None and h is None:
        return (None, None, None, *ctx.unused)
    if g is None:
        g = torch.zeros_like(h)  # type: ignore[arg-type]
    gradients = ROWS_BACKWARD(*ctx.saved_tensors, *ctx.options, g, h)
    typed = [
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    ]
    return (*typed, *ctx.unused)


torch.library.register_autograd(f"{_NAME}_rows", _rows_backward, setup_context=_save_rows)


@dataclass(frozen=True)
class Work:
    """A head, a row loss, and which rows count.

    Attributes:
        head: the linear layer.
        loss: the cross-entropy of its rows.
        counted_N: 1 for rows that count, 0 for those that are ignored.
        total: what a mean divides by: rows that count, or their class weights.
        rows: the rows to visit, or None for all.
    """

    head: Head
    loss: IndexTargets | SoftTargets
    counted_N: Tensor
    total: Tensor
    rows: Tensor | None = None

    @classmethod
    def of(cls, a: Arguments, *, compact: bool = True) -> "Work":
        """Prepare the targets; where the host may look at them, leave ignored rows out."""
        if a.chunk_rows == 0 and not cut_cross_entropy.serves(a):
            raise ConfigError(
                f"chunk_rows=0 with {a.x.dtype} on {a.x.device} and targets of {a.target.dtype}: "
                "allowed is float32, bfloat16 or float16 on a GPU with Triton, and int64 classes; "
                "give a number of rows"
            )
        head = Head(a.x, a.weight, a.bias, a.scale, a.softcap)
        class_weight = None if a.class_weight is None else a.class_weight.to(a.wide)
        if a.target.is_floating_point():
            counted = a.x.new_ones(len(a.x), dtype=a.wide)
            soft = SoftTargets(a.target, class_weight, a.label_smoothing)
            return cls(head, soft, counted, counted.sum())
        valid = a.target != a.ignore_index
        rows = None
        if a.target.device.type == "cpu":
            _check_targets(a.target, valid, len(a.weight))
            if compact and a.chunk_rows and not bool(valid.all()):
                rows = valid.nonzero()[:, 0]
        target = torch.where(valid, a.target, 0)
        counted = valid.to(a.wide)
        total = (counted if class_weight is None else counted * class_weight[target]).sum()
        hard = IndexTargets(target, class_weight, a.label_smoothing)
        return cls(head, hard, counted, total, rows)

    def run(
        self,
        chunk_rows: int,
        wanted: Sequence[bool],
        g_N: Tensor | None,
        h_N: Tensor | None = None,
        kept_NV: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor, Three]:
        """Values, log-sum-exps and gradients; 0 for rows that do not count."""
        if in_place and self.rows is not None:
            self.head.x_NH.masked_fill_((self.counted_N == 0)[:, None], 0.0)
        if chunk_rows == 0:
            assert isinstance(self.loss, IndexTargets)
            values, lse, gradients = cut_cross_entropy.run(self.head, self.loss, wanted, g_N, h_N)
        else:
            values, lse, gradients = run_chunks(
                self.head,
                self.loss,
                chunk_rows,
                wanted,
                g_N,
                h_N,
                self.rows,
                kept_NV,
                in_place=in_place,
            )
        return torch.where(self.counted_N > 0, values, 0.0), lse, gradients


def _check_targets(target: Tensor, valid: Tensor, classes: int) -> None:
    """As eager does: out-of-range classes are an error, with its words."""
    wrong = valid & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


def _dtypes(a: Arguments) -> list[torch.dtype | None]:
    """What each gradient must be in the end; None where it is not wanted."""
    return [
        t.dtype if on and t is not None else None
        for t, on in zip((a.x, a.weight, a.bias), a.wanted, strict=True)
    ]


def can_be_cut(*args: Any) -> bool:
    """Whether an operator of this file can do without logits in memory: ``chunk_rows`` of 0.

    Args:
        *args: its arguments, fake or real.
    """
    return cut_cross_entropy.serves(Arguments(*args[: len(Arguments._fields)]))


def fits_in_place(a: Arguments) -> bool:
    """Whether the gradient of the hidden states, fake or real, could take their place.

    Not without chunks: tiles of the gradient are added up while others still read the states.
    """
    own = a.x.dtype != torch.float16  # whose gradients are float32
    return own and bool(a.wanted[0]) and a.chunk_rows != 0 and a.x.is_contiguous()


def scratch_bytes(*args: Any) -> int:
    """What any of the operators of this file allocates besides its results, in bytes.

    Args:
        *args: its arguments, fake or real.
    """
    a = Arguments(*args[: len(Arguments._fields)])
    trained = any(a.wanted) and len(args) > len(a)  # the rows' forward makes no gradients
    rows, width = (size_hint(d) for d in a.x.shape)
    classes, itemsize = size_hint(a.weight.shape[0]), a.x.element_size()
    if a.chunk_rows == 0:
        wanted = a.wanted if trained else (False, False, False)
        values = 8 if len(args) > len(a) else 0  # and log-sum-exps: results of the rows' forward
        return rows * (12 + 4 * trained + values) + cut_cross_entropy.scratch_bytes(
            rows, width, classes, a.x.dtype, wanted, smoothed=a.label_smoothing > 0
        )
    soft = a.target.is_floating_point()
    apart = int(trained and a.softcap != 0.0)
    blocks = (a.x.dtype != a.wide) + apart
    if soft:  # the targets, if anything changes, and times the logits
        changed = a.target.dtype != a.wide or a.label_smoothing or a.class_weight is not None
        blocks += 1 + bool(changed)
    elif has_row_kernel(IndexTargets, a.x):
        blocks = apart = 0
    narrow = trained and a.wanted[1] and a.x.dtype in (torch.bfloat16, torch.float16)
    chunks = -(-rows // a.chunk_rows)
    wide = a.wide.itemsize
    targets = rows * (1 + 8 + 8 + wide * (2 if trained else 1))
    exact = narrow and chunks > 8
    return targets + head_scratch_bytes(
        rows, width, classes, itemsize, a.chunk_rows, blocks=blocks, held=apart, exact=exact
    )
