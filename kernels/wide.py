"""What kernels compute in: float32, or the dtype of what they are given where that is wider."""

import torch
from torch import Tensor

from memopt._torch import size_hint


def wide_dtype(t: Tensor) -> torch.dtype:
    """Float32, or float64 where the tensor is."""
    return torch.promote_types(t.dtype, torch.float32)


def wide(t: Tensor) -> Tensor:
    """The tensor in this dtype."""
    return t.to(wide_dtype(t))


def wide_copy(t: Tensor) -> Tensor:
    """A contiguous copy in this dtype, for what is done in place."""
    return t.to(wide_dtype(t), copy=True, memory_format=torch.contiguous_format)


def wide_bytes(t: Tensor) -> int:
    """Bytes of a dense copy in this dtype; sizes of a fake tensor are those that tracing saw."""
    return size_hint(t.numel()) * wide_dtype(t).itemsize


def own_bytes(t: Tensor) -> int:
    """Bytes of a dense copy in its own dtype."""
    return size_hint(t.numel()) * t.element_size()
