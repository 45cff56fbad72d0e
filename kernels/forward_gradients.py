"""Autograd of operators that compute their gradients in the forward.

A loss that is a scalar can: its upstream gradient is one factor. Such an operator returns
``(loss, gradient, gradient, gradient, lacking)``: the gradients are those of its first three
arguments, empty where not wanted, and ``lacking`` holds the factor that each still lacks, one for
all or `(3,)`. What it returns besides has no gradient. The backward multiplies and does nothing
else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.errors import DoubleBackwardError


def register(name: str, wanted_at: int) -> None:
    """Give the operator its backward.

    Args:
        name: the operator's, with its namespace.
        wanted_at: position of the argument that says which gradients are wanted.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:5])
        wanted = zip(inputs[:3], inputs[wanted_at], strict=True)
        ctx.dtypes = [t.dtype if on and t is not None else None for t, on in wanted]
        ctx.unused = (None,) * (len(inputs) - 3)

    torch.library.register_autograd(name, _scale, setup_context=save)


def like(x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the gradients of a head: float32 for float16, empty where not wanted.

    Args:
        x: hidden states `(N, H)`.
        weight: `(V, H)`.
        wanted: whether the gradients of the hidden states, the weight and the bias are.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    shapes = x.shape, weight.shape, weight.shape[:1]
    of_x, of_weight, of_bias = (
        x.new_empty(shape if on else (0,), dtype=dtype)
        for shape, on in zip(shapes, wanted, strict=True)
    )
    return of_x, of_weight, of_bias


def _scale(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if g is None:
        return (None, None, None, *ctx.unused)
    *gradients, lacking = ctx.saved_tensors
    factors = (g.to(lacking.dtype) * lacking).expand(3)
    scaled = [
        None if dtype is None else (gradient * factor).to(dtype)
        for gradient, factor, dtype in zip(gradients, factors, ctx.dtypes, strict=True)
    ]
    return (*scaled, *ctx.unused)


def refuse_double_backward() -> None:
    """Raise if the backward that runs is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "this loss computes its gradients in the forward and has no second derivative: "
            "where one is needed, write the loss with plain matrix products"
        )
