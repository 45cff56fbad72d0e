"""A tensor as codes of 8 or 4 bits and their scales, in one buffer, and back.

What ``memopt.kernels.quantise`` or ``memopt.kernels.float8`` returns as several tensors lies in
one, so that it is held as one: all codes, then all scales, then, of 4 bits, all zero points.

Pays and does not: as these.

Legend: as there; ``n`` bytes of the buffer.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels import quantise
from memopt.kernels.float8 import from_float8, to_float8
from memopt.kernels.quantise import DEQUANTISE, QUANTISE, groups_of, packed_width
from memopt.kernels.wide import wide_dtype

torch.library.define(
    "memopt::compress", "(Tensor x, int bits, int group, bool floats=False) -> Tensor"
)
torch.library.define(
    "memopt::decompress",
    "(Tensor kept, SymInt[] shape, ScalarType dtype, int bits, int group, bool floats=False) "
    "-> Tensor",
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
def _compress(x: Tensor, bits: int, group: int, floats: bool = False) -> Tensor:
    """The buffer.

    Args:
        x: `(..., H)`, float32 or wider, bfloat16 or float16.
        bits: 8 or 4.
        group: entries of a group, a power of two from 16 to 1024.
        floats: whether codes float, instead of integers; of 8 bits.

    Returns:
        `(n,)`, uint8.

    Raises:
        ConfigError: for other bits and groups, and a tensor without dimensions.
    """
    kept = _room(x, bits, group, floats)
    own = to_float8(x, group) if floats else QUANTISE(x, bits, group, is_symmetric(bits))
    ends = [0, *(end for end, _, _ in _layout(x.shape, x.dtype, bits, group))]
    for end in ends[:-1]:
        kept[end : end + _ALIGNMENT].zero_()  # equal values, equal bytes
    for part, made in zip(_parts(kept, x.shape, x.dtype, bits, group), own, strict=False):
        part.copy_(made)
    return kept


@torch.library.impl("memopt::decompress", "default")
def _decompress(
    kept: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    bits: int,
    group: int,
    floats: bool = False,
) -> Tensor:
    """Numbers from the buffer.

    Args:
        kept: `(n,)`, uint8.
        shape: `(..., H)`.
        dtype: of what was compressed.
        bits: 8 or 4.
        group: entries of a group.
        floats: as ``compress`` was given.

    Returns:
        Of this shape and dtype, contiguous.
    """
    parts = _parts(kept, shape, dtype, bits, group)
    if floats:
        return from_float8(parts[0], parts[1], shape, dtype, group)
    x: Tensor = DEQUANTISE(*parts, list(shape), dtype, bits, group)
    return x


def _room(x: Tensor, bits: int, group: int, floats: bool = False) -> Tensor:
    check(x.dim(), bits, group, floats)
    return x.new_empty(compressed_bytes(x.shape, x.dtype, bits, group), dtype=torch.uint8)


def check(dimensions: int, bits: int, group: int, floats: bool) -> None:
    """Raise ``ConfigError`` for what cannot be compressed."""
    quantise.check(dimensions, bits, group)
    if floats and bits != 8:
        raise ConfigError(f"floats=True with bits={bits!r}: allowed is 8")


def _numbers(kept: Tensor, shape: Sequence[int], dtype: torch.dtype, *_: Any, **__: Any) -> Tensor:
    return kept.new_empty(shape, dtype=dtype)


torch.library.register_fake("memopt::compress", _room)
torch.library.register_fake("memopt::decompress", _numbers)


def compress_scratch(x: Tensor, bits: int, group: int, floats: bool = False) -> int:
    """Bytes that ``compress`` allocates besides its result: the parts, and what they take."""
    shape = [size_hint(size) for size in x.shape]
    parts = compressed_bytes(shape, x.dtype, bits, group)
    if floats:
        return parts + quantise.plain_scratch(x, bits, group, symmetric=True)
    return parts + quantise.SPEC.scratch(x, bits, group, is_symmetric(bits))


def decompress_scratch(
    kept: Tensor,
    shape: Sequence[Any],
    dtype: torch.dtype,
    bits: int,
    group: int,
    floats: bool = False,
) -> int:
    """The same of ``decompress``, whose parts are views."""
    sizes = [size_hint(size) for size in shape]
    parts = _fake_parts(kept, sizes, dtype, bits, group)
    if floats:
        return quantise.plain_dequantise_scratch(parts[1], sizes, dtype, bits, group)
    return quantise.DEQUANTISE_SPEC.scratch(*parts, sizes, dtype, bits, group)


def _fake_parts(
    kept: Tensor, shape: Sequence[int], dtype: torch.dtype, bits: int, group: int
) -> tuple[Tensor, ...]:
    """What ``_parts`` returns, of no contents."""
    made = [
        torch.empty(size, dtype=own, device="meta")
        for _, own, size in _layout(shape, dtype, bits, group)
    ]
    return made[0], made[1], made[-1] if len(made) > 2 else made[1].new_empty(0)
