"""Linear layer and cross-entropy in one operator that writes a gradient over its hidden states.

A chunk of the hidden states is read for the last time when its weight gradient has been added up;
then their own gradient takes their place. The operator has no autograd: it is put where a graph
reads the hidden states no more, after both halves are known.

Pays: ``N * H`` elements. Does not: in float16, whose gradient is float32.

Source: memopt's own.
"""

from typing import Any

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.linear_cross_entropy import NAME, SCHEMA, Arguments, fake_reduced, reduced

torch.library.define(
    f"{NAME}_",
    f"({SCHEMA.replace('Tensor', 'Tensor(a!)', 1)}, bool mean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)

IN_PLACE = torch.ops.memopt.linear_cross_entropy_.default


@torch.library.impl(f"{NAME}_", "default")
def _in_place(*args: Any) -> tuple[Tensor, ...]:
    """The same without the gradient of ``x``, which is in ``x``."""
    *shared, mean = args
    a = Arguments(*shared)
    if not fits_in_place(a):
        raise ConfigError(
            "the gradient of the hidden states cannot take their place: allowed are chunks, a "
            "gradient that is wanted, and contiguous hidden states in another dtype than float16"
        )
    loss, _, *others = reduced(a, mean, in_place=True)
    return (loss, *others)


def _fake_in_place(*args: Any) -> tuple[Tensor, ...]:
    loss, _, *others = fake_reduced(*args)
    return (loss, *others)


torch.library.register_fake(f"{NAME}_", _fake_in_place)


def fits_in_place(a: Arguments) -> bool:
    """Whether the gradient of the hidden states, fake or real, could take their place.

    Not without chunks: tiles of the gradient are added up while others still read the states.
    """
    own = a.x.dtype != torch.float16  # whose gradients are float32
    return own and bool(a.wanted[0]) and a.chunk_rows != 0 and a.x.is_contiguous()
