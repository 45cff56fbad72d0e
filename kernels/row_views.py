"""Tensors as rows at even distances, so that a kernel reads views with one stride."""

from itertools import pairwise

from torch import Tensor

from memopt._torch import size_hint


def by_rows(t: Tensor) -> Tensor:
    """As rows of entries side by side: a view where strides allow it, or else a copy.

    Args:
        t: `(..., H)`, not empty.

    Returns:
        `(N, H)`.
    """
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def copied_bytes(t: Tensor, *, dense: bool = False) -> int:
    """What ``by_rows`` allocates, in bytes; read from hints, so that no guard is added.

    Args:
        t: `(..., H)`, fake or real.
        dense: whether rows must have no gaps between them, as for ``contiguous``.
    """
    sizes = [size_hint(size) for size in t.shape]
    strides = [size_hint(stride) for stride in t.stride()]
    read = len(sizes) if dense else len(sizes) - 1
    steps = [pair for pair in zip(sizes[:read], strides[:read], strict=True) if pair[0] != 1]
    even = all(far == near * size for (_, far), (size, near) in pairwise(steps))
    beside = not sizes or sizes[-1] == 1 or strides[-1] == 1
    return 0 if even and beside else size_hint(t.numel()) * t.element_size()
