"""Follows a value per class to its sums over all classes.

Between the two it may be masked, weighted, reshaped and picked by rows. All of that acts on one
column as it does on all classes, so it can be replayed on the rows' sums.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from memopt._torch import size_hint
from memopt.emit import emit, shape_of, traced
from memopt.passes.heads import loosely
from memopt.passes.logits import RESHAPES, Logits, shaped
from memopt.passes.row_losses import arguments

_SUMS = frozenset({torch.sum, "sum"})
_MEANS = frozenset({torch.mean, "mean"})
_PRODUCTS = frozenset({operator.mul, torch.mul, "mul"})
_RATIOS = frozenset({operator.truediv, torch.div, torch.true_divide, "div"})
_FILLS = frozenset({torch.masked_fill, "masked_fill"})
_CASTS = frozenset({"float", "half", "bfloat16", "double", "to", "contiguous", "clone"})
_SIZES = frozenset({"size", torch.ops.aten.sym_size.int})


def plain_sum(node: fx.Node) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """The sum or mean of all values, where nothing else reads them.

    Returns:
        The node, ``"sum"``, ``"mean"`` over rows and classes or ``"rowmean"`` over rows alone,
        and the nodes between.
    """
    user = _only_user(node)
    if user is None:
        return None
    if _is_whole(user):
        return user, "sum" if user.target in _SUMS else "mean", ()
    last = _only_user(user)
    a = arguments(user, "input dim keepdim dtype")
    by_class = user.target in _SUMS and _dims(user, node) == {len(shape_of(node)) - 1}
    if not by_class or last is None or set(a) - {"input", "dim"} or not _is_whole(last):
        return None
    return last, "sum" if last.target in _SUMS else "rowmean", (user,)


def tail_of(node: fx.Node, users: Iterable[fx.Node]) -> tuple[fx.Node, ...] | str:
    """What holds values per class after a node, in order, and the sums that end it.

    Returns:
        The nodes, or who reads the values in another way.
    """
    tail, pending = set[fx.Node](), [(node, user) for user in users]
    while pending:
        before, user = pending.pop()
        if user in tail:
            continue
        if _closes(user, before) or _reads_size(user, before):
            tail.add(user)
        elif _picks(user, before):
            chain = _checks(user)
            rest = [u for u in user.users if u not in chain]
            if not all(_is_whole(u) for u in rest):
                return f"{rest[0].name} reads {user.name}, a value for each class"
            tail |= {user, *chain, *rest}
        elif _acts_on_rows(user, before):
            tail.add(user)
            pending += [(user, then) for then in user.users]
        else:
            return f"{user.name} reads {before.name}, a value for each class"
    return tuple(sorted(tail))


class Replay:
    """Replays a tail on sums over classes, kept as one column.

    Attributes:
        columns: the column of each node that holds values per class.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, column: fx.Node) -> None:
        self.graph = graph
        self.columns = {node: column}
        self._masks: dict[fx.Node, tuple[fx.Node, Any]] = {}

    def run(self, tail: Iterable[fx.Node], classes: Any) -> None:
        """Put one column's nodes beside each node of a tail, and its sums in their places."""
        for node in tail:
            before = next((n for n in node.all_input_nodes if n in self.columns), None)
            if before is None:  # a check of how many rows were picked
                continue
            with self.graph.inserting_before(node):
                self._step(node, before, classes)

    def _step(self, node: fx.Node, before: fx.Node, classes: Any) -> None:
        column = self.columns[before]
        if before in self._masks and node.target in (*_SUMS, *_MEANS):
            self._close(node, self._picked_sum(node, before, classes))
        elif before in self._masks:
            return
        elif _closes(node, before):
            total = self._again(node, before, column)
            if node.target in _MEANS:
                total = emit(self.graph, operator.truediv, (total, classes), like=node)
            self._close(node, total)
        elif _reads_size(node, before):
            node.replace_all_uses_with(self._again(node, before, column))
        elif _picks(node, before):
            mask = loosely(node.args[1])
            rows = shape_of(before)[len(shape_of(mask)) : -1]
            for _ in range(len(shape_of(before)) - len(shape_of(mask))):
                mask = emit(self.graph, "unsqueeze", (mask, -1), like=node)
            self.columns[node] = emit(self.graph, torch.where, (mask, column, 0.0), like=node)
            self._masks[node] = (mask, rows)
        elif node.target in _CASTS:
            self.columns[node] = column
        elif node.target in RESHAPES:
            sizes = loosely(node.args[1:])
            sizes = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
            self.columns[node] = emit(self.graph, "reshape", (column, *sizes[:-1], 1), like=node)
        else:
            self.columns[node] = self._again(node, before, column)

    def _again(self, node: fx.Node, before: fx.Node, column: fx.Node) -> fx.Node:
        args = [column if a is before else a for a in node.args]
        return emit(self.graph, loosely(node.target), args, node.kwargs, like=node)

    def _picked_sum(self, node: fx.Node, before: fx.Node, classes: Any) -> fx.Node:
        total = emit(self.graph, "sum", (self.columns[before],), like=node)
        if node.target in _SUMS:
            return total
        mask, rows = self._masks[before]
        count = emit(self.graph, "sum", (mask,), like=node)
        for size in (*rows, classes):
            count = emit(self.graph, operator.mul, (count, size), like=node)
        return emit(self.graph, operator.truediv, (total, count), like=node)

    def _close(self, node: fx.Node, total: fx.Node) -> None:
        dtype = traced(node).dtype
        if traced(total).dtype != dtype:
            total = emit(self.graph, "to", (total, dtype), like=node)
        node.replace_all_uses_with(total)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is the sum or mean of all that it reads."""
    return node.target in (*_SUMS, *_MEANS) and len(node.args) == 1 and not node.kwargs


def _dims(node: fx.Node, before: fx.Node) -> set[int]:
    """The dimensions that a sum is over."""
    rank, dim = len(shape_of(before)), arguments(node, "input dim keepdim dtype").get("dim")
    if dim is None or dim in ((), []):
        return set(range(rank))
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return {d % rank for d in dims if isinstance(d, int)}


def _closes(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node is a sum or mean over the classes, and over others perhaps."""
    return node.target in (*_SUMS, *_MEANS) and len(shape_of(before)) - 1 in _dims(node, before)


