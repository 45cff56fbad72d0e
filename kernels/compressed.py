"""A tensor as codes of 8 or 4 bits and their scales, in one buffer, and back.

What ``memopt.kernels.quantise`` returns as several tensors lies in one, so that it is held as one:
all codes, then all scales, then, of 4 bits, all zero points.

Pays and does not: as `memopt.kernels.quantise`.

Legend: as there; ``n`` bytes of the buffer.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels import quantise
from memopt.kernels.quantise import DEQUANTISE, QUANTISE, groups_of, packed_width
from memopt.kernels.wide import wide_dtype

torch.library.define("memopt::compress", "(Tensor x, int bits, int group) -> Tensor")
torch.library.define(
    "memopt::decompress",
    "(Tensor kept, SymInt[] shape, ScalarType dtype, int bits, int group) -> Tensor",
)
COMPRESS = torch.ops.memopt.compress.default
DECOMPRESS = torch.ops.memopt.decompress.default
_ALIGNMENT = 16


def is_symmetric(bits: int) -> bool:
    """Whether 0 comes back as 0: codes of 4 bits are too few to spare one."""
    return bits == 8


def compressed_bytes(shape: Sequence[int], dtype: torch.dtype, bits: int, group: int) -> int:
    """``n``."""
    *_, (end, _, _) = _layout(shape, dtype, bits, group)
    return end


def _layout(
    shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> list[tuple[int, torch.dtype, tuple[int, ...]]]:
    """Of each part the byte at which it ends, its dtype and its shape."""
    *rows, width = shape
    wide = wide_dtype(torch.empty(0, dtype=dtype))
    scales = (*rows, groups_of(width, group))
    parts = [(torch.uint8, (*rows, packed_width(width, bits))), (wide, scales)]
    if not is_symmetric(bits):
        parts.append((wide, scales))
    end, found = 0, []
    for own, size in parts:
        end = -(-end // _ALIGNMENT) * _ALIGNMENT + math.prod(size) * own.itemsize
        found.append((end, own, size))
    return found


def _parts(
    kept: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the codes, the scales and the zero points; the last empty where there are none."""
    views = [
        kept[end - math.prod(size) * own.itemsize : end].view(own).view(size)
        for end, own, size in _layout(shape, dtype, bits, group)
    ]
    codes, scale, *zero = views
    return codes, scale, zero[0] if zero else scale.new_empty(0)


@torch.library.impl("memopt::compress", "default")
def _compress(x: Tensor, bits: int, group: int) -> Tensor:
    """The buffer.

    Args:
        x: `(..., H)`, float32 or wider, bfloat16 or float16.
        bits: 8 or 4.
        group: entries of a group, a power of two from 16 to 1024.

    Returns:
        `(n,)`, uint8.

    Raises:
        ConfigError: for other bits and groups, and a tensor without dimensions.
    """
    own = QUANTISE(x, bits, group, is_symmetric(bits))
    kept = _room(x, bits, group)
    ends = [0, *(end for end, _, _ in _layout(x.shape, x.dtype, bits, group))]
    for end in ends[:-1]:
        kept[end : end + _ALIGNMENT].zero_()  # equal values, equal bytes
    for part, made in zip(_parts(kept, x.shape, x.dtype, bits, group), own, strict=True):
        part.copy_(made)
    return kept


@torch.library.impl("memopt::decompress", "default")
def _decompress(
    kept: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> Tensor:
    """Numbers from the buffer.

    Args:
        kept: `(n,)`, uint8.
        shape: `(..., H)`.
        dtype: of what was compressed.
        bits: 8 or 4.
        group: entries of a group.

    Returns:
        Of this shape and dtype, contiguous.
    """
    parts = _parts(kept, shape, dtype, bits, group)
    x: Tensor = DEQUANTISE(*parts, list(shape), dtype, bits, group)
    return x


def _room(x: Tensor, bits: int, group: int) -> Tensor:
    quantise.check(x.dim(), bits, group)
    return x.new_empty(compressed_bytes(x.shape, x.dtype, bits, group), dtype=torch.uint8)


def _numbers(
    kept: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> Tensor:
    return kept.new_empty(shape, dtype=dtype)


torch.library.register_fake("memopt::compress", _room)
torch.library.register_fake("memopt::decompress", _numbers)


def compress_scratch(x: Tensor, bits: int, group: int) -> int:
    """Bytes that ``compress`` allocates besides its result: the parts, and what they take."""
    shape = [size_hint(size) for size in x.shape]
    parts = compressed_bytes(shape, x.dtype, bits, group)
    return parts + quantise.SPEC.scratch(x, bits, group, is_symmetric(bits))


def decompress_scratch(
    kept: Tensor, shape: Sequence[Any], dtype: torch.dtype, bits: int, group: int
) -> int:
    """The same of ``decompress``, whose parts are views."""
    sizes = [size_hint(size) for size in shape]
    return quantise.DEQUANTISE_SPEC.scratch(
        *_fake_parts(kept, sizes, dtype, bits, group), sizes, dtype, bits, group
    )


def _fake_parts(
    kept: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> tuple[Tensor, ...]:
    """What ``_parts`` returns, of no contents."""
    made = [
        torch.empty(size, dtype=own, device="meta")
        for _, own, size in _layout(shape, dtype, bits, group)
    ]
    return made[0], made[1], made[-1] if len(made) > 2 else made[1].new_empty(0)
