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
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def copied_bytes(t: Tensor, *, dense: bool = False) -> int:
    """What ``by_rows`` allocates, in bytes; read from hints, so that no guard is added.

    Args:
        t: `(..., H)`, fake or real.
        dense: whether rows must have no gaps between them, as for ``contiguous``.
    """
    sizes = [size_hint(size) for size in t.shape]
    strides = [size_hint(stride) for stride in t.stride()]
    steps = [pair for pair in zip(sizes, strides, strict=True) if pair[0] != 1]
    is_row = bool(sizes) and sizes[-1] != 1  # whether the last step is one within a row
    above = steps[:-1] if is_row and not dense else steps
    even = all(far == near * size for (_, far), (size, near) in pairwise(above))
    beside = steps[-1:] == [] or steps[-1][1] == 1 or not (is_row or dense)
    return 0 if even and beside else size_hint(t.numel()) * t.element_size()
