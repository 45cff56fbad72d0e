"""Numbers of 8 or 4 bits with a scale for each group of a row, and back.

The last dimension is cut into groups; the last one of a row may be shorter. With codes from 0:

* symmetric: ``x = scale * (code - 2**(bits - 1))``, ``scale = max|x| / (2**(bits - 1) - 1)``;
  code 0 stands for nothing, and 0 comes back as 0;
* asymmetric: ``x = zero + scale * code``, ``scale = (max(x) - min(x)) / (2**bits - 1)``, where
  the zero point is the group's smallest value, so that it comes back as it was: a ReLU's zeros
  do, and all of a group of equal values.

Codes are rounded to nearest, ties to even. A number comes back within ``(1/2 + 2**-14) * scale``
and a unit in the last place of its dtype: half a step, and what float32 rounds off on the way
there (three times) and back (once), at up to 255 steps.

A scale is at least the smallest normal float32 number, so that it can be divided by; so a group
of zeros comes back as zeros. A group that holds a NaN or an infinity has the scale NaN, codes of
0, and comes back as NaN, all of it. So does one that float32 might not hold on the way back:
symmetric with a number of 2**127 or more, or asymmetric with numbers so far apart.

Two codes of 4 bits share a byte, the earlier one in the lower half; a row of odd length ends in
a half that is 0.

Pays: for saved activations, a half or a quarter of bfloat16's bytes, and four bytes (eight) a
group. It changes numbers: the gradients are those of the rounded activations.

Sources: groups with a scale and a smallest value are ActNN's: Chen et al. (2021), "ActNN: reducing
training memory footprint via 2-bit activation compressed training", arXiv:2104.14129. Symmetric
groups: Dettmers et al. (2022), "8-bit optimizers via block-wise quantization", arXiv:2110.02861.

Legend: ``H`` entries of a row, ``G = ceil(H / group)`` groups, ``B = ceil(H * bits / 8)`` bytes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import wide_dtype

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_SMALLEST_SCALE = 2.0**-126

torch.library.define(
    "memopt::quantise",
    "(Tensor x, int bits, int group, bool symmetric) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "memopt::dequantise",
    "(Tensor packed, Tensor scale, Tensor zero, SymInt[] shape, ScalarType dtype, int bits, "
    "int group) -> Tensor",
)
QUANTISE = torch.ops.memopt.quantise.default
DEQUANTISE = torch.ops.memopt.dequantise.default


def packed_width(width: Any, bits: int) -> Any:
    """``B``, a number or a symbol."""
    return (width * bits + 7) // 8


def groups_of(width: Any, group: int) -> Any:
    """``G``, a number or a symbol."""
    return (width + group - 1) // group


def _quantise(x: Tensor, bits: int, group: int, symmetric: bool) -> Results:
    """Codes, scales and zero points.

    Args:
        x: `(..., H)`, float32 or wider, bfloat16 or float16.
        bits: 8 or 4.
        group: entries of a group, a power of two from 16 to 1024.
        symmetric: whether the zero points are left out.

    Returns:
        `(..., B)`, uint8; `(..., G)`, float32 or wider; the same, or empty if symmetric.

    Raises:
        ConfigError: for other bits and groups, and a tensor without dimensions.
    """
    check(x.dim(), bits, group)
    if not x.numel():
        return unwritten(x, bits, group, symmetric)
    z = grouped(x, group, wide_dtype(x))
    low, high = z.aminmax(dim=-1)
    if symmetric:
        scale = step_of(torch.maximum(-low, high), 2 ** (bits - 1) - 1)
        z.mul_(scale.reciprocal()[..., None]).round_().add_(2 ** (bits - 1))
    else:
        scale = step_of(high - low, 2**bits - 1)
        low.masked_fill_(scale.isnan(), torch.nan)
        z.sub_(low[..., None]).mul_(scale.reciprocal()[..., None]).round_()
    codes = z.nan_to_num_(0.0).to(torch.uint8).flatten(-2)[..., : x.shape[-1]]
    packed = (_halves(codes) if bits == 4 else codes).contiguous()
    return packed, scale, z.new_empty(0) if symmetric else low


def step_of(span: Tensor, steps: float) -> Tensor:
    """The step of so many that cover a span; NaN where it is too wide, or NaN."""
    scale = (span / steps).clamp_(min=_SMALLEST_SCALE)
    return scale.masked_fill_(~(span <= torch.finfo(span.dtype).max / 2), torch.nan)


def grouped(t: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A copy `(..., G, group)`; the last group is filled up with the row's last entry."""
    *rows, width = t.shape
    z = t.new_empty(*rows, groups_of(width, group) * group, dtype=dtype)
    z[..., :width] = t
    z[..., width:] = t[..., -1:]
    return z.view(*rows, -1, group)


def _halves(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte."""
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _dequantise(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    bits: int,
    group: int,
) -> Results:
    """Numbers from codes.

    Args:
        packed: `(..., B)`, uint8.
        scale: `(..., G)`, float32 or wider.
        zero: the same, or empty if symmetric.
        shape: `(..., H)`.
        dtype: of the result.
        bits: 8 or 4.
        group: entries of a group.

    Returns:
        Of this shape and dtype, contiguous.

    Raises:
        ConfigError: for other bits and groups, and codes or scales of another shape.
    """
    check_packed(packed, scale, zero, shape, bits, group)
    if not packed.numel():
        return (packed.new_empty(shape, dtype=dtype),)
    z = grouped(_whole(packed, shape[-1]) if bits == 4 else packed, group, scale.dtype)
    if zero.numel():
        z.mul_(scale[..., None]).add_(zero[..., None])
    else:
        z.sub_(2 ** (bits - 1)).mul_(scale[..., None])
    return (z.flatten(-2)[..., : shape[-1]].to(dtype).contiguous(),)


def _whole(packed: Tensor, width: int) -> Tensor:
    """Codes of 4 bits, a byte each."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :width]


def check(dimensions: int, bits: int, group: int) -> None:
    """Raise ``ConfigError`` for what cannot be quantised."""
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits!r}: allowed is 8 or 4")
    if group not in GROUPS:
        raise ConfigError(f"group={group!r}: allowed is a power of two from 16 to 1024")
    if not dimensions:
        raise ConfigError("a tensor without dimensions has no groups: give it one, with x[None]")


