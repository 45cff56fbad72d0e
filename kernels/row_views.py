"""Tensors as rows, which kernels read without a copy where strides allow it."""

from itertools import pairwise

from torch import Tensor

from memopt._torch import size_hint


def evenly_spaced(t: Tensor) -> bool:
    """Whether rows lie at even distances, with their entries side by side.

    Args:
        t: `(..., F)`, fake or real. Sizes of a fake one are those that tracing saw.
    """
    sizes, strides = ([size_hint(value) for value in of] for of in (t.shape, t.stride()))
    if sizes[-1] != 1 and strides[-1] != 1:
        return False
    outer = [pair for pair in zip(sizes[:-1], strides[:-1], strict=True) if pair[0] != 1]
    return all(before[1] == size * stride for before, (size, stride) in pairwise(outer))


def by_rows(t: Tensor) -> Tensor:
    """A tensor as `(N, F)`: a view if its rows are evenly spaced, else a copy.

    Args:
        t: `(..., F)`, with at least one entry.
    """
    return (t if evenly_spaced(t) else t.contiguous()).reshape(-1, t.shape[-1])


def copied_bytes(*tensors: Tensor) -> int:
    """What `by_rows` allocates for these, in bytes."""
    return sum(
        size_hint(t.numel()) * t.element_size()
        for t in tensors
        if t.dim() and not evenly_spaced(t)
    )