def _reads_size(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node reads the number of something but classes."""
    dim = loosely(node.args[1]) if len(node.args) == 2 else None
    rank = len(shape_of(before))
    return node.target in _SIZES and isinstance(dim, int) and dim % rank != rank - 1


def _picks(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node picks rows by a mask."""
    if node.target is not operator.getitem or node.args[0] is not before:
        return False
    mask = traced(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        return False
    return 0 < mask.dim() < len(shape_of(before))


def _checks(node: fx.Node) -> set[fx.Node]:
    """What only checks how many rows were picked."""
    sizes = {user for user in node.users if user.target in _SIZES}
    bounds = {user for size in sizes for user in size.users}
    checks = {user for bound in bounds for user in bound.users}
    names = {getattr(check.target, "__name__", "") for check in checks}
    only = all("_assert_scalar" in name for name in names)
    comparing = {operator.ge, operator.le}
    fits = only and all(bound.target in comparing for bound in bounds)
    return sizes | bounds | checks if fits else set()


def _acts_on_rows(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node does the same to all classes of a row, and does not mix rows' classes."""
    others = [a for a in node.all_input_nodes if a is not before]
    by_row = all(not shape_of(a) or size_hint(shape_of(a)[-1]) == 1 for a in others)
    if node.target in _PRODUCTS:
        return by_row and len(node.args) == 2 and node.args[0] is not node.args[1]
    if node.target in _RATIOS:
        return by_row and node.args[0] is before and not node.kwargs
    if node.target in _FILLS:
        return by_row and node.args[0] is before and node.args[2:] == (0,)
    if node.target in _CASTS:
        return not others and traced(node).dtype.is_floating_point
    if node.target in (*_SUMS, *_MEANS):
        return not others  # over rows
    return shaped(node, Logits(before), None) is not None
