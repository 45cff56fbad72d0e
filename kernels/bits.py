"""Masks of one bit an entry, and the product with a mask that reads them.

A bool has a byte, eight times what a mask needs. Entry ``i`` of the mask, in the order of its
indices whatever its strides are, is bit ``i % 8`` of byte ``i // 8``, counted from the lowest;
bits behind the last entry are 0. The operators that make such a mask and save it for their
backward are in `memopt.kernels.masking`.

Pays: where a mask is saved. Does not: where it can be made again from what is saved anyway.

Source: a ReLU's mask of bits is Gist's: Jain et al. (2018), "Gist: efficient data encoding for
deep neural network training", doi:10.1109/ISCA.2018.00070.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memopt._torch import size_hint
from memopt.errors import ConfigError
from memopt.kernels.row_views import copied_bytes
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import wide_bytes, wide_copy, wide_dtype

torch.library.define("memopt::pack_bits", "(Tensor mask) -> Tensor")
torch.library.define("memopt::unpack_bits", "(Tensor bits, SymInt[] shape) -> Tensor")
torch.library.define("memopt::apply_bits", "(Tensor dy, Tensor bits, float factor) -> Tensor")
PACK_BITS = torch.ops.memopt.pack_bits.default
UNPACK_BITS = torch.ops.memopt.unpack_bits.default
APPLY_BITS = torch.ops.memopt.apply_bits.default


def bytes_of(entries: Any) -> Any:
    """How many bytes have a bit for each of so many entries, a number or a symbol."""
    return (entries + 7) // 8


def pack(mask: Tensor) -> Results:
    """Bits of a mask.

    Args:
        mask: bool, of any shape and strides.

    Returns:
        `(ceil(numel / 8),)`, uint8.

    Raises:
        ConfigError: it is no mask.
    """
    check_mask(mask)
    flat = mask.contiguous().view(torch.uint8).view(-1)
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(-1, 8) * _powers(flat)).sum(1, dtype=torch.uint8),)


def unpack(bits: Tensor, shape: list[int]) -> Results:
    """The mask that has these bits.

    Args:
        bits: `(ceil(numel / 8),)`, uint8.
        shape: of the mask.

    Returns:
        bool.

    Raises:
        ConfigError: there are more or fewer bits than entries.
    """
    entries = torch.Size(shape).numel()
    check_bits(bits, entries)
    each = (bits[:, None] & _powers(bits)) != 0
    return (each.view(-1)[:entries].view(shape),)


def _powers(like: Tensor) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=like.device)


def _apply(dy: Tensor, bits: Tensor, factor: float) -> Results:
    """``dy * factor`` where the bit is set, and 0 elsewhere whatever ``dy`` is.

    Args:
        dy: of any shape; float32 or wider, bfloat16 or float16.
        bits: `(ceil(numel / 8),)`, uint8.
        factor: what is kept is multiplied by it.

    Returns:
        The shape and dtype of ``dy``, contiguous.

    Raises:
        ConfigError: there are more or fewer bits than entries.
    """
    (kept,) = unpack(bits, list(dy.shape))
    dx = wide_copy(dy).mul_(factor)
    return (dx.masked_fill_(kept.logical_not_(), 0.0).to(dy.dtype),)


def check_mask(mask: Tensor) -> None:
    """Raise ``ConfigError`` for what is no mask."""
    if mask.dtype != torch.bool:
        raise ConfigError(f"the mask is {mask.dtype}: allowed is torch.bool")


def check_bits(bits: Tensor, entries: int) -> None:
    """Raise ``ConfigError`` for bits of another number of entries."""
    if bits.dtype != torch.uint8 or bits.shape != (bytes_of(entries),):
        raise ConfigError(
            f"the bits are {bits.dtype}, {tuple(bits.shape)}: "
            f"{entries} entries take torch.uint8, ({bytes_of(entries)},)"
        )


def unwritten_bits(of: Tensor, *_: Any) -> Tensor:
    """Room for a bit for each entry."""
    return of.new_empty(bytes_of(of.numel()), dtype=torch.uint8)


def _unwritten_mask(bits: Tensor, shape: list[int]) -> Tensor:
    return bits.new_empty(shape, dtype=torch.bool)


def _unwritten_product(dy: Tensor, bits: Tensor, factor: float) -> Tensor:
    return dy.new_empty(dy.shape)


def _save(ctx: Any, inputs: Arguments, output: Tensor) -> None:
    _, bits, ctx.factor = inputs
    ctx.save_for_backward(bits)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return APPLY_BITS(g, *ctx.saved_tensors, ctx.factor), None, None


torch.library.register_fake("memopt::pack_bits", unwritten_bits)
torch.library.register_fake("memopt::unpack_bits", _unwritten_mask)
torch.library.register_fake("memopt::apply_bits", _unwritten_product)
torch.library.register_autograd("memopt::apply_bits", _backward, setup_context=_save)


def _pack_scratch(mask: Tensor) -> int:
    if serves(mask):
        return copied_for_bits(mask)
    entries = size_hint(mask.numel())
    return copied_bytes(mask, dense=True) + entries * (2 if entries % 8 else 1)


def _unpack_scratch(bits: Tensor, shape: list[Any]) -> int:
    return 0 if serves(bits) else 8 * size_hint(bits.numel())


def _apply_scratch(dy: Tensor, bits: Tensor, factor: float) -> int:
    if serves(dy):
        return copied_for_bits(dy)
    widened = 0 if dy.dtype == wide_dtype(dy) else wide_bytes(dy)
    return size_hint(dy.numel()) + widened


def copied_for_bits(t: Tensor) -> int:
    """What the kernels allocate to read a tensor, in bytes: rows of whole bytes may have gaps."""
    in_rows = t.dim() > 0 and size_hint(t.shape[-1]) % 8 == 0
    return copied_bytes(t, dense=not in_rows)


def _pack_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    yield (torch.rand(64, 1024) > 0.5,)
    yield (torch.rand(8, 16, 256) > 0.9,)
    yield ((torch.rand(48, 3, 128) > 0.1)[:, 1],)
    yield ((torch.rand(64, 1024) > 0.5)[:, 256:],)
    yield (torch.rand(33, 333) > 0.5,)


def _unpack_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for (mask,) in _pack_samples(dtype):
        yield *pack(mask), list(mask.shape)


def _apply_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for shape, keep, factor in (((64, 1024), 0.9, 1 / 0.9), ((8, 16, 256), 0.5, 1.0)):
        yield drawn(*shape, dtype=dtype), *pack(torch.rand(shape) < keep), factor
    yield drawn(48, 3, 128, dtype=dtype)[:, 1], *pack(torch.rand(48, 128) < 0.5), 2.0
    yield drawn(33, 333, dtype=dtype), *pack(torch.rand(33, 333) < 0.5), 2.0
    yield drawn(64, 200, dtype=dtype).t(), *pack(torch.rand(200, 64) < 0.5), 2.0


PACK_SPEC = KernelSpec(
    name="memopt::pack_bits",
    plain=pack,
    launch=launched("triton_bits", "pack"),
    scratch=_pack_scratch,
    samples=_pack_samples,
    source="doi:10.1109/ISCA.2018.00070",
)
UNPACK_SPEC = KernelSpec(
    name="memopt::unpack_bits",
    plain=unpack,
    launch=launched("triton_bits", "unpack"),
    scratch=_unpack_scratch,
    samples=_unpack_samples,
    source=PACK_SPEC.source,
)
APPLY_SPEC = KernelSpec(
    name="memopt::apply_bits",
    plain=_apply,
    launch=launched("triton_bits", "apply"),
    scratch=_apply_scratch,
    samples=_apply_samples,
    source=PACK_SPEC.source,
)
SPECS = (PACK_SPEC, UNPACK_SPEC, APPLY_SPEC)
for _spec in SPECS:
    _spec.implement()
