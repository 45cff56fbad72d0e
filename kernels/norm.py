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

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import KernelSpec, Results, drawn
from memopt.kernels.wide import wide, wide_bytes, wide_dtype

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


class Arguments(NamedTuple):
    """What ``norm`` takes, in the order of its schema.

    Attributes:
        x: `(..., H)`.
        residual: `(..., H)`, added first, or None.
        weight: `(H,)`, or None for ones.
        bias: `(H,)`, or None for zeros.
        eps: added to the variance.
        offset: added to the weight.
        centred: whether the mean is subtracted.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float
    centred: bool


class BackwardArguments(NamedTuple):
    """What ``norm_backward`` takes, in the order of its schema.

    Attributes:
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
    """

    dy: Tensor
    dtotal: Tensor | None
    total: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    offset: float
    wanted: Sequence[bool]
    again: bool


def _plain(*args: Any) -> Results:
    """The norm, the sum that it is of, and the statistics.

    Returns:
        `(..., H)` of ``x``'s dtype; the sum, of the same shape, empty without a residual; the
        means `(...)`, float32 or wider, empty where they are not subtracted; the reciprocal
        standard deviations `(...)`.
    """
    x, residual, weight, bias, eps, offset, centred = Arguments(*args)
    total = x if residual is None else x + residual
    z = wide(total)
    mean = z.mean(-1) if centred else z.new_empty(0)
    if centred:
        z = z - mean[..., None]
    rstd = (z.square().mean(-1) + eps).rsqrt()
    z = z * rstd[..., None]
    if weight is not None:  # not by a function, whose caller may hold what it has passed
        z = z * (weight.to(z.dtype) + offset)
    if bias is not None:
        z = z + bias.to(z.dtype)
    y = z.to(x.dtype)
    return y.contiguous(), x.new_empty(0) if residual is None else total.contiguous(), mean, rstd


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        normal = normal * (weight.to(normal.dtype) + offset)
    return normal if bias is None else normal + bias.to(normal.dtype)


def _plain_backward(*args: Any) -> Results:
    """Gradients of the sum, the weight and the bias, and the norm once more.

    Returns:
        Each in its input's dtype, and empty where it is not wanted.
    """
    dy, dtotal, total, weight, bias, mean, rstd, offset, wanted, again = BackwardArguments(*args)
    normal = wide(total)
    if mean.numel():
        normal = normal - mean[..., None]
    normal = normal * rstd[..., None]
    g = wide(dy)
    of_weight = _summed(g * normal, weight, wanted[0])
    of_bias = _summed(g, bias, wanted[1])
    y = _scaled(normal, weight, bias, offset).to(total.dtype) if again else total.new_empty(0)
    g = _scaled(g, weight, None, offset)
    dx = g - normal * (g * normal).mean(-1, keepdim=True)
    if mean.numel():
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd[..., None]
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(total.dtype).contiguous(), of_weight, of_bias, y.contiguous()


def _summed(t: Tensor, like: Tensor | None, wanted: bool) -> Tensor:
    """Over all rows, in the dtype of what it is the gradient of."""
    dtype = t.dtype if like is None else like.dtype
    if like is None or not wanted:
        return t.new_empty(0, dtype=dtype)
    return t.reshape(-1, t.shape[-1]).sum(0).to(dtype)


def unwritten(*args: Any) -> Results:
    """Room for what ``norm`` returns."""
    a = Arguments(*args)
    rows, dtype = a.x.shape[:-1], wide_dtype(a.x)
    return (
        a.x.new_empty(a.x.shape),
        a.x.new_empty(0 if a.residual is None else a.x.shape),
        a.x.new_empty(rows if a.centred else 0, dtype=dtype),
        a.x.new_empty(rows, dtype=dtype),
    )


def unwritten_backward(*args: Any) -> Results:
    """Room for what ``norm_backward`` returns."""
    a = BackwardArguments(*args)
    vectors = (
        a.rstd.new_empty(0) if like is None else like.new_empty(like.shape if on else 0)
        for on, like in zip(a.wanted, (a.weight, a.bias), strict=True)
    )
    whole = a.total.shape
    return a.total.new_empty(whole), *vectors, a.total.new_empty(whole if a.again else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    a = Arguments(*inputs)
    _, total, mean, rstd = output
    ctx.added, ctx.offset = a.residual is not None, a.offset
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.added else a.x, a.weight, a.bias, mean, rstd)


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if not ctx.added:
        dtotal = None
    if dy is None:
        dx, of_weight, of_bias = dtotal, None, None
    else:
        wanted = [*ctx.needs_input_grad[2:4]]
        run: Any = _plain_backward if torch.is_grad_enabled() else NORM_BACKWARD
        dx, of_weight, of_bias, _ = run(dy, dtotal, *ctx.saved_tensors, ctx.offset, wanted, False)
        of_weight, of_bias = of_weight if wanted[0] else None, of_bias if wanted[1] else None
    return dx, dx if ctx.added else None, of_weight, of_bias, None, None, None


torch.library.register_fake("memopt::norm", unwritten)
torch.library.register_fake("memopt::norm_backward", unwritten_backward)
torch.library.register_autograd("memopt::norm", _backward, setup_context=_save)


def _scratch(*args: Any) -> int:
    a = Arguments(*args)
    return copied_bytes(a.x, a.residual) if serves(a.x) else 3 * wide_bytes(a.x)


def _backward_scratch(*args: Any) -> int:
    a = BackwardArguments(*args)
    if not serves(a.dy):
        return 5 * wide_bytes(a.dy)
    width = size_hint(a.dy.shape[-1])
    programs: int = launched("triton_norm", "programs")(a.dy, size_hint(a.dy.numel()) // width)
    return programs * width * 4 * sum(a.wanted) + copied_bytes(a.dy, a.dtotal, a.total)


def _samples(dtype: torch.dtype, rows: int = 512) -> Iterator[Arguments]:
    """Llama's, Gemma's with a residual, layer norm, one with nothing, and odd sizes."""
    draw = partial(drawn, dtype=dtype)
    yield Arguments(draw(8, rows // 8, 1024), None, draw(1024), None, 1e-6, 0.0, False)
    yield Arguments(draw(rows, 512), draw(rows, 512), draw(512), None, 1e-6, 1.0, False)
    yield Arguments(draw(rows, 768), None, draw(768), draw(768), 1e-5, 0.0, True)
    shifted = draw(256, 512) + 3
    yield Arguments(shifted, draw(256, 512), draw(512), draw(512), 1e-5, 0.0, True)
    yield Arguments(draw(33, 64), None, None, None, 1e-6, 0.0, False)
    yield Arguments(draw(7, 333), draw(7, 333), draw(333), None, 1e-6, 0.0, False)
    yield Arguments(draw(16, 3, 128)[:, 1], None, draw(128), None, 1e-6, 0.0, False)


def _backward_samples(dtype: torch.dtype, rows: int = 512) -> Iterator[BackwardArguments]:
    for a in _samples(dtype, rows):
        _, total, mean, rstd = _plain(*a)
        dy, dtotal = torch.randn(2, *a.x.shape).to(dtype)
        added, wanted = a.residual is not None, [a.weight is not None, a.bias is not None]
        yield BackwardArguments(
            dy, dtotal if added else None, total if added else a.x, a.weight, a.bias, mean, rstd,
            a.offset, wanted, a.centred,
        )  # fmt: skip


SPEC = KernelSpec(
    name="memopt::norm",
    plain=_plain,
    launch=launched("triton_norm", "forward"),
    scratch=_scratch,
    samples=_samples,
    large=partial(_samples, rows=_LARGE),
    l2_share=1.5,  # every program reads the weight and the bias
    source="arXiv:1910.07467, arXiv:1607.06450, arXiv:2410.10989",
)
BACKWARD_SPEC = KernelSpec(
    name="memopt::norm_backward",
    plain=_plain_backward,
    launch=launched("triton_norm", "backward"),
    scratch=_backward_scratch,
    samples=_backward_samples,
    large=partial(_backward_samples, rows=_LARGE),
    source=SPEC.source,
)
SPECS = (SPEC, BACKWARD_SPEC)
for _spec in SPECS:
    _spec.implement()
