"""Joint graph and saved set to a forward and a backward graph, checked against each other."""

from collections.abc import Iterable, Sequence

from torch import fx

from memopt._torch import (
    NodeInfo,
    extract_forward_and_backward,
    is_sym_node,
    raise_getitems,
    thread_graphsafe_rng_from_hops,
)
from memopt.errors import PartitionError
from memopt.joint import JointGraph
from memopt.schedule import Schedule


def partition(
    gm: fx.GraphModule, info: NodeInfo, schedule: Schedule, *, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split ``gm`` so that exactly the saved set crosses, and both halves run in schedule order.

    Inputs that the backward reads cross as well: they cost no memory of the step's.

    Raises:
        PartitionError: the halves do not fit together: a bug in memopt.
    """
    joint = schedule.joint
    if again := [i for i in schedule.recomputed if not joint.recomputable[i]]:
        names = [joint.nodes[i].name for i in again[:5]]
        raise PartitionError(f"bug in memopt: {names} may not run twice, and the plan does so")
    chosen = [joint.nodes[i] for i in sorted(schedule.saved)]
    crossing = [*info.inputs, *(n for n in chosen if n.op != "placeholder")]
    symbols = [n for n in crossing if is_sym_node(n)]
    values = [n for n in crossing if not is_sym_node(n)]
    forward, backward = extract_forward_and_backward(
        gm,
        values,
        saved_sym_nodes=symbols,
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_nodes=info.static_lifetime_input_nodes,
    )
    reorder(backward.graph, _names(joint, schedule.backward))
    forward, backward = raise_getitems(forward), raise_getitems(backward)
    forward = thread_graphsafe_rng_from_hops(forward, is_backward=False)
    backward = thread_graphsafe_rng_from_hops(backward, is_backward=True)
    check_halves(forward, backward, num_fwd_outputs)
    return forward, backward


def reorder(graph: fx.Graph, names: Sequence[str]) -> None:
    """Move the named nodes into the given order, each after what it needs.

    Nodes that are not named keep their place relative to each other, at the end.
    """
    (output,) = graph.find_nodes(op="output")
    by_name = {n.name: n for n in graph.nodes if n.op not in ("placeholder", "output")}
    placed: set[fx.Node] = set()
    rest = [n for n in graph.nodes if n.name in by_name]
    position = {n: i for i, n in enumerate(rest)}
    for root in [*(by_name[name] for name in names if name in by_name), *rest]:
        for node in _missing(root, placed, position):
            output.prepend(node)
            placed.add(node)
    graph.lint()


def _missing(root: fx.Node, placed: set[fx.Node], position: dict[fx.Node, int]) -> list[fx.Node]:
    """``root`` and what it needs that is not placed yet, in the order of the graph."""
    found: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node in placed or node in found or node not in position:
            continue
        found.add(node)
        stack.extend(node.all_input_nodes)
    return sorted(found, key=position.__getitem__)


def check_halves(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int) -> None:
    """Check that what ``forward`` saves is what ``backward`` expects, by name and type.

    Raises:
        PartitionError: by name or by type, what one sends is not what the other receives.
    """
    (output,) = forward.graph.find_nodes(op="output")
    sent = [n for n in output.args[0][num_fwd_outputs:] if isinstance(n, fx.Node)]
    received = [
        n
        for n in backward.graph.find_nodes(op="placeholder")
        if not n.name.startswith(("tangents", "bwd_seed", "bwd_base", "bwd_rng_state"))
    ]
    left, right = ({n.name: _type(n) for n in side} for side in (sent, received))
    if left != right:
        lost = sorted(left.items() ^ right.items(), key=str)
        raise PartitionError(
            f"bug in memopt: the forward saves {len(left)} values and the backward expects "
            f"{len(right)}; they differ in {lost[:6]}"
        )


def _type(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return (str(getattr(value, "dtype", type(value))), *map(str, getattr(value, "shape", ())))


def _names(joint: JointGraph, order: Iterable[int]) -> list[str]:
    return [joint.nodes[i].name for i in order]
