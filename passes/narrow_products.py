"""Multiply only what is read of a product: its rows and columns are chosen before, not after.

Where a block of a weight is trained, autograd computes the gradient of the whole weight and takes
the block out of it. The block alone is a product of some columns of the gradient and of some of
the layer's input, so no more of the input is held for it.

Pays: the bytes and the operations of what nobody reads. Exact up to the order of a product's sums,
which differs between shapes as it does between machines.

Legend: ``a (M, K)``, ``b (K, N)``, ``r`` and ``c`` choose rows and columns.

Source: which weight gradients are worth computing is asked by He et al. (2024), "Sparse Matrix in
Large Language Model Fine-tuning", arXiv:2405.15525, who write the layer for it; that a graph shows
it without is memopt's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from memopt._torch import size_hint
from memopt.graph import aten, backward_nodes, is_view, source_line
from memopt.passes.joint_nodes import call
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_PRODUCT = aten.mm.default


@dataclass(frozen=True)
class NarrowProducts:
    """``mm(a, b)[r][:, c]`` -> ``mm(a[r], b[:, c])``, in the backward.

    Attributes:
        most: parts of one product, beyond which it is left alone: each is a call of its own.
    """

    name: ClassVar[str] = "narrow_products"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    most: int = 16

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        late = backward_nodes(graph)
        rewrites = 0
        for product in graph.find_nodes(op="call_function", target=_PRODUCT):
            if product not in late:
                continue
            parts = [*_parts(_Part(product))]
            read, made = sum(_numbers(part.node) for part in parts), _numbers(product)
            if not 0 < len(parts) <= self.most or read >= made or any(map(_is_laid_out, parts)):
                continue
            for part in parts:
                part.node.replace_all_uses_with(_narrowed(graph, product, part, late))
            text = f"of its {made} numbers {read} are read, and no others computed"
            ctx.remark(self.name, RemarkKind.APPLIED, text, product.name, source_line(product))
            rewrites += 1
        return rewrites


@dataclass(frozen=True)
class _Choice:
    """Of a dimension of a product: a range, as ``slice`` takes it, or positions."""

    dimension: int
    range: tuple[Any, ...] = ()
    positions: fx.Node | None = None

    def of(self, graph: fx.Graph, factor: fx.Node) -> fx.Node:
        """What it leaves of a factor."""
        if self.positions is None:
            part = aten.slice.Tensor, factor, self.dimension, *self.range
        else:
            part = aten.index.Tensor, factor, [*([None] * self.dimension), self.positions]
        return call(graph, *part, like=factor)


@dataclass(frozen=True)
class _Part:
    """A part of a product, or of its transpose: its value, and what was chosen for it."""

    node: fx.Node
    turned: bool = False
    choices: tuple[_Choice, ...] = ()


def _numbers(node: fx.Node) -> int:
    """How many a value has, as far as tracing saw."""
    return size_hint(node.meta["val"].numel())


def _parts(part: _Part) -> Iterator[_Part]:
    """What is read of a product in the end; the part itself where it is read as it is."""
    users = [user for user in part.node.users if not _is_room_for_copy(user, part.node)]
    smaller = [less for user in users if (less := _below(part, user))]
    if len(smaller) < len(users):
        yield part
        return
    for less in smaller:
        yield from _parts(less)


def _is_laid_out(part: _Part) -> bool:
    """Whether its strides are relied on."""
    return any(user.target is aten.as_strided.default for user in part.node.users)


def _is_room_for_copy(user: fx.Node, value: fx.Node) -> bool:
    """Whether nothing but the shape is asked for, as where autograd undoes a write to a view."""
    return user.target is aten.new_empty_strided.default and all(
        reader.target is aten.copy.default and reader.args[1] is value for reader in user.users
    )


def _below(part: _Part, user: fx.Node) -> _Part | None:
    """What a reader makes of a part: a copy, the transpose, or less; None of anything else."""
    value, *rest = user.args
    if user.target is aten.copy.default:
        value = rest[0]
    if value is not part.node:
        return None
    if user.target in (aten.clone.default, aten.copy.default):
        return replace(part, node=user)
    if user.target in _TURNED:
        return replace(part, node=user, turned=part.turned ^ _TURNED[user.target](*rest))
    if user.target not in _CHOICES:
        return None
    chosen = [*_CHOICES[user.target](*rest)]
    own = tuple(replace(c, dimension=(c.dimension % 2) ^ part.turned) for c in chosen)
    return _Part(user, part.turned, (*part.choices, *own)) if own else None


_TURNED: dict[Any, Callable[..., bool]] = {
    aten.t.default: lambda: True,
    aten.transpose.int: lambda first, second: first % 2 != second % 2,
    aten.permute.default: lambda order: order[0] % 2 == 1,
}


def _slice(dimension: int = 0, *rest: Any) -> Iterator[_Choice]:
    yield _Choice(dimension, rest)


def _select(dimension: int, index: fx.Node) -> Iterator[_Choice]:
    yield _Choice(dimension, positions=index)


def _index(indices: Sequence[fx.Node | None]) -> Iterator[_Choice]:
    """Of one row of positions, as ``index_select``."""
    (dimension, index), *others = [(d, i) for d, i in enumerate(indices) if i is not None]
    positions = index.meta["val"]
    if not others and positions.dim() == 1 and positions.dtype in (torch.int32, torch.int64):
        yield from _select(dimension, index)


def _cut(pads: Sequence[int], *_: Any) -> Iterator[_Choice]:
    """A padding that takes away; its sizes are of the last dimension first."""
    if all(isinstance(pad, int) and pad <= 0 for pad in pads):
        for at in range(0, len(pads), 2):
            end = pads[at + 1] or 2**63 - 1
            yield _Choice(1 - at // 2, (-pads[at], end))


_CHOICES: dict[Any, Callable[..., Iterator[_Choice]]] = {
    aten.slice.Tensor: _slice,
    aten.index_select.default: _select,
    aten.index.Tensor: _index,
    aten.constant_pad_nd.default: _cut,
}


def _narrowed(graph: fx.Graph, product: fx.Node, part: _Part, late: set[fx.Node]) -> fx.Node:
    """The part, computed alone; in order in memory, whatever the part's strides were."""
    factors: list[fx.Node] = []
    with graph.inserting_before(part.node):
        for dimension, whole in enumerate(product.args[:2]):
            factor: Any = whole
            for choice in part.choices:
                if choice.dimension == dimension:
                    factor = choice.of(graph, factor)
            if factor is not whole and _is_held(whole, late):
                factor = call(graph, aten.clone.default, factor, like=factor)
            factors.append(factor)
        if part.turned:
            turn = aten.permute.default
            factors = [call(graph, turn, f, [1, 0], like=f) for f in reversed(factors)]
        return call(graph, _PRODUCT, *factors, like=part.node)


def _is_held(factor: Any, late: set[fx.Node]) -> bool:
    """Whether the forward makes a factor, so that its part is to be held instead of it."""
    base = factor
    while base.op == "call_function" and is_view(base):
        base = base.all_input_nodes[0]
    return base.op == "call_function" and base not in late
