"""Softmax of logits with a scale, a softcap and an additive mask: one read and one write.

``y = softmax(softcap * tanh(scale * x / softcap) + mask)`` over the last dimension, without the
tanh where the softcap is 0. All in float32, rounded once. A row with nothing but minus infinity,
one with plus infinity, and one with NaN are NaN, as PyTorch has it.

Saved for the backward: ``y``, and with a softcap ``x``, from which the tangent is made again;
neither the mask nor scaled or capped logits.

Pays: on a GPU, where attention is written out, because scale, cap and mask take no pass of their
own; rows of up to ``ROW_ON_CHIP`` entries are read once, longer ones a second time. Does not: on
the CPU, whose loops Inductor fuses as well.

Sources: the one-pass statistics are those of Milakov and Gimelshein (2018), "Online normalizer
calculation for softmax", arXiv:1805.02867. The cap on the logits is Gemma 2's: Gemma Team (2024),
arXiv:2408.00118.

Legend: ``N`` rows, ``H`` entries of a row.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import own_bytes, wide, wide_bytes, wide_copy, wide_dtype

ROW_ON_CHIP = 16384

torch.library.define(
    "memopt::softmax", "(Tensor x, Tensor? mask, float scale, float softcap) -> Tensor"
)
torch.library.define(
    "memopt::softmax_backward",
    "(Tensor dy, Tensor y, Tensor? x, float scale, float softcap) -> Tensor",
)
SOFTMAX = torch.ops.memopt.softmax.default
SOFTMAX_BACKWARD = torch.ops.memopt.softmax_backward.default


def _plain(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Results:
    """The softmax.

    Args:
        x: `(..., H)`, float32 or wider, bfloat16 or float16.
        mask: added to the logits; of floating point, and of a shape that expands to that of
            ``x``; or None.
        scale: on ``x``.
        softcap: bound on the scaled logits; 0 for none.

    Returns:
        The shape and dtype of ``x``, contiguous.

    Raises:
        ConfigError: ``x`` has no dimensions; the mask is not of floating point, or does not
            expand.
    """
    check(x, mask)
    z = wide_copy(x).mul_(scale)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        z += mask
    return (z.softmax(-1).to(x.dtype),)


def _plain_backward(
    dy: Tensor, y: Tensor, x: Tensor | None, scale: float, softcap: float
) -> Results:
    """The gradient of ``x``.

    Args:
        dy: `(..., H)`, the gradient of the softmax.
        y: `(..., H)`, the softmax.
        x: `(..., H)`, what it is of; read with a softcap only, and may be None without.
        scale: as in the forward.
        softcap: as in the forward.

    Returns:
        The shape and dtype of ``y``, contiguous.

    Raises:
        ConfigError: there is a softcap, and no ``x``.
    """
    check_capped(x, softcap)
    g, p = wide(dy), wide(y)
    dz = p * (g - (g * p).sum(-1, keepdim=True))
    if x is not None and softcap:
        dz = dz * (1 - (wide(x) * (scale / softcap)).tanh().square())
    return ((dz * scale).to(y.dtype).contiguous(),)


def check(x: Tensor, mask: Tensor | None) -> None:
    """Raise ``ConfigError`` for what has no rows, and a mask that cannot be added to them."""
    if not x.dim():
        raise ConfigError("a tensor without dimensions has no rows: give it one, with x[None]")
    if mask is None:
        return
    if not mask.is_floating_point():
        raise ConfigError(
            f"the mask is {mask.dtype}: allowed is floating point, which is added; "
            "for a mask of bools, torch.where(mask, 0.0, -torch.inf)"
        )
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(mine not in (1, whole) for mine, whole in sizes):
        raise ConfigError(f"a mask {tuple(mask.shape)} does not expand to {tuple(x.shape)}")


def check_capped(x: Tensor | None, softcap: float) -> None:
    """Raise ``ConfigError`` where what the tangent is made from is missing."""
    if softcap and x is None:
        raise ConfigError(f"softcap={softcap!r}: the backward needs x, and has None")


def _unwritten(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    return x.new_empty(x.shape)


def _unwritten_backward(dy: Tensor, y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    x, mask, ctx.scale, ctx.softcap = inputs
    ctx.mask = None if mask is None else (mask.shape, mask.dtype)
    ctx.save_for_backward(output, x if ctx.softcap else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y, x = ctx.saved_tensors
    dx = dmask = None
    if ctx.needs_input_grad[0]:
        dx = _gradient(dy, y, x, ctx.scale, ctx.softcap)
    if ctx.needs_input_grad[1]:
        shape, dtype = ctx.mask
        dmask = _gradient(dy, y, None, 1.0, 0.0).sum_to_size(shape).to(dtype)
    return dx, dmask, None, None


def _gradient(*args: Any) -> Tensor:
    """By the operator, or by what can be differentiated once more."""
    result: Tensor = (
        _plain_backward(*args)[0] if torch.is_grad_enabled() else SOFTMAX_BACKWARD(*args)
    )
    return result


torch.library.register_fake("memopt::softmax", _unwritten)
torch.library.register_fake("memopt::softmax_backward", _unwritten_backward)
torch.library.register_autograd("memopt::softmax", _backward, setup_context=_save)


def _scratch(x: Tensor, *_: Any) -> int:
    if serves(x):
        return copied_bytes(x)
    return wide_bytes(x) * (1 if x.dtype == wide_dtype(x) else 2)


def _backward_scratch(
    dy: Tensor, y: Tensor, x: Tensor | None, scale: float, softcap: float
) -> int:
    if serves(dy):
        return copied_bytes(dy, y, x if softcap else None)
    if y.dtype == wide_dtype(y):
        return wide_bytes(y) * (2 if softcap else 1)
    return 5 * wide_bytes(y) - own_bytes(y) if softcap else 4 * wide_bytes(y)


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Attention with a causal mask, plain, with a cap; a long row, views, and odd sizes."""
    draw = partial(drawn, dtype=dtype)
    causal = torch.full((32, 512), -torch.inf, dtype=dtype).triu(480)
    padded = torch.zeros(2, 1, 1, 512, dtype=dtype)
    padded[1, ..., 300:] = -torch.inf
    yield draw(2, 4, 32, 512), causal, 0.125, 0.0
    yield draw(64, 1024), None, 1.0, 0.0
    yield draw(2, 4, 32, 512), causal + padded, 2.0, 5.0
    yield draw(3, ROW_ON_CHIP + 4096), None, 1.0, 0.0
    yield draw(2, 3, 20, 333), draw(2, 1, 20, 333), 1.0, 0.0
    yield draw(48, 3, 256)[:, 1], draw(48, 1), -0.5, 2.0
    yield draw(4, 33, 64), draw(64, 4).t()[:, None], 1.0, 0.0
    yield draw(256, 33).t(), None, 1.0, 0.0


def _backward_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for sample in _samples(dtype):
        x, _, scale, softcap = sample
        (y,) = _plain(*sample)
        yield torch.randn(x.shape).to(dtype), y, x if softcap else None, scale, softcap


SPEC = KernelSpec(
    name="memopt::softmax",
    plain=_plain,
    launch=launched("triton_softmax", "forward"),
    scratch=_scratch,
    samples=_samples,
    l2_share=1.5,  # a mask that heads share, and the second read of a long row
    source="arXiv:1805.02867, arXiv:2408.00118",
)
BACKWARD_SPEC = KernelSpec(
    name="memopt::softmax_backward",
    plain=_plain_backward,
    launch=launched("triton_softmax", "backward"),
    scratch=_backward_scratch,
    samples=_backward_samples,
    l2_share=5 / 3,  # the second reads of a long row
    source=SPEC.source,
)
SPECS = (SPEC, BACKWARD_SPEC)
for _spec in SPECS:
    _spec.implement()
