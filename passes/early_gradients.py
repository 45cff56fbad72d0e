"""Compute the gradient of a weight before that of the layer's input.

Both are products with the gradient of the layer's result, and autograd asks for the input's first.
But the input's gradient takes as many bytes as the input, which is dead once the weight's gradient
is there: in the other order one of the two is alive, not both.

Runs under a budget only. Pays: up to the bytes of one activation, at a peak in a backward. Does
not: in time. Exact: nothing but the order changes.

Source: lower peaks by order alone are the subject of Steiner et al. (2023), "MODeL: Memory
Optimizations for Deep Learning", arXiv:2210.12924, as an integer program over all orders.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.graph import TURNS, OpKind, backward_nodes, is_view, op_kind
from memopt.pipeline import PassContext


@dataclass(frozen=True)
class EarlyGradients:
    """``dx = mm(dy, w); dw = mm(dy.t(), x)`` -> ``dw = mm(dy.t(), x); dx = mm(dy, w)``."""

    name: ClassVar[str] = "early_gradients"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if ctx.config.memory_budget.kind == "none":
            return 0
        late = backward_nodes(graph)
        order = {node: place for place, node in enumerate(graph.nodes)}
        ahead: dict[fx.Node, int] = {}  # of which place what was moved now stands
        moves = 0
        for product in list(graph.nodes):
            if product not in late or op_kind(product) is not OpKind.EXTERN:
                continue
            tail = _tail(product)
            inner = (n for n in _beside(product, late) if _tail(n) is None)
            other = min(inner, key=order.__getitem__, default=product)
            at = order[other]
            needed = _from(product, at, order)
            if tail is None or at >= order[product] or any(map(_runs, needed & late)):
                continue
            head = [node for node in needed if ahead.get(node, len(order)) > at]
            for node in (*sorted(head, key=order.__getitem__), product, *tail):
                other.prepend(node)
                ahead[node] = at
            moves += 1
        return moves


def _tail(product: fx.Node) -> list[fx.Node] | None:
    """What is made of a gradient on its way out, in order; None where anything else reads it."""
    found = [product]
    for node in found:
        for user in node.users:
            if user.op != "output" and user not in found:
                if not set(user.all_input_nodes).issubset(found):
                    return None
                found.append(user)
    return found[1:] if product.users else None


def _beside(product: fx.Node, late: set[fx.Node]) -> Iterator[fx.Node]:
    """Other products with the same gradient, or its transpose."""
    for factor in product.all_input_nodes:
        while factor.target in TURNS:
            factor = factor.all_input_nodes[0]
        if factor in late:
            yield from (
                u for u in factor.users if op_kind(u) is OpKind.EXTERN and u is not product
            )


def _runs(node: fx.Node) -> bool:
    return not is_view(node)


def _from(node: fx.Node, place: int, order: dict[fx.Node, int]) -> set[fx.Node]:
    """What a node needs that comes after a place."""
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        needed = stack.pop()
        if order[needed] > place and needed not in found:
            found.add(needed)
            stack.extend(needed.all_input_nodes)
    return found