def check_packed(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: list[int], bits: int, group: int
) -> None:
    """Raise ``ConfigError`` for codes, scales and zero points that are not of this shape."""
    check(len(shape), bits, group)
    due = (*shape[:-1], packed_width(shape[-1], bits))
    if packed.dtype != torch.uint8 or packed.shape != due:
        raise ConfigError(
            f"the codes are {packed.dtype}, {tuple(packed.shape)}: "
            f"{tuple(shape)} in {bits} bits takes torch.uint8, {due}"
        )
    due = (*shape[:-1], groups_of(shape[-1], group))
    if scale.shape != due or zero.shape not in (due, (0,)):
        raise ConfigError(
            f"the scales are {tuple(scale.shape)} and the zero points {tuple(zero.shape)}: "
            f"{tuple(shape)} in groups of {group} takes {due}, or (0,) for no zero points"
        )


def unwritten(x: Tensor, bits: int, group: int, symmetric: bool) -> Results:
    """Room for what ``quantise`` returns, of what it does not refuse."""
    check(x.dim(), bits, group)
    rows, width = x.shape[:-1], x.shape[-1]
    scales, dtype = (*rows, groups_of(width, group)), wide_dtype(x)
    return (
        x.new_empty((*rows, packed_width(width, bits)), dtype=torch.uint8),
        x.new_empty(scales, dtype=dtype),
        x.new_empty(0 if symmetric else scales, dtype=dtype),
    )


def _unwritten_numbers(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: list[int], dtype: torch.dtype, *_: Any
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


torch.library.register_fake("memopt::quantise", unwritten)
torch.library.register_fake("memopt::dequantise", _unwritten_numbers)


def _scratch(x: Tensor, bits: int, group: int, symmetric: bool) -> int:
    return copied_bytes(x) if serves(x) else plain_scratch(x, bits, group, symmetric)


def plain_scratch(x: Tensor, bits: int, group: int, symmetric: bool) -> int:
    """Bytes that the operators of ``quantise`` allocate besides its results, without a kernel."""
    width, wide = size_hint(x.shape[-1]), wide_dtype(x).itemsize
    rows = size_hint(x.numel()) // max(1, width)
    groups: int = rows * groups_of(width, group)
    codes = 0 if bits == 8 and width % group == 0 else groups * group
    halves = rows * packed_width(width, 4) if bits == 4 else 0
    padded = rows * (width + 1) if bits == 4 and width % 2 else 0
    return groups * (group + (2 if symmetric else 1)) * wide + codes + halves + padded


def _dequantise_scratch(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    shape: list[Any],
    dtype: torch.dtype,
    bits: int,
    group: int,
) -> int:
    return 0 if serves(packed) else plain_dequantise_scratch(scale, shape, dtype, bits, group)


def plain_dequantise_scratch(
    scale: Tensor, shape: list[Any], dtype: torch.dtype, bits: int, group: int
) -> int:
    """The same of ``dequantise``."""
    entries = math.prod(size_hint(size) for size in shape)
    grouped = size_hint(scale.numel()) * group * scale.element_size()
    is_result = dtype == scale.dtype and size_hint(shape[-1]) % group == 0
    if is_result:
        return entries if bits == 4 else 0
    return grouped


def _launch_dequantise(packed: Tensor, scale: Tensor, *rest: Any) -> Results:
    run: Callable[..., Results] = launched("triton_quantise", "dequantise")
    if scale.dtype == torch.float64:  # the kernel computes in float32
        run = _dequantise
    return run(packed, scale, *rest)


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """The usual groups, the smallest and the largest, views, and rows that end within one."""
    draw = partial(drawn, dtype=dtype)
    yield draw(64, 1024), 8, 128, True
    yield draw(8, 16, 512), 8, 64, False
    yield draw(64, 1024), 4, 32, False
    yield draw(64, 1024) * 1e-3, 4, 128, True
    yield draw(32, 2048).clamp(min=0), 8, 1024, False
    yield draw(64, 1024) + 5, 8, 16, True
    yield draw(48, 3, 256)[:, 1], 4, 64, False
    yield draw(256, 64).t(), 8, 128, True
    yield draw(33, 333), 4, 128, True
    yield draw(34, 500), 8, 64, False


def _dequantise_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for sample in _samples(dtype):
        x, bits, group, _ = sample
        yield *_quantise(*sample), list(x.shape), dtype, bits, group


SPEC = KernelSpec(
    name="memopt::quantise",
    plain=_quantise,
    launch=launched("triton_quantise", "quantise"),
    scratch=_scratch,
    samples=_samples,
    source="arXiv:2104.14129, arXiv:2110.02861",
)
DEQUANTISE_SPEC = KernelSpec(
    name="memopt::dequantise",
    plain=_dequantise,
    launch=_launch_dequantise,
    scratch=_dequantise_scratch,
    samples=_dequantise_samples,
    source=SPEC.source,
)
SPECS = (SPEC, DEQUANTISE_SPEC)
for _spec in SPECS:
    _spec.implement()
