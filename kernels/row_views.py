"""Tensors as rows, which kernels read without a copy where strides allow it."""

from itertools import pairwise

from torch import Tensor

from memopt._torch import size_hint


def evenly_spaced(t: Tensor, *, dense: bool = False) -> bool:
    """Whether rows lie at even distances, with their entries side by side.

    Args:
        t: `(..., F)`, fake or real. Sizes of a fake one are those that tracing saw.
        dense: whether there must be no gaps between rows, either.
    """
    sizes, strides = ([size_hint(value) for value in of] for of in (t.shape, t.stride()))
    if not sizes or (sizes[-1] != 1 and strides[-1] != 1):
        return not sizes
    outer = [pair for pair in zip(sizes[:-1], strides[:-1], strict=True) if pair[0] != 1]
    if dense and outer and outer[-1][1] != sizes[-1]:
        return False
    return all(before[1] == size * stride for before, (size, stride) in pairwise(outer))


def by_rows(t: Tensor) -> Tensor:
    """A tensor as `(N, F)`: a view if its rows are evenly spaced, else a copy.

    Args:
        t: `(..., F)`, with at least one entry.
    """
    return (t if evenly_spaced(t) else t.contiguous()).reshape(-1, t.shape[-1])


def copied_bytes(*tensors: Tensor | None, dense: bool = False) -> int:
    """What `by_rows`, or with ``dense`` ``contiguous``, allocates for these, in bytes."""
    return sum(
        size_hint(t.numel()) * t.element_size()
        for t in tensors
        if t is not None and not evenly_spaced(t, dense=dense)
    )
