"""Products of two batches of matrices in a Dynamo graph, in any of their spellings."""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, shape_of
from memopt.passes.heads import loosely
from memopt.passes.row_losses import arguments
from memopt.passes.steps import TRANSPOSES, name_of

Order = tuple[int, ...]
_MATMULS = frozenset({operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm"})
_BADDBMMS = frozenset({torch.baddbmm, "baddbmm"})
_PERMUTES = frozenset({torch.permute, "permute"})


@dataclass(frozen=True)
class Operand:
    """A side of a product.

    Attributes:
        node: the tensor.
        order: its dimensions in the order of the batch, the rows, and what is summed over.
    """

    node: fx.Node
    order: Order

    def laid_out(self, graph: fx.Graph, like: fx.Node) -> fx.Node:
        """The tensor as `(batch, rows, summed)`, a view; the graph is positioned."""
        node, order, plain = self.node, self.order, _plain(len(self.order))
        while order != plain and (turn := _turn(node)) is not None:
            node, order = turn.node, tuple(turn.order[d] for d in order)
        if order == plain:
            return node
        return emit(graph, "permute", (self.node, *self.order), like=like)


@dataclass(frozen=True)
class Contraction:
    """``left @ right.mT * alpha + beta * added``, whose result is `(batch, rows, rows)`.

    Attributes:
        node: the product.
        left: the side whose rows are those of the result.
        right: the side whose rows are the result's columns.
        order: the result's dimensions as they are in the graph, each by its place in
            `(batch, rows of left, rows of right)`.
        alpha: a factor.
        added: what is added, or None.
        beta: its factor.
    """

    node: fx.Node
    left: Operand
    right: Operand
    order: Order
    alpha: float = 1.0
    added: fx.Node | None = None
    beta: float = 1.0

    @property
    def in_order(self) -> bool:
        """Whether the result is `(batch, rows of left, rows of right)`."""
        return self.order == _plain(len(self.order))

    def swapped(self) -> "Contraction":
        """The same product with its sides the other way round."""
        rank = len(self.order)
        other = {rank - 2: rank - 1, rank - 1: rank - 2}
        order = tuple(other.get(d, d) for d in self.order)
        return replace(self, left=self.right, right=self.left, order=order)


def contraction_of(node: fx.Node) -> Contraction | None:
    """The product that a node is; both sides have as many dimensions as the result."""
    target: Any = node.target
    if target in _MATMULS and not node.kwargs and len(node.args) == 2:
        return _of_matrices(node, *loosely(node.args))
    if target in _BADDBMMS:
        own = arguments(node, "input batch1 batch2")
        alpha, beta = own.pop("alpha", 1), own.pop("beta", 1)
        numbers = all(isinstance(n, (int, float)) for n in (alpha, beta))
        if len(own) != 3 or not numbers:
            return None
        added, left, right = (own[name] for name in ("input", "batch1", "batch2"))
        added = added if beta else None
        return _of_matrices(node, left, right, float(alpha), added, float(beta))
    if target is torch.einsum and not node.kwargs:
        equation, *sides = loosely(node.args)
        sides = sides[0] if len(sides) == 1 else sides
        if isinstance(equation, str) and len(sides) == 2:
            return _summed(node, equation, *sides)
    return None


def _of_matrices(
    node: fx.Node,
    left: Any,
    right: Any,
    alpha: float = 1.0,
    added: Any = None,
    beta: float = 1.0,
) -> Contraction | None:
    rank = len(shape_of(node))
    if rank < 3 or any(len(shape_of(n)) != rank for n in (left, right) if _is_node(n)):
        return None
    if not (_is_node(left) and _is_node(right)) or not (added is None or _is_node(added)):
        return None
    plain = _plain(rank)
    turned = (*plain[:-2], rank - 1, rank - 2)
    sides = Operand(left, plain), Operand(right, turned)
    return Contraction(node, *sides, plain, alpha, added, beta)


def _summed(node: fx.Node, equation: str, a: Any, b: Any) -> Contraction | None:
    """``einsum("bhid,bhjd->bhij", a, b)``, with any letters in any order, but each one once."""
    terms, _, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(letters) != 2 or not (_is_node(a) and _is_node(b)):
        return None
    one, other = letters
    if any(len(set(term)) != len(term) or "." in term for term in (one, other, result)):
        return None
    batch = [n for n in result if n in one and n in other]
    rows = [n for n in result if n in one and n not in other]
    columns = [n for n in result if n in other and n not in one]
    summed = [n for n in one if n in other and n not in result]
    whole = len(batch) + 2 == len(one) == len(other) == len(result)
    if not whole or not len(rows) == len(columns) == len(summed) == 1:
        return None
    left = Operand(a, tuple(one.index(n) for n in (*batch, *rows, *summed)))
    right = Operand(b, tuple(other.index(n) for n in (*batch, *columns, *summed)))
    standard = [*batch, *rows, *columns]
    return Contraction(node, left, right, tuple(standard.index(n) for n in result))


def _turn(node: fx.Node) -> Operand | None:
    """What a node has the dimensions of, in another order."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    rank, rest = len(shape_of(source)), loosely(node.args[1:])
    if node.target in TRANSPOSES and len(rest) == 2:
        order = list(range(rank))
        first, second = rest
        order[first], order[second] = order[second], order[first]
        return Operand(source, tuple(order))
    if node.target == "mT" or (name_of(node) == "getattr" and rest == ("mT",)):
        return Operand(source, (*range(rank - 2), rank - 1, rank - 2))
    if node.target in _PERMUTES:
        dims = rest[0] if len(rest) == 1 else rest
        return Operand(source, tuple(d % rank for d in dims))
    return None


def _plain(rank: int) -> Order:
    return tuple(range(rank))


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)
