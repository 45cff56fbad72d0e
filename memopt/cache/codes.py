"""Keys and values in 8 or 4 bits, with a smallest value and a step for each group, and back.

``x = zero + step * code``, where the zero is the group's smallest value, which is there as it
was, and the step is in the dtype of ``x`` too, rounded up, so that no code is cut off. A number
comes back within half a step, and half a unit in the last place of its dtype.

It is not `memopt.kernels.quantise`, whose steps and zeros are of float32: for groups of a head's
width they would be an eighth of the bytes of 4-bit codes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from memopt.errors import ConfigError

BITS = (8, 4)


def encode(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and zeros, of groups along one dimension.

    Args:
        x: `(..., D)`, of floats; ``D`` is even for 4 bits.
        dim: of a group, which is all of it.
        bits: 8 or 4.

    Returns:
        `(..., D * bits / 8)`, uint8; twice the shape of ``x`` with 1 at ``dim``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    info, most = torch.finfo(x.dtype), 2**bits - 1
    zero, high = x.aminmax(dim=dim, keepdim=True)
    step = (high.to(wide) - zero.to(wide)) * ((1 + info.eps) / most)
    step = step.clamp(min=info.tiny).to(x.dtype)
    codes = (x.to(wide) - zero.to(wide)).div_(step.to(wide)).round_().clamp_(0, most)
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, upper = codes.chunk(2, -1)
        codes = low | upper << 4
    return codes, step, zero


def decode(codes: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Numbers in the dtype of the steps, rounded once."""
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return torch.addcmul(zero, codes.to(step.dtype), step)


class Coded:
    """Keys, or values: blocks of codes, and the newest and the first tokens as they are.

    Args:
        like: `(B, H, 0, D)`, on the device and in the dtype of what will come.
        blocks: ``M``.
        group: ``R``, tokens of a block.
        sinks: ``S``.
        bits: 8 or 4.
        dim: of `(B, H, M, R, D)` along which numbers share a step: 3 for keys, 4 for values.
    """

    BATCHED: ClassVar[tuple[str, ...]] = ("codes", "step", "zero", "newest", "sinks")
    SHARED: ClassVar[tuple[str, ...]] = ("squares",)

    def __init__(
        self, like: Tensor, blocks: int, group: int, sinks: int, bits: int, dim: int
    ) -> None:
        b, h, _, d = like.shape
        if bits == 4 and d % 2:
            raise ConfigError(f"heads of {d} entries: 4 bits need an even number; use bits=8")
        self.group, self.bits, self.dim = group, bits, dim
        self.codes = like.new_zeros(b, h, blocks, group, d * bits // 8, dtype=torch.uint8)
        steps = (b, h, blocks, 1, d) if dim == 3 else (b, h, blocks, group, 1)
        self.step, self.zero = like.new_zeros(steps), like.new_zeros(steps)
        self.newest = like.new_zeros(b, h, 2 * group, d)
        self.sinks = like.new_zeros(b, h, sinks, d)
        self.squares = like.new_zeros(2, dtype=torch.float32)  # of the error, of the numbers

    def put_blocks(self, blocks: Tensor, x: Tensor, counted: Tensor | float = 1.0) -> None:
        """Codes of whole blocks: ``x`` is `(B, H, blocks * R, D)`.

        Args:
            blocks: which.
            x: their numbers.
            counted: 0 where they have been before, so that their error counts once.
        """
        x = x.unflatten(2, (-1, self.group))  # type: ignore[no-untyped-call]
        made = encode(x, self.dim, self.bits)
        for held, part in zip((self.codes, self.step, self.zero), made, strict=True):
            held.index_copy_(2, blocks, part)
        codes, step, zero = made
        wide = x.to(torch.float32)
        off = decode(codes, step, zero, self.bits).to(torch.float32) - wide
        squares = torch.stack([off.square().sum(), wide.square().sum()])
        self.squares.add_(squares * counted)

    def put_newest(self, columns: Tensor, x: Tensor) -> None:
        """Tokens as they are, `(B, H, columns, D)`, in the ring."""
        self.newest.index_copy_(2, columns % self.newest.shape[2], x)

    def put_sinks(self, is_new: Tensor, column: Tensor, x: Tensor) -> None:
        """Sinks from some columns of ``x``, where they are new: both `(B, S)`."""
        taken = x.gather(2, self._index(column))
        self.sinks.copy_(torch.where(is_new[:, None, :, None], taken, self.sinks))

    def whole(self, heads: slice, blocks: int, newest: Tensor, sinks: Tensor) -> Tensor:
        """Numbers of some heads, by column: `(B, heads, blocks * R, D)`.

        Args:
            heads: which.
            blocks: the first so many.
            newest: the columns of the ring's slots.
            sinks: those of the sinks, `(B, S)`; -1 where there are none.
        """
        parts = (held[:, heads, :blocks] for held in (self.codes, self.step, self.zero))
        codes, step, zero = parts
        x = decode(codes, step, zero, self.bits).flatten(2, 3)
        x.index_copy_(2, newest, self.newest[:, heads])
        index = self._index(sinks.clamp(min=0))[:, heads]
        is_there = (sinks >= 0)[:, None, :, None]
        return x.scatter_(
            2, index, torch.where(is_there, self.sinks[:, heads], x.gather(2, index))
        )

    def _index(self, columns: Tensor) -> Tensor:
        """`(B, S)` as an index of `(B, H, S, D)`."""
        _, h, _, d = self.sinks.shape
        return columns[:, None, :, None].expand(-1, h, -1, d)


def relative_error(squares: list[Tensor]) -> float:
    """The root of the errors' squares over the numbers', of some `Coded.squares`."""
    if not squares:
        return 0.0
    off, numbers = torch.stack(squares).sum(0).tolist()
    return float((off / numbers) ** 0.5) if numbers else 0.0


def check_bits(bits: int, group: int, sinks: int) -> None:
    """Raise ``ConfigError`` for other bits, groups and sinks than there are."""
    if bits not in BITS:
        raise ConfigError(f"bits={bits!r}: allowed is 8 or 4")
    if not isinstance(group, int) or group < 1:
        raise ConfigError(f"group={group!r}: a number of tokens from 1 on, such as 128")
    if not isinstance(sinks, int) or sinks < 0:
        raise ConfigError(f"sinks={sinks!r}: a number of tokens from 0 on")
