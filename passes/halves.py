"""Parts of the last dimension of a tensor, and what puts them together again.

Parts are slices, chunks, and every other entry; they are put one behind the other, or entry by
entry side by side.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import loosely
from memopt.passes.logits import RESHAPES
from memopt.passes.patterns import Call, Items, Match, Pattern, Where, call, is_tensor
from memopt.passes.row_losses import arguments

CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
STACKS = frozenset({torch.stack})
FLATTENS = RESHAPES | {torch.flatten, "flatten", torch.reshape}
FIRST, SECOND, EVEN, ODD = "first", "second", "even", "odd"
_SPLITS = frozenset(
    {torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split"}
    | {torch.split_with_sizes, "split_with_sizes"}
)
_UNBINDS = frozenset({torch.unbind, "unbind"})
_UNFLATTENS = RESHAPES | {torch.reshape, torch.unflatten, "unflatten"}


_ANY = Where(lambda value: True)


def joined(first: Pattern, second: Pattern) -> Pattern:
    """One part behind the other."""
    return _put_together(CATS, first, second)


def side_by_side(first: Pattern, second: Pattern) -> Pattern:
    """Two parts entry by entry, as pairs of neighbours."""
    return flattened(_put_together(STACKS, first, second))


def flattened(pairs: Pattern) -> Pattern:
    """The last two dimensions as one."""
    dims = {"start_dim": _ANY, "end_dim": _ANY}
    return call(FLATTENS, "input start_dim end_dim", _merges_last, input=pairs, **dims)


def _put_together(targets: frozenset[Any], *patterns: Pattern) -> Call:
    return call(targets, "tensors dim", _along_last, tensors=Items(patterns), dim=_ANY)


def _along_last(node: fx.Node) -> bool:
    """Whether tensors are put together along the last dimension of the result."""
    dim, rank = arguments(node, "tensors dim").get("dim", 0), len(shape_of(node))
    return isinstance(dim, int) and dim % rank == rank - 1


def _merges_last(node: fx.Node) -> bool:
    """Whether the last two dimensions become one."""
    before, after = shape_of(loosely(node.args[0])), shape_of(node)
    if len(before) != len(after) + 1 or not all(isinstance(n, int) for n in before[-2:]):
        return False
    return same_shape(after, (*before[:-2], before[-2] * before[-1]))


class Part(NamedTuple):
    """Some entries of each row.

    Attributes:
        whole: `(..., H)`.
        taken: which entries.
        inner: the node that holds them, and those between.
    """

    whole: fx.Node
    taken: range
    inner: tuple[fx.Node, ...]

    def is_half(self, kind: str) -> bool:
        """Whether they are this half; of two entries, the first is the even one as well."""
        size = shape_of(self.whole)[-1]
        half = {
            FIRST: range(size // 2),
            SECOND: range(size // 2, size),
            EVEN: range(0, size, 2),
            ODD: range(1, size, 2),
        }
        return size % 2 == 0 and self.taken == half[kind]


@dataclass(frozen=True)
class HalfOf:
    """One half of what another pattern finds."""

    whole: Pattern
    kind: str

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        part = part_of(value)
        if part is not None and part.is_half(self.kind):
            yield from self.whole.find(part.whole, match.taking(*part.inner))


@dataclass(frozen=True)
class PartOf:
    """Some entries of each row of what another pattern finds; a name stands for which."""

    whole: Pattern
    name: str

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        part = part_of(value)
        if part is not None:
            for found in match.taking(*part.inner).binding(self.name, part.taken):
                yield from self.whole.find(part.whole, found)


def part_of(node: Any) -> Part | None:
    """Which part of the last dimension of which tensor a node is; None where it is none."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    whole, index = loosely(node.args)
    if is_tensor(whole):
        taken = _sliced(index, shape_of(whole))
        return Part(whole, taken, (node,)) if taken is not None else None
    if not isinstance(whole, fx.Node) or not whole.args or not isinstance(index, int):
        return None
    source = loosely(whole.args[0])
    if not is_tensor(source):
        return None
    if whole.target in _SPLITS:
        taken = _piece(traced(whole), index, shape_of(source))
        return Part(source, taken, (node, whole)) if taken is not None else None
    if whole.target in _UNBINDS and _over_pairs(whole):
        pairs = loosely(source.args[0])
        return Part(pairs, range(index % 2, shape_of(pairs)[-1], 2), (node, whole, source))
    return None


def _sliced(index: Any, shape: Sequence[Any]) -> range | None:
    """What a slice takes of the last dimension, if it takes all of the others."""
    items = index if isinstance(index, tuple) else (index,)
    if (
        not items
        or not isinstance(items[-1], slice)
        or not shape
        or not isinstance(shape[-1], int)
    ):
        return None
    *others, last = items
    reaches = Ellipsis in others or len(items) == len(shape)
    if not reaches or any(i is not Ellipsis and i != slice(None) for i in others):
        return None
    bounds = (last.start, last.stop, last.step)
    known = all(b is None or isinstance(b, int) for b in bounds)
    return range(shape[-1])[slice(*bounds)] if known else None


def _piece(pieces: Any, index: int, shape: Sequence[Any]) -> range | None:
    """What a piece takes of the last dimension, if that is the one that was cut."""
    if not isinstance(pieces, (tuple, list)) or not all(p.dim() == len(shape) for p in pieces):
        return None
    sizes = [piece.shape[-1] for piece in pieces]
    cut = all(isinstance(size, int) for size in sizes) and sum(sizes) == shape[-1]
    if not cut or not all(same_shape(piece.shape[:-1], shape[:-1]) for piece in pieces):
        return None
    index %= len(pieces)
    return range(sum(sizes[:index]), sum(sizes[: index + 1]))


def _over_pairs(unbind: fx.Node) -> bool:
    """Whether pairs of neighbours are unbound: ``x.view(..., -1, 2).unbind(-1)``."""
    view = loosely(unbind.args[0])
    dim = loosely(unbind.args[1:2] or (unbind.kwargs.get("dim", 0),))[0]
    if view.target not in _UNFLATTENS or not is_tensor(loosely(view.args[0])):
        return False
    shape, whole = shape_of(view), shape_of(loosely(view.args[0]))
    last = isinstance(dim, int) and dim % len(shape) == len(shape) - 1
    pairs = isinstance(whole[-1], int) and shape[-1] == 2
    return last and pairs and same_shape(shape[:-2], whole[:-1])
