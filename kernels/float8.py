"""Numbers of 8 bits that float, with a scale for each group of a row, and back.

``x = scale * code`` with codes of e4m3 (four bits of exponent, three of mantissa) and ``scale =
max|x| / 448``, so that a group's largest number is the largest code. A number comes back within
``2**-4`` of itself, or within ``2**-10 * scale`` where that is more. Groups that hold a NaN or an
infinity come back as NaN.

Pays: as 8 bits of `memopt.kernels.quantise`, and where a group's numbers differ by orders of
magnitude: small ones beside a large one keep their digits. Does not: where they do not; of normal
numbers the error is about three times that of integers.

Source: the format is that of Micikevicius et al. (2022), "FP8 formats for deep learning",
arXiv:2209.05433.

Legend: as in `memopt.kernels.quantise`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memopt.kernels.quantise import grouped, step_of
from memopt.kernels.wide import wide_dtype

LARGEST = 448.0
_FORMAT = torch.float8_e4m3fn


def to_float8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales.

    Args:
        x: `(..., H)`, float32 or wider, bfloat16 or float16.
        group: entries of a group, a power of two from 16 to 1024.

    Returns:
        `(..., H)`, uint8; `(..., G)`, float32 or wider.
    """
    z = grouped(x, group, wide_dtype(x))
    low, high = z.aminmax(dim=-1)
    scale = step_of(torch.maximum(-low, high), LARGEST)
    z.mul_(scale.reciprocal()[..., None])
    return z.to(_FORMAT).view(torch.uint8).flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def from_float8(
    codes: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype, group: int
) -> Tensor:
    """Numbers from codes.

    Args:
        codes: `(..., H)`, uint8.
        scale: `(..., G)`, float32 or wider.
        shape: `(..., H)`.
        dtype: of the result.
        group: entries of a group.

    Returns:
        Of this shape and dtype, contiguous.
    """
    if not codes.numel():
        return codes.new_empty(shape, dtype=dtype)
    z = grouped(codes.view(_FORMAT), group, scale.dtype).mul_(scale[..., None])
    return z.flatten(-2)[..., : shape[-1]].to(dtype).contiguous()
