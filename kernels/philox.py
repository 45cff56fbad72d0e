"""Philox 4x32 with ten rounds in PyTorch: the random words of ``tl.randint4x``, bit for bit.

A word depends on its counter and its key alone, so any part of a sequence can be drawn at any
time and on any device.

Source: Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3",
doi:10.1145/2063384.2063405.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def random_words(counter: Tensor, seed: Tensor) -> Tensor:
    """Four words for each counter, one after another.

    Args:
        counter: `(N,)`, int64, not negative.
        seed: `()`, int64.

    Returns:
        `(4 * N,)`, int64, from 0 to ``2**32 - 1``.
    """
    nothing = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, counter >> 32, nothing, nothing
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    a, b = _FACTORS
    for _ in range(_ROUNDS):
        c0, c1, c2, c3 = (
            _high(b, c2) ^ c1 ^ k0,
            (b * c2) & _LOW,  # int64 wraps around, and the low half is right
            _high(a, c0) ^ c3 ^ k1,
            (a * c0) & _LOW,
        )
        k0, k1 = ((k + step) & _LOW for k, step in zip((k0, k1), _KEY_STEPS, strict=True))
    return torch.stack([c0, c1, c2, c3], 1).view(-1)


def _high(factor: int, word: Tensor) -> Tensor:
    """The upper 32 bits of a product, which may not fit in int64."""
    return ((factor >> 16) * word + (((factor & 0xFFFF) * word) >> 16)) >> 16
