"""Gated activations of one tensor that holds gate and up side by side, as Phi-3 has them.

What `memopt.kernels.gated` is for two tensors. Halves are read where they lie, and the gradient is
written as two halves: nothing is split into copies, and nothing concatenated.

Saved for the backward: the input.

Pays: where `memopt.kernels.gated` does, and by one more read and write of the gradient.

Sources: those of `memopt.kernels.gated`; one product for gate and up is Narang et al. (2021), "Do
Transformer Modifications Transfer Across Implementations and Applications?", arXiv:2102.11972.

Legend: ``F`` width of the hidden layer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels import gated
from memopt.kernels.serving import launched
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn

torch.library.define(
    "memopt::gated_packed", "(Tensor x, str activation, bool gate_last) -> Tensor"
)
torch.library.define(
    "memopt::gated_packed_backward",
    "(Tensor dy, Tensor x, str activation, bool gate_last, bool again) -> (Tensor, Tensor)",
)
GATED_PACKED = torch.ops.memopt.gated_packed.default
GATED_PACKED_BACKWARD = torch.ops.memopt.gated_packed_backward.default


def halves(x: Tensor, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, views of `(..., 2F)`.

    Raises:
        ConfigError: there are no two halves.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ConfigError(f"x is {tuple(x.shape)}: allowed is `(..., 2F)`, gate and up in a row")
    width = x.shape[-1] // 2
    first, second = x[..., :width], x[..., width:]
    return (second, first) if gate_last else (first, second)


def _plain(x: Tensor, activation: str, gate_last: bool) -> Results:
    """The activation of one half, times the other.

    Args:
        x: `(..., 2F)`.
        activation: one of `memopt.kernels.gated.ACTIVATIONS`.
        gate_last: whether the gate is the second half.

    Returns:
        `(..., F)`, of the same dtype, contiguous.

    Raises:
        ConfigError: the activation is not known, or the width is odd.
    """
    return gated.plain(*halves(x, gate_last), activation)


def _plain_backward(
    dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool
) -> Results:
    """Gradient of both halves, and the result once more.

    Args:
        dy: `(..., F)`.
        x: `(..., 2F)`.
        activation: one of `memopt.kernels.gated.ACTIVATIONS`.
        gate_last: whether the gate is the second half.
        again: whether the result is wanted.

    Returns:
        `(..., 2F)`, and `(..., F)` or, where it is not wanted, an empty tensor.

    Raises:
        ConfigError: the activation is not known, or the width is odd.
    """
    dgate, dup, y = gated.plain_backward(dy, *halves(x, gate_last), activation, again)
    return torch.cat((dup, dgate) if gate_last else (dgate, dup), -1), y


def _unwritten(x: Tensor, activation: str, gate_last: bool) -> Tensor:
    return gated.unwritten(*halves(x, gate_last), activation)


def unwritten_backward(
    dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool
) -> Results:
    """Room for what ``gated_packed_backward`` returns, of what it does not refuse."""
    gate, up = halves(x, gate_last)
    gated.check(gate, up, activation)
    return x.new_empty(x.shape), x.new_empty(gate.shape if again else 0)


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    x, ctx.activation, ctx.gate_last = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    run = _plain_backward if torch.is_grad_enabled() else GATED_PACKED_BACKWARD
    dx, _ = run(dy, x, ctx.activation, ctx.gate_last, False)
    return dx, None, None


torch.library.register_fake("memopt::gated_packed", _unwritten)
torch.library.register_fake("memopt::gated_packed_backward", unwritten_backward)
torch.library.register_autograd("memopt::gated_packed", _backward, setup_context=_save)


def _scratch(x: Tensor, activation: str, gate_last: bool) -> int:
    return gated.SPEC.scratch(*halves(x, gate_last), activation)


def _backward_scratch(dy: Tensor, x: Tensor, activation: str, gate_last: bool, again: bool) -> int:
    return gated.BACKWARD_SPEC.scratch(dy, *halves(x, gate_last), activation, again)


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Phi-3's, one with the gate last, a width of no power of two; then odd layouts."""
    draw = partial(drawn, dtype=dtype)
    yield draw(2, 16, 2 * 1024), "silu", False
    yield draw(32, 2 * 512), "gelu_tanh", True
    yield draw(16, 2 * 1536), "gelu", False
    yield draw(9, 2 * 999), "relu", True
    yield draw(16, 3, 2 * 128)[:, 1], "sigmoid", False
    yield draw(2 * 64, 24).t(), "relu_squared", False
    yield draw(2 * 64), "quick_gelu", True
    yield draw(3, 0), "silu", False


def _backward_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for number, (x, activation, gate_last) in enumerate(_samples(dtype)):
        dy = torch.randn(*x.shape[:-1], x.shape[-1] // 2).to(dtype)
        yield dy, x, activation, gate_last, number % 2 == 1


SPEC = KernelSpec(
    name="memopt::gated_packed",
    plain=_plain,
    launch=launched("triton_gated", "packed_forward"),
    scratch=_scratch,
    samples=_samples,
    source=f"{gated.SPEC.source}, arXiv:2102.11972",
)
BACKWARD_SPEC = KernelSpec(
    name="memopt::gated_packed_backward",
    plain=_plain_backward,
    launch=launched("triton_gated", "packed_backward"),
    scratch=_backward_scratch,
    samples=_backward_samples,
    source=gated.BACKWARD_SPEC.source,
)
SPECS = (SPEC, BACKWARD_SPEC)
for _spec in SPECS:
    _spec.implement()
