"""Cut stretches of row-wise operators into pieces of their rows.

A feed-forward layer makes values several times as wide as what it reads and returns, and each row
of them depends on that row alone. Computed by pieces of the rows, only a piece of them exists at
a time, forward and backward; what is summed over rows, as weight gradients are, is summed piece by
piece. The planner keeps, recomputes or moves each piece as any other value.

Runs under a budget that no plan fits otherwise, and for the lowest peak. Pays: the bytes of wide
values, at a peak among them. Does not: in time, by smaller products and by putting pieces
together. Exact up to the order of sums over rows.

Sources: tiled MLP is of Arctic Long Sequence Training: Bekman et al. (2025), arXiv:2506.13996;
finding such stretches in a graph, of AutoChunk: Zhao et al. (2024), arXiv:2401.10652, for
inference. That the pieces are the planner's to keep, and that both halves are cut alike, is
memopt's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memopt._torch import pytree, stable_topological_sort
from memopt.cutters import Regions, Trial
from memopt.graph import aten, backward_nodes
from memopt.passes.joint_nodes import call
from memopt.passes.stretches import VIEWS, Role, Stretch, numel, stretch_of


@dataclass(frozen=True)
class CutRows:
    """``y = mm(f(mm(x, w)), v)`` -> ``y = cat(mm(f(mm(x[r], w)), v) for r in pieces)``.

    Attributes:
        most: pieces of a stretch, a power of two.
    """

    name: ClassVar[str] = "cut_rows"
    covers: ClassVar[str] = "what is as wide as"
    most: int = 16

    def more(self, trial: Trial) -> Mapping[str, int]:
        """At first the largest value of the peak that can be cut, in two; then twice as many."""
        for name, pieces in trial.pieces.items():
            return {name: 2 * pieces} if 2 * pieces <= self.most else {}
        by_name = {node.name: node for node in trial.graph.nodes}
        alive = [name for name in trial.liveness.alive_at_peak() if name in by_name]
        first = next((name for name in alive if stretch_of(by_name[name], 2)), None)
        return {} if first is None else {first: 2}

    def __call__(self, graph: fx.Graph, pieces: Mapping[str, int]) -> Regions:
        """Cut every stretch that is as wide as a value.

        Args:
            graph: a joint graph; changed in place.
            pieces: how many, by the name of the value.

        Returns:
            What was cut, by its first node.
        """
        regions: dict[str, list[str]] = {}
        for name, count in pieces.items():
            entries = next((numel(node) for node in graph.nodes if node.name == name), 0)
            done: set[fx.Node] = set()
            for node in [node for node in graph.nodes if numel(node) == entries > 0]:
                if node not in done and (stretch := stretch_of(node, count)):
                    done.update(stretch.members)
                    regions[node.name] = [member.name for member in stretch.members]
                    _cut(graph, stretch)
            stable_topological_sort(graph)
            graph.lint()
        return regions


Copies = dict[Any, fx.Node]
"""Of one piece: each member, and each value from outside by its role."""


def _cut(graph: fx.Graph, stretch: Stretch) -> None:
    """Put pieces in the place of a stretch: of its forward, and of its backward."""
    late = backward_nodes(graph)
    nodes = list(graph.nodes)
    ordered = [node for node in nodes if node in stretch.members]
    turn = next((n for n in nodes if n in late and n.op == "call_function"), nodes[-1])
    ahead = set(nodes[: nodes.index(turn)])
    made: list[Copies] = [{} for _ in range(stretch.pieces)]
    sums: dict[fx.Node, fx.Node] = {}
    for half in ([n for n in ordered if n in ahead], [n for n in ordered if n not in ahead]):
        if not half:
            continue
        with graph.inserting_before(half[-1]):
            for number, copies in enumerate(made):
                for node in half:
                    if stretch.members[node] is Role.SUM:
                        sums[node] = _add_up(graph, stretch, node, number, copies, sums.get(node))
                    else:
                        copies[node] = _piece(graph, stretch, node, number, copies)
            for node in half:
                if stretch.is_returned(node):
                    whole = sums.get(node) or _put_together(graph, stretch, node, made)
                    for user in [user for user in node.users if user not in stretch.members]:
                        user.replace_input_with(node, whole)
    for node in reversed(ordered):
        graph.erase_node(node)


def _put_together(
    graph: fx.Graph, stretch: Stretch, node: fx.Node, made: Sequence[Copies]
) -> fx.Node:
    pieces = [copies[node] for copies in made]
    shape, rows = [*node.meta["val"].shape], [stretch.each, *stretch.piece_shape(node)[2:]]
    if stretch.piece_shape(node)[: stretch.lead(node)] != [1, stretch.each]:
        return call(graph, aten.cat.default, pieces, like=node)
    flat = [call(graph, aten.view.default, piece, rows, like=node) for piece in pieces]
    whole = call(graph, aten.cat.default, flat, like=node)
    return call(graph, aten.view.default, whole, shape, like=node)


def _add_up(
    graph: fx.Graph,
    stretch: Stretch,
    node: fx.Node,
    number: int,
    copies: Copies,
    before: fx.Node | None,
) -> fx.Node:
    """The sum over the rows of this piece and those before it."""
    if before is None:
        return _piece(graph, stretch, node, number, copies)
    if node.target is aten.mm.default:
        left, right = _arguments(graph, stretch, node, number, copies)[0]
        return call(graph, aten.addmm.default, before, left, right, like=node)
    more = _piece(graph, stretch, node, number, copies)
    return call(graph, aten.add.Tensor, before, more, like=node)


def _piece(
    graph: fx.Graph,
    stretch: Stretch,
    node: fx.Node,
    number: int,
    copies: Copies,
) -> fx.Node:
    args, kwargs = _arguments(graph, stretch, node, number, copies)
    if node.target in VIEWS:
        args = (args[0], stretch.piece_shape(node))
    return call(graph, node.target, *args, like=node, **kwargs)


def _arguments(
    graph: fx.Graph,
    stretch: Stretch,
    node: fx.Node,
    number: int,
    copies: Copies,
) -> tuple[Any, Any]:
    """What a piece of a node is computed from: pieces of members, and of what is outside."""

    def piece_of(source: fx.Node) -> fx.Node:
        role = stretch.reads[node].get(source, Role.WHOLE)
        if role is Role.WHOLE:
            return source
        if source in stretch.members:
            return copies[source]
        if (source, role) not in copies:
            piece, start = source, number * stretch.each
            columns = [(1, start, start + stretch.each)]
            for place in columns if role is Role.COLUMNS else stretch.places(source, number):
                piece = call(graph, aten.slice.Tensor, piece, *place, like=source)
            copies[source, role] = piece
        return copies[source, role]

    args, kwargs = pytree.tree_map_only(fx.Node, piece_of, (node.args, node.kwargs))
    return args, kwargs
