"""Gated activations of feed-forward layers: SwiGLU, GeGLU, ReGLU and kin, in one pass.

``y = act(gate) * up``, in float32, rounded once, whatever the spelling that it stands for rounds
in between. `memopt.kernels.gated_packed` takes both from one tensor.

Saved for the backward: gate and up, which the layers before them produce anyway. The activation is
computed again in the same pass as the gradients, and with it ``y`` where it is asked for, so that
the product behind it need not hold it.

Pays: on a GPU, where each value is read and written once, and wherever ``act(gate)`` and ``y``
would be saved. Does not: on the CPU, whose loops Inductor fuses as well.

Sources: Shazeer (2020), "GLU Variants Improve Transformer", arXiv:2002.05202; the squared ReLU is
So et al. (2021), "Primer", arXiv:2109.08668; GELU and its two approximations are Hendrycks and
Gimpel (2016), arXiv:1606.08415. A backward that recomputes the activation is Hsu et al. (2024),
"Liger Kernel", arXiv:2410.10989.

Legend: ``F`` width of the hidden layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.inputs import one_of
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import own_bytes, wide, wide_bytes, wide_dtype

_TANH = 2 * math.sqrt(2 / math.pi)
# x * sigmoid(a x + b x^3), as 1 + tanh(z) is 2 sigmoid(2 z).
SIGMOIDAL: Mapping[str, tuple[float, float]] = {
    "silu": (1.0, 0.0),
    "gelu_tanh": (_TANH, _TANH * 0.044715),
    "quick_gelu": (1.702, 0.0),
}
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "relu_squared": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
ACTIVATIONS = tuple(_FUNCTIONS)

# Beyond it the slope of a sigmoid is 0 in float64 too, and a cube may overflow.
_FAR = 1e4

torch.library.define("memopt::gated", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "memopt::gated_backward",
    "(Tensor dy, Tensor gate, Tensor up, str activation, bool again) -> (Tensor, Tensor, Tensor)",
)
GATED = torch.ops.memopt.gated.default
GATED_BACKWARD = torch.ops.memopt.gated_backward.default


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Refuse what the kernels do not compute.

    Raises:
        ConfigError: the activation is not known, or gate and up differ in shape or dtype.
    """
    one_of("activation", activation, *ACTIVATIONS)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ConfigError(
            f"gate is {tuple(gate.shape)} of {gate.dtype} and up {tuple(up.shape)} of "
            f"{up.dtype}: allowed is one shape and one dtype; expand or cast before"
        )


def _slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative. What is no number keeps a ReLU's gradient, as in PyTorch."""
    if activation in SIGMOIDAL:
        linear, cubic = SIGMOIDAL[activation]
        inner, near = linear * x, x.clamp(-_FAR, _FAR)
        rise = linear * near
        if cubic:
            inner, rise = inner + cubic * x**3, rise + 3 * cubic * near**3
        # sigmoid(-x) is 1 - sigmoid(x) without cancellation.
        below = torch.sigmoid(inner)
        return below + below * torch.sigmoid(-inner) * rise
    if activation == "gelu":
        density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    if activation == "sigmoid":
        return torch.sigmoid(x) * torch.sigmoid(-x)
    return 2 * F.relu(x) if activation == "relu_squared" else (~(x <= 0)).to(x.dtype)


def plain(gate: Tensor, up: Tensor, activation: str) -> Results:
    """The activation of the gate, times up.

    Args:
        gate: `(..., F)`.
        up: the same shape and dtype.
        activation: one of ``ACTIVATIONS``.

    Returns:
        `(..., F)`, of their dtype, contiguous.

    Raises:
        ConfigError: the activation is not known, or gate and up differ in shape or dtype.
    """
    check(gate, up, activation)
    y = _FUNCTIONS[activation](wide(gate)) * wide(up)
    return (y.to(gate.dtype).contiguous(),)


