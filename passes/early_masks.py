"""Take a mask as soon as what it is of is there.

What autograd needs of a value alone, such as where a ReLU's input was positive, it asks for amid
the backward, and there it stands in the joint graph. Held for the backward, it would be made at
the end of the forward, and what it is made of would be alive until then: a plan that holds bits
instead of numbers would save nothing.

Runs under a budget only. Pays: whatever is larger than what is made of it. Exact: nothing but the
order changes.

Source: masks instead of values are Gist's: Jain et al. (2018), doi:10.1109/ISCA.2018.00070.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.graph import backward_nodes, is_recomputable, is_view, tensors
from memopt.pipeline import PassContext


@dataclass(frozen=True)
class EarlyMasks:
    """``...; m = x <= 0`` amid the backward -> ``x = relu(y); m = x <= 0; ...``."""

    name: ClassVar[str] = "early_masks"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if ctx.config.memory_budget.kind == "none":
            return 0
        late = backward_nodes(graph)
        order = {node: place for place, node in enumerate(graph.nodes)}
        turn = min((order[n] for n in late if n.op == "call_function"), default=len(order))
        last: dict[fx.Node, fx.Node] = {}  # of what was moved behind a node
        moves = 0
        for node in list(graph.nodes):
            if order[node] < turn or node in late or not _is_smaller(node):
                continue
            moved = _with_views(node, order, turn)
            behind = max(
                (n for m in moved for n in m.all_input_nodes if n not in moved),
                key=order.__getitem__,
                default=node,
            )
            if order[behind] >= turn or behind.op == "placeholder":
                continue
            for own in moved:
                last.get(behind, behind).append(own)
                order[own], last[behind] = order[behind], own
            moves += 1
        return moves


def _is_smaller(node: fx.Node) -> bool:
    """Whether a value takes fewer bytes than something that it is made of."""
    if is_view(node) or not is_recomputable(node):
        return False
    return 0 < _nbytes(node) < max(map(_nbytes, node.all_input_nodes), default=0)


def _nbytes(node: fx.Node) -> int:
    """Of what has a size that does not change; 0 of the rest."""
    values = tensors(node.meta.get("val"))
    known = all(isinstance(size, int) for value in values for size in value.shape)
    return sum(value.nbytes for value in values) if known else 0


def _with_views(node: fx.Node, order: dict[fx.Node, int], turn: int) -> list[fx.Node]:
    """The node and, before it, the views amid the backward that it reads through."""
    found, stack = [node], [*node.all_input_nodes]
    while stack:
        source = stack.pop()
        if order[source] >= turn and is_view(source) and source not in found:
            found.append(source)
            stack.extend(source.all_input_nodes)
    return sorted(found, key=order.__getitem__)
