"""Keys and values in 8 or 4 bits, with a smallest value and a step for each group, and back.

``x = zero + step * code``, where the zero is the group's smallest value, which is there as it was, and
the step is in the dtype of ``x`` too, rounded up, so that no code is cut off. A number comes back
within half a step, and half a unit in the last place of its dtype.

It is not `memopt.kernels.quantise`, whose steps and zeros are of float32: for groups of a head's width
they would be an eighth of the bytes of 4-bit codes.
"""

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


def check_bits(bits: int, group: int, sinks: int) -> None:
    """Raise ``ConfigError`` for other bits, groups and sinks than there are."""
    if bits not in BITS:
        raise ConfigError(f"bits={bits!r}: allowed is 8 or 4")
    if not isinstance(group, int) or group < 1:
        raise ConfigError(f"group={group!r}: a number of tokens from 1 on, such as 128")
    if not isinstance(sinks, int) or sinks < 0:
        raise ConfigError(f"sinks={sinks!r}: a number of tokens from 0 on")
