"""What passes over a joint graph share: finding what the backward reads, and replacing it."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from memopt._torch import pytree
from memopt.graph import is_view


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call, evaluated on the fake values of its arguments.

    Args:
        graph: the graph, positioned by ``graph.inserting_before``.
        target: an operator.
        args: its arguments.
        like: the node whose source line the new one inherits.
        kwargs: more arguments, by keyword.
    """
    node = graph.call_function(target, args, kwargs)
    seen, named = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (args, kwargs))
    node.meta.update(like.meta, val=target(*seen, **named))
    return node


def late_reads(own: fx.Node, late: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Where the backward reads a value or a view of it: which of them, and the reader.

    Args:
        own: the value.
        late: as ``memopt.graph.backward_nodes`` gives it.
    """
    for user in own.users:
        if user in late:
            yield own, user
        elif user.op == "call_function" and is_view(user):
            yield from late_reads(user, late)


def same_view(graph: fx.Graph, source: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The view of another value that ``source`` is of its own; at the end of the graph.

    Args:
        graph: the graph.
        source: a value among ``copies``, or a view of one.
        copies: what stands for what; takes the view.
    """
    if source not in copies:
        same_view(graph, source.all_input_nodes[0], copies)
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(output):
            copies[source] = graph.node_copy(source, lambda n: copies.get(n, n))
        seen = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], copies[source].args)
        copies[source].meta["val"] = source.target(*seen)  # type: ignore[operator]
    return copies[source]
