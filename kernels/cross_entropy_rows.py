"""Linear layer and cross-entropy in one operator that returns a loss and a log-sum-exp per row.

Their upstream gradients are not known in advance: the backward makes the logits again, chunk by
chunk, a fourth product.

Pays: where rows are weighted, masked or reported one by one. Does not: where one reduced loss is
all that is read, which ``linear_cross_entropy`` computes in three products.

Source: see ``memopt.kernels.linear_cross_entropy``.
"""

from typing import Any

import torch
from torch import Tensor

from memopt.kernels import forward_gradients
from memopt.kernels.forward_gradients import refuse_double_backward
from memopt.kernels.linear_cross_entropy import NAME, SCHEMA, Arguments, Three, Work

torch.library.define(f"{NAME}_rows", f"({SCHEMA}) -> (Tensor, Tensor)")
torch.library.define(
    f"{NAME}_rows_backward",
    f"({SCHEMA}, Tensor g, Tensor? h) -> (Tensor, Tensor, Tensor)",
)

ROWS = torch.ops.memopt.linear_cross_entropy_rows.default
ROWS_BACKWARD = torch.ops.memopt.linear_cross_entropy_rows_backward.default


@torch.library.impl(f"{NAME}_rows", "default")
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


@torch.library.impl(f"{NAME}_rows_backward", "default")
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


torch.library.register_fake(f"{NAME}_rows", _fake_rows)
torch.library.register_fake(f"{NAME}_rows_backward", _fake_rows_gradients)


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


torch.library.register_autograd(f"{NAME}_rows", _rows_backward, setup_context=_save_rows)


def _dtypes(a: Arguments) -> list[torch.dtype | None]:
    """What each gradient must be in the end; None where it is not wanted."""
    return [
        t.dtype if on and t is not None else None
        for t, on in zip((a.x, a.weight, a.bias), a.wanted, strict=True)
    ]
