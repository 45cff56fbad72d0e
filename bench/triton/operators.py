"""Bytes that torch's own operators move: what the tracer does not see around kernels.

Each operator is counted as one launch that reads every tensor it is given once and writes every
result once, also where it is given the room for it; one that picks entries reads as many as it
gives. Views move nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memopt._torch import TorchDispatchMode, pytree

_ATEN = torch.ops.aten
_EMPTY = frozenset({
    _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided,
})  # fmt: skip
# Of their first tensor they take the shape, or overwrite it.
_FILLING = frozenset({_ATEN.copy_, _ATEN.fill_, _ATEN.zero_, _ATEN.new_zeros, _ATEN.zeros_like})
_PICKING = frozenset({_ATEN.gather, _ATEN.index, _ATEN.index_select})


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; see `operators`.

    Attributes:
        moved_bytes: read and written so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket
        if not func.is_view and name not in _EMPTY:
            first = () if name in _FILLING else result if name in _PICKING else args[:1]
            given = {name: t for name, t in kwargs.items() if name not in _outs(func)}
            self.moved_bytes += _bytes((first, args[1:], given, result))
        return result


@contextlib.contextmanager
def operators() -> Iterator[Operators]:
    """Count what torch's operators move within."""
    with Operators() as counter:
        yield counter


def _outs(func: Any) -> set[str]:
    """Names of the arguments that take its results, which it does not read."""
    return {a.name for a in func._schema.arguments if a.is_out}


def _bytes(tree: Any) -> int:
    """Of all tensors in it; an expanded one has those that are there."""
    tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return sum(_own_bytes(t) for t in tensors)


def _own_bytes(t: Tensor) -> int:
    size = t.element_size()
    for entries, stride in zip(t.shape, t.stride(), strict=True):
        size *= entries if stride else min(1, entries)
    return size
