"""Keep a matrix product where it is, when the sum that it goes into comes much later.

Inductor turns ``mm`` and a later ``add`` into one ``addmm`` at the place of the ``add``, which
holds the operands until then. With tied embeddings those are the gradients of the logits, held
through the whole backward. ``x - (-m)`` equals ``x + m`` to the bit, and is left alone.

Runs under a budget only. Never pays in time: the sum is a loop of its own.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.graph import aten, stretches
from memopt.pipeline import PassContext

_PRODUCTS = (aten.mm.default, aten.bmm.default)


@dataclass(frozen=True)
class EarlyProducts:
    """``m = mm(a, b); mm(...); add(x, m)`` -> ``m = mm(a, b); mm(...); sub(x, neg(m))``."""

    name: ClassVar[str] = "early_products"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if ctx.config.memory_budget.kind == "none":
            return 0
        stretch = stretches(graph)
        rewrites = 0
        for add in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            product = _late_product(add, stretch)
            if product is None:
                continue
            (other,) = (n for n in add.all_input_nodes if n is not product)
            with graph.inserting_before(add):
                negative = graph.call_function(aten.neg.default, (product,))
                total = graph.call_function(aten.sub.Tensor, (other, negative))
            negative.meta.update(product.meta)
            total.meta.update(add.meta)
            add.replace_all_uses_with(total)
            graph.erase_node(add)
            rewrites += 1
        return rewrites


def _late_product(add: fx.Node, stretch: dict[fx.Node, int]) -> fx.Node | None:
    """The product in a plain sum of two tensors with library calls between it and the sum."""
    if add.kwargs or len(add.args) != 2 or len(set(add.all_input_nodes)) != 2:
        return None
    for node in add.all_input_nodes:
        if node.target in _PRODUCTS and stretch[add] > stretch[node] + 1:
            return node
    return None