def plain_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> Results:
    """Gradients of gate and up, and the result once more.

    Args:
        dy: `(..., F)`.
        gate: `(..., F)`.
        up: `(..., F)`.
        activation: one of ``ACTIVATIONS``.
        again: whether the result is wanted.

    Returns:
        Each `(..., F)` and contiguous; the result is empty where it is not wanted.

    Raises:
        ConfigError: the activation is not known, or gate and up differ in shape or dtype.
    """
    check(gate, up, activation)
    dtype = gate.dtype
    dy, gate, up = map(wide, (dy, gate, up))
    value = _FUNCTIONS[activation](gate)
    y = (value * up).to(dtype).contiguous() if again else gate.new_empty(0, dtype=dtype)
    dup = (dy * value).to(dtype).contiguous()
    del value
    # The slope first: it may be 0 where the product of the other two overflows.
    dgate = _slope(gate, activation) * dy * up
    return dgate.to(dtype).contiguous(), dup, y


def unwritten(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Room for what ``gated`` returns, of what it does not refuse."""
    check(gate, up, activation)
    return gate.new_empty(gate.shape)


def unwritten_backward(
    dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool
) -> Results:
    """Room for what ``gated_backward`` returns, of what it does not refuse."""
    check(gate, up, activation)
    shapes = (gate.shape, gate.shape, gate.shape if again else 0)
    return tuple(gate.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    run = plain_backward if torch.is_grad_enabled() else GATED_BACKWARD
    dgate, dup, _ = run(dy, gate, up, ctx.activation, False)
    return dgate, dup, None


torch.library.register_fake("memopt::gated", unwritten)
torch.library.register_fake("memopt::gated_backward", unwritten_backward)
torch.library.register_autograd("memopt::gated", _backward, setup_context=_save)


def _scratch(gate: Tensor, up: Tensor, activation: str) -> int:
    return copied_bytes(gate, up) if serves(gate) else _plain_bytes(gate, casts=1, steps=2)


def _backward_scratch(dy: Tensor, gate: Tensor, up: Tensor, activation: str, again: bool) -> int:
    return copied_bytes(dy, gate, up) if serves(gate) else _plain_bytes(gate, casts=3, steps=6)


def _plain_bytes(x: Tensor, *, casts: int, steps: int) -> int:
    """Of inputs in float32 and of steps between, where the last of them becomes a result."""
    tensors = steps if x.dtype == wide_dtype(x) else steps + casts
    return tensors * wide_bytes(x) - own_bytes(x)


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Llama's, two halves of one tensor, BERT's GELU; then every activation, and odd layouts."""
    draw = partial(drawn, dtype=dtype)
    yield draw(4, 16, 512), draw(4, 16, 512), "silu"
    yield *draw(2, 16, 2048).chunk(2, -1), "gelu_tanh"
    yield draw(32, 1024), draw(32, 1024), "gelu"
    yield draw(33, 64), draw(33, 64), "relu"
    yield draw(7, 333), draw(7, 333), "sigmoid"
    yield *draw(16, 2, 640).unbind(1), "relu_squared"
    yield draw(32, 96), draw(96, 32).t(), "quick_gelu"
    yield *draw(9, 2 * 999).chunk(2, -1), "silu"
    yield draw(0, 64), draw(0, 64), "gelu"


def _backward_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for number, (gate, up, activation) in enumerate(_samples(dtype)):
        yield torch.randn(gate.shape).to(dtype), gate, up, activation, number % 2 == 1


SPEC = KernelSpec(
    name="memopt::gated",
    plain=plain,
    launch=launched("triton_gated", "forward"),
    scratch=_scratch,
    samples=_samples,
    source="arXiv:2002.05202, arXiv:2109.08668, arXiv:1606.08415",
)
BACKWARD_SPEC = KernelSpec(
    name="memopt::gated_backward",
    plain=plain_backward,
    launch=launched("triton_gated", "backward"),
    scratch=_backward_scratch,
    samples=_backward_samples,
    source="arXiv:2410.10989",
)
SPECS = (SPEC, BACKWARD_SPEC)
for _spec in SPECS:
    _spec.implement()
