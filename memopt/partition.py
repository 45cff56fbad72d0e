"""Joint graph and saved set to a forward and a backward graph, checked against each other."""

import operator
from collections.abc import Collection, Iterable, Sequence

from torch import fx

from memopt._torch import (
    NodeInfo,
    extract_forward_and_backward,
    is_sym_node,
    raise_getitems,
    thread_graphsafe_rng_from_hops,
)
from memopt.errors import PartitionError
from memopt.graph import is_check, is_collective
from memopt.joint import Encoding, JointGraph
from memopt.kernels.host import ARRIVED, FROM_HOST, LEFT
from memopt.memory.schedule import Schedule


def partition(
    gm: fx.GraphModule, info: NodeInfo, schedule: Schedule, *, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split ``gm`` so that exactly the saved set crosses, and both halves run in schedule order.

    Inputs that the backward reads cross as well: they cost no memory of the step's. What is held
    in another form is encoded right where it is made, and decoded by the schedule.

    Raises:
        PartitionError: the halves do not fit together: a bug in memopt.
    """
    joint = schedule.joint
    if again := [i for i in schedule.recomputed if not joint.recomputable[i]]:
        names = [joint.nodes[i].name for i in again[:5]]
        raise PartitionError(f"bug in memopt: {names} may not run twice, and the plan does so")
    used = [e for e in joint.encodings if e.encoded in schedule.saved]
    source = {e.encoded: e.source for e in used}
    chosen = [joint.nodes[source.get(i, i)] for i in sorted(schedule.saved)]
    crossing = [*info.inputs, *(n for n in chosen if n.op != "placeholder")]
    symbols = [n for n in crossing if is_sym_node(n)]
    _check_once(n for n in joint.nodes if n not in info.tangents_closure)
    values = [n for n in crossing if not is_sym_node(n)]
    forward, backward = extract_forward_and_backward(
        gm,
        values,
        saved_sym_nodes=symbols,
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_nodes=info.static_lifetime_input_nodes,
    )
    early, late = set(_names(joint, schedule.forward)), set(_names(joint, schedule.backward))
    _leave_to_the_other(forward.graph, late - early)
    closure = {node.name for node in info.tangents_closure}
    _leave_to_the_other(backward.graph, {node.name for node in joint.nodes} - closure - late)
    for encoding in used:
        _encode(forward.graph, joint, encoding)
        _decode(backward.graph, joint, encoding)
    reorder(backward.graph, _names(joint, schedule.backward))
    forward, backward = raise_getitems(forward), raise_getitems(backward)
    forward = thread_graphsafe_rng_from_hops(forward, is_backward=False)
    backward = thread_graphsafe_rng_from_hops(backward, is_backward=True)
    _wait_for_copies(forward.graph, backward.graph, schedule)
    check_halves(forward, backward, num_fwd_outputs)
    return forward, backward


def _check_once(nodes: Iterable[fx.Node]) -> None:
    """Let the forward alone run its checks, such as that ``one_hot`` is given classes.

    They count as effects, so torch has them in both halves: the backward would compute again all
    that they look at, of inputs that may have been overwritten since.
    """
    for node in filter(is_check, nodes):
        node.meta["partitioner_tag"] = "must_be_in_forward"


def _leave_to_the_other(half: fx.Graph, names: Collection[str]) -> None:
    """Erase collectives that this half is not to run.

    A wait counts as an effect, so torch keeps it in both halves where its collective could run,
    though nothing reads it there: it would run twice, and on some ranks only.
    """
    erased = True
    while erased:  # what one was made of may be another's
        erased = False
        for node in reversed(half.nodes):
            is_part = node.target is operator.getitem
            if node.name in names and not node.users and (is_part or is_collective(node)):
                half.erase_node(node)
                erased = True
        if erased:
            half.eliminate_dead_code()


def _encode(forward: fx.Graph, joint: JointGraph, encoding: Encoding) -> None:
    """Let a value leave the forward in another form."""
    (output,) = forward.find_nodes(op="output")
    name = joint.nodes[encoding.source].name
    value = next(node for node in forward.nodes if node.name == name)
    copies = {joint.nodes[encoding.source]: value}
    with forward.inserting_before(value.next):
        for i in encoding.inner:
            if i <= encoding.encoded:
                _copy(forward, joint.nodes[i], copies)
    output.replace_input_with(value, copies[joint.nodes[encoding.encoded]])


def _decode(backward: fx.Graph, joint: JointGraph, encoding: Encoding) -> None:
    """Let the backward take a value in another form."""
    source, encoded = joint.nodes[encoding.source], joint.nodes[encoding.encoded]
    value = next(n for n in backward.find_nodes(op="placeholder") if n.name == source.name)
    with backward.inserting_before(value):
        taken = backward.placeholder(encoded.name)
    taken.name = encoded.name
    taken.meta.update(encoded.meta)
    copies = {encoded: taken}
    with backward.inserting_before(min(value.users)):
        for i in encoding.inner:
            if i > encoding.encoded:
                _copy(backward, joint.nodes[i], copies)
    value.replace_all_uses_with(copies[joint.nodes[encoding.decoded]])
    backward.erase_node(value)


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    """Copy a joint node into a half under its own name, by which halves and schedules agree.

    Torch gives a half the joint graph's names as taken, so a copy would get another one.
    """
    copies[node] = graph.node_copy(node, copies.__getitem__)
    copies[node].name = node.name


def _wait_for_copies(forward: fx.Graph, backward: fx.Graph, schedule: Schedule) -> None:
    """Hold values until they have left, and read them once they are back."""
    by_name = {node.name: node for node in forward.nodes}
    for i, last in schedule.leaves.items():
        names = [schedule.joint.nodes[at].name for at in schedule.forward[: last + 1]]
        behind = next(by_name[name] for name in reversed(names) if name in by_name)
        with forward.inserting_after(behind):
            left = forward.call_function(LEFT, (by_name[schedule.joint.nodes[i].name],))
        left.meta["val"] = None
    for copy in backward.find_nodes(op="call_function", target=FROM_HOST):
        with backward.inserting_before(min(copy.users)):
            arrived = backward.call_function(ARRIVED, (copy,))
        arrived.meta["val"] = None


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
