"""Linear layer and cross-entropy in one operator, by chunks of rows: the logits never exist.

``linear_cross_entropy`` reduces to a scalar and computes the gradients in the forward, so the head
costs its three products and nothing is saved but the gradients themselves. On a CPU it is four
where many chunks of a bfloat16 weight gradient are added up: see ``memopt.kernels.head``.

Its other forms take the same arguments and are files of their own: a loss per row in
``cross_entropy_rows``, the gradient in the hidden states' memory in ``in_place_gradient``, with
the logits in ``kept_logits``, rows whose weights are known in ``weighted_rows``.

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

from memopt.errors import ConfigError
from memopt.kernels import cut_cross_entropy, forward_gradients
from memopt.kernels.chunks import has_row_kernel, run_chunks
from memopt.kernels.chunks import scratch_bytes as chunks_scratch_bytes
from memopt.kernels.head import HALF_UNIT, Head, Sizes
from memopt.kernels.rows import IndexTargets, SoftTargets

Three = tuple[Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """What every form of the operator takes, in the order of ``SCHEMA``.

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
NAME = "memopt::linear_cross_entropy"
torch.library.define(NAME, f"({SCHEMA}, bool mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

REDUCED = torch.ops.memopt.linear_cross_entropy.default


@torch.library.impl(NAME, "default")
def _reduced(*args: Any) -> tuple[Tensor, ...]:
    *shared, mean = args
    return reduced(Arguments(*shared), mean)


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


def fake_reduced(*args: Any) -> tuple[Tensor, ...]:
    """Tensors like the results, of fake arguments."""
    arguments = Arguments(*args[:-1])
    scalar = arguments.x.new_empty((), dtype=arguments.wide)
    return (
        scalar,
        *forward_gradients.like(arguments.x, arguments.weight, arguments.wanted),
        torch.empty_like(scalar),
    )


torch.library.register_fake(NAME, fake_reduced)
forward_gradients.register(NAME, Arguments._fields.index("wanted"))


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


def can_be_cut(*args: Any) -> bool:
    """Whether the operator can do without logits in memory: ``chunk_rows`` of 0.

    Args:
        *args: its arguments, fake or real.
    """
    return cut_cross_entropy.serves(Arguments(*args[: len(Arguments._fields)]))


def scratch_bytes(*args: Any) -> int:
    """What any form of the operator allocates besides its results, in bytes.

    Args:
        *args: its arguments, fake or real.
    """
    a = Arguments(*args[: len(Arguments._fields)])
    trained = any(a.wanted) and len(args) > len(a)  # the rows' forward makes no gradients
    sizes = Sizes.of(a.x, a.weight, a.wanted if trained else ())
    if a.chunk_rows == 0:
        values = 8 if len(args) > len(a) else 0  # and log-sum-exps: results of the rows' forward
        vectors = sizes.rows * (12 + 4 * trained + values)
        return vectors + cut_cross_entropy.scratch_bytes(sizes, smoothed=a.label_smoothing > 0)
    soft = a.target.is_floating_point()
    apart = int(trained and a.softcap != 0.0)
    blocks = (a.x.dtype != a.wide) + apart
    if soft:  # the targets, if anything changes, and times the logits
        changed = a.target.dtype != a.wide or a.label_smoothing or a.class_weight is not None
        blocks += 1 + bool(changed)
    elif has_row_kernel(IndexTargets, a.x):
        blocks = apart = 0
    wide = a.wide.itemsize
    targets = sizes.rows * (1 + 8 + 8 + wide * (2 if trained else 1))
    return targets + chunks_scratch_bytes(sizes, a.chunk_rows, blocks=blocks, held=apart)
