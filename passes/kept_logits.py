"""Returns logits that a chunked loss has written down, in the place of a product of their own.

This is done where one cross-entropy, reduced to a scalar, is all that reads the logits, and reads
all rows in their order. What the graph does to the product before it returns it is then done to
what the operator kept.
"""

import operator
from collections.abc import Container, Sequence

import torch
from torch import fx

from memopt.emit import emit, extent, shape_of
from memopt.kernels.kept_logits import KEPT, LOGITS
from memopt.passes.heads import Head, loosely, overwriter
from memopt.passes.logits import RESHAPES, Logits, follow
from memopt.passes.row_losses import Loss
from memopt.passes.steps import overwrites


def keep(
    head: Head, loss: Loss, call: fx.Node, returned: Sequence[Logits], output: fx.Node
) -> bool:
    """Compute returned logits from what a chunked loss keeps; False where that cannot be.

    Args:
        head: of the logits.
        loss: what reads them.
        call: the operator that has taken its place.
        returned: the logits that the graph returns.
        output: its output.
    """
    members = follow(head)[0]
    steps = sorted(set[fx.Node]().union(*(_steps(head, r.node, members) for r in returned)))
    others = {n for step in steps for n in step.all_input_nodes} - members.keys()
    if not returned or not _in_order(head, loss) or any(map(overwrites, steps)):
        return False
    if overwriter(others, head.node, output):
        return False
    graph = call.graph
    with graph.inserting_before(call):
        kept = emit(graph, KEPT, call.args, like=call)
    call.replace_all_uses_with(kept)
    graph.erase_node(call)
    with graph.inserting_before(output):
        product = emit(graph, operator.getitem, (kept, LOGITS), like=kept)
        sizes = [extent(graph, head.hidden, d) for d in range(len(shape_of(head.hidden)) - 1)]
        places = {head.node: emit(graph, "reshape", (product, *sizes, -1), like=kept)}
        for step in steps:
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda n: places.get(n, n))
            places[step] = emit(graph, loosely(step.target), args, kwargs, like=kept)
    for logits in returned:
        output.replace_input_with(logits.node, places[logits.node])
    return True


def _in_order(head: Head, loss: Loss) -> bool:
    """Whether the operator of a loss meets every row of the head's product, in order."""
    shapes = (*RESHAPES, "flatten", torch.flatten)
    in_order = all(step.target in shapes for step in loss.logits.path)
    as_made = loss.logits.biases == ((head.bias,) if head.bias else ())
    return in_order and as_made and not head.path and head.classes_at == -1


def _steps(head: Head, node: fx.Node, members: Container[fx.Node]) -> set[fx.Node]:
    """The nodes between the product and some logits, these included."""
    found, todo = set[fx.Node](), [node]
    while todo:
        at = todo.pop()
        if at is not head.node and at not in found:
            found.add(at)
            todo += [n for n in at.all_input_nodes if n in members]
    return found
