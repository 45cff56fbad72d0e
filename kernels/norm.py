"""Layer norm and RMS norm, also of a sum that is returned: one pass over each row.

``y = (s - mean(s)) / sqrt(var(s) + eps) * (offset + weight) + bias`` with ``s = x + residual``.
RMS norm leaves the mean out and takes the mean square for the variance; Gemma's has an offset of
1. All in float32, rounded once, whatever the spelling that it stands for rounds in between.

Saved for the backward: ``s``, which a residual stream holds anyway, and four bytes a row (eight
for layer norm). The backward can make ``y`` once more in the same pass, so that the product
behind a norm need not hold it.

Pays: on a GPU, where a residual add and its norm read and write each value once, and where the
normalised values would be saved. Does not: on the CPU, whose loops Inductor fuses as well.

Sources: Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450; Zhang and Sennrich
(2019), "Root Mean Square Layer Normalization", arXiv:1910.07467. One fused operator that saves
the statistics alone is Apex's; the fused residual add is Hsu et al. (2024), "Liger Kernel",
arXiv:2410.10989.

Legend: ``N`` rows, ``H`` entries of a row.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import serves
from memopt.kernels.spec import Arguments, KernelSpec, Results

# A program keeps rows in registers, and beside them the sums of the weight's gradient.
MOST_WIDTH = 8192
_LARGE = 32768  # rows, whose bytes no cache holds

torch.library.define(
    "memopt::norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, "
    "bool centred) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "memopt::norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, float offset, bool[2] wanted, bool again) -> (Tensor, Tensor, Tensor, Tensor)",
)
NORM = torch.ops.memopt.norm.default
NORM_BACKWARD = torch.ops.memopt.norm_backward.default


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _plain(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> Results:
    """The norm, the sum that it is of, and the statistics.

    Args:
        x: `(..., H)`.
        residual: `(..., H)`, added first, or None.
        weight: `(H,)`, or None for ones.
        bias: `(H,)`, or None for zeros.
        eps: added to the variance.
        offset: added to the weight.
        centred: whether the mean is subtracted.

    Returns:
        `(..., H)` of ``x``'s dtype; the sum, of the same shape, empty without a residual; the
        means `(...)`, float32 or wider, empty where they are not subtracted; the reciprocal
        standard deviations `(...)`.
    """
    total = x if residual is None else x + residual
    z = _wide(total)
    mean = z.mean(-1) if centred else z.new_empty(0)
    if centred:
        z = z - mean[..., None]
    rstd = (z.square().mean(-1) + eps).rsqrt()
    y = _scaled(z * rstd[..., None], weight, bias, offset).to(x.dtype)
    return y.contiguous(), x.new_empty(0) if residual is None else total.contiguous(), mean, rstd


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        normal = normal * (weight.to(normal.dtype) + offset)
    return normal if bias is None else normal + bias.to(normal.dtype)


def _plain_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    wanted: list[bool],
    again: bool,
) -> Results:
    """Gradients of the sum, the weight and the bias, and the norm once more.

    Args:
        dy: `(..., H)`, the norm's gradient.
        dtotal: `(..., H)`, another gradient of the sum, or None.
        total: `(..., H)`, the sum, or ``x`` where nothing was added.
        weight: `(H,)`, or None.
        bias: `(H,)`, or None.
        mean: as the forward returns it: empty where it was not subtracted.
        rstd: as the forward returns it.
        offset: added to the weight.
        wanted: whether the gradients of weight and bias are.
        again: whether the norm is.

    Returns:
        Each in its input's dtype, and empty where it is not wanted.
    """
    normal = _wide(total)
    if mean.numel():
        normal = normal - mean[..., None]
    normal = normal * rstd[..., None]
    g = _wide(dy)
    of_weight, of_bias = (
        (
            of.reshape(-1, of.shape[-1]).sum(0).to(like.dtype)
            if on
            else g.new_empty(0, dtype=like.dtype)
        )
        if like is not None
        else g.new_empty(0)
        for on, like, of in zip(wanted, (weight, bias), (g * normal, g), strict=True)
    )
    y = _scaled(normal, weight, bias, offset).to(total.dtype) if again else total.new_empty(0)
    g = _scaled(g, weight, None, offset)
    dx = g - normal * (g * normal).mean(-1, keepdim=True)
    if mean.numel():
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd[..., None]
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(total.dtype).contiguous(), of_weight, of_bias, y.contiguous()


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> Results:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(rows if centred else 0, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _fake_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offset: float,
    wanted: list[bool],
    again: bool,
) -> Results:
    vectors = (
        total.new_empty(0, dtype=rstd.dtype)
        if like is None
        else like.new_empty(like.shape if on else 0)
        for on, like in zip(wanted, (weight, bias), strict=True)
    )
    return total.new_empty(total.shape), *vectors, total.new_empty(total.shape if again else 0)


def _save(ctx: Any, inputs: Arguments, output: Results) -> None:
    x, residual, weight, bias, _, offset, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
    ctx.offset, ctx.added = offset, residual is not None


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if not ctx.added:
        dtotal = None
    if dy is None:
        dx, of_weight, of_bias = dtotal, None, None
    else:
        wanted = [*ctx.needs_input_grad[2:4]]
        run: Any = _plain_backward if torch.is_grad_enabled() else NORM_BACKWARD
        dx, of_weight, of_bias, _ = run(
            dy, dtotal, total, weight, bias, mean, rstd, ctx.offset, wanted, False
        )
        of_weight, of_bias = of_weight if wanted[0] else None, of_bias if wanted[1] else None
    return dx, dx if ctx.added else None, of_weight, of_bias, None, None, None


torch.library.register_fake("memopt::norm", _fake)
torch.library.register_fake("memopt::norm_backward", _fake_backward)
torch.library.register_autograd("memopt::norm", _backward, setup_context=_save)


def scratch_bytes(x: Tensor, residual: Tensor | None, *_: Any) -> int:
    """What ``norm`` allocates besides its results, in bytes, at most."""
    if not serves(x):
        return 3 * _wide_bytes(x)
    return copied_bytes(*(t for t in (x, residual) if t is not None))


def backward_scratch_bytes(dy: Tensor, dtotal: Tensor | None, total: Tensor, *args: Any) -> int:
    """What ``norm_backward`` allocates besides its results, in bytes, at most."""
    if not serves(dy):
        return 5 * _wide_bytes(dy)
    from memopt.kernels import triton_norm  # here, because Triton is optional

    width = size_hint(dy.shape[-1])
    wanted: int = sum(args[5])
    parts = triton_norm.programs(dy, size_hint(dy.numel()) // width) * width * 4 * wanted
    return parts + copied_bytes(*(t for t in (dy, dtotal, total) if t is not None))


def _wide_bytes(x: Tensor) -> int:
    return size_hint(x.numel()) * max(4, x.element_size())


def _launch(*args: Any) -> Results:
    from memopt.kernels import triton_norm

    return triton_norm.forward(*args)


def _launch_backward(*args: Any) -> Results:
    from memopt.kernels import triton_norm

    return triton_norm.backward(*args)


def _samples(dtype: torch.dtype, rows: int = 512) -> Iterator[Arguments]:
    """Llama's, Gemma's with a residual, layer norm, one with nothing, and odd sizes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    yield draw(8, rows // 8, 1024), None, draw(1024), None, 1e-6, 0.0, False
    yield draw(rows, 512), draw(rows, 512), draw(512), None, 1e-6, 1.0, False
    yield draw(rows, 768), None, draw(768), draw(768), 1e-5, 0.0, True
    yield draw(256, 512) + 3, draw(256, 512), draw(512), draw(512), 1e-5, 0.0, True
    yield draw(33, 64), None, None, None, 1e-6, 0.0, False
    yield draw(7, 333), draw(7, 333), draw(333), None, 1e-6, 0.0, False
    yield draw(16, 3, 128)[:, 1], None, draw(128), None, 1e-6, 0.0, False


def _backward_samples(dtype: torch.dtype, rows: int = 512) -> Iterator[Arguments]:
    for sample in _samples(dtype, rows):
        x, residual, weight, bias, _, offset, centred = sample
        _, total, mean, rstd = _plain(*sample)
        dy, dtotal = torch.randn(2, *x.shape).to(dtype)
        wanted = [weight is not None, bias is not None]
        shared = (
            x if residual is None else total, weight, bias, mean, rstd, offset, wanted
        )  # fmt: skip
        yield dy, None if residual is None else dtotal, *shared, centred


SPEC = KernelSpec(
    name="memopt::norm",
    plain=_plain,
    launch=_launch,
    samples=_samples,
    large=functools.partial(_samples, rows=_LARGE),
    l2_share=1.5,  # every program reads the weight and the bias
    source="arXiv:1910.07467, arXiv:1607.06450, arXiv:2410.10989",
)
BACKWARD_SPEC = KernelSpec(
    name="memopt::norm_backward",
    plain=_plain_backward,
    launch=_launch_backward,
    samples=_backward_samples,
    large=functools.partial(_backward_samples, rows=_LARGE),
    source=SPEC.source,
)
SPECS = (SPEC, BACKWARD_SPEC)
for _spec in SPECS:
    _spec.implement()
