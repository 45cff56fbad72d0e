"""How many rows of a chunked operator exist at a time, where the budget has a say.

Operators start with enough rows that their products run at full speed. Where a plan does not fit
and such an operator holds the peak, its chunks are halved and the graph is planned again, down to
a size below which nothing is gained. An operator that can do without logits in memory does so
after that: its ``chunk_rows`` is then 0. Where a plan leaves room the chunks that memopt chose are
doubled, as long as products gain from it.
"""

from collections.abc import Callable, Mapping

from torch import fx

from memopt._torch import OpOverload, pytree, size_hint
from memopt.errors import PlanError
from memopt.joint import JointGraph
from memopt.kernels import cut_table
from memopt.kernels.blocks import default_chunk_rows
from memopt.planner.problem import Candidate

LEAST_ROWS = 16
# On a CPU more rows than this were no faster, and slower where they no longer fit its caches.
_MOST_CPU_ROWS = 1024


def halve_chunks(joint: JointGraph, candidate: Candidate) -> bool:
    """Halve the chunks of the operator that holds a plan's peak; False where none does."""
    live = candidate.liveness.live_bytes
    if not live:
        return False
    schedule = candidate.liveness.schedule
    at = (*schedule.forward, *schedule.backward)[live.index(max(live))]
    node = joint.nodes[at]
    place = _place(node)
    if place is None:
        return False
    rows = node.args[place]
    if not isinstance(rows, int) or rows == 0:
        return False
    if rows <= LEAST_ROWS:
        cut = _can_be_cut(node)
        if cut:
            node.update_arg(place, 0)
        return cut
    node.update_arg(place, max(LEAST_ROWS, min(rows, _all_rows(node)) // 2))
    return True


def double_chunks(joint: JointGraph, fits: Callable[[], bool], *, on_cpu: bool) -> None:
    """Double the rows of a chunk of every operator as often as the graph still fits.

    Operators whose rows were asked for by the user keep them.

    Args:
        joint: the graph.
        fits: whether it does as it is now; asked after every change.
        on_cpu: whether the graph runs on one.
    """
    for node in joint.nodes:
        place = _place(node)
        if place is None or node.args[place] != _default_rows(node):
            continue
        rows, all_rows = _default_rows(node), _all_rows(node)
        most = min(all_rows, _MOST_CPU_ROWS) if on_cpu else all_rows
        while rows < most:
            node.update_arg(place, min(2 * rows, most))
            if not fits():
                node.update_arg(place, rows)
                break
            rows = min(2 * rows, most)


def highest_in_chunks(joint: JointGraph, candidate: Candidate) -> int:
    """The most bytes alive while a chunked operator runs."""
    schedule, live = candidate.liveness.schedule, candidate.liveness.live_bytes
    order = (*schedule.forward, *schedule.backward)
    own = (b for i, b in zip(order, live, strict=True) if _place(joint.nodes[i]) is not None)
    return max(own, default=0)


def _all_rows(node: fx.Node) -> int:
    """Rows of a chunked operator's first input, as many as tracing saw."""
    rows: int = size_hint(node.all_input_nodes[0].meta["val"].shape[0])
    return rows


def _default_rows(node: fx.Node) -> int:
    """Rows of a chunk of an operator for which nobody asked for any."""
    against = node.args[1].meta["val"]  # type: ignore[union-attr]  # what meets every row
    return default_chunk_rows(_all_rows(node), size_hint(against.shape[0]), against.device)


def _can_be_cut(node: fx.Node) -> bool:
    """Whether an operator can do without logits in memory."""
    can = cut_table().get(str(node.target.overloadpacket))  # type: ignore[union-attr]
    args = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), node.args)
    return can is not None and can(*args)


def chunk_rows(joint: JointGraph) -> dict[str, int]:
    """Rows of a chunk of every chunked operator, by the name of its node."""
    places = {node: _place(node) for node in joint.nodes}
    return {n.name: int(n.args[p]) for n, p in places.items() if p is not None}  # type: ignore[arg-type]


def set_chunk_rows(joint: JointGraph, rows: Mapping[str, int]) -> None:
    """Give chunked operators these many rows a chunk.

    Raises:
        PlanError: 0 for an operator that cannot do without logits.
    """
    for node in joint.nodes:
        place = _place(node)
        if place is not None and node.name in rows:
            if rows[node.name] == 0 and not _can_be_cut(node):
                raise PlanError(
                    f"the plan gives {node.name} chunk_rows=0, and it cannot do without logits "
                    "here: plan again"
                )
            node.update_arg(place, rows[node.name])


def _place(node: fx.Node) -> int | None:
    """Position of the argument ``chunk_rows``; None for other operators."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "memopt":
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return names.index("chunk_rows") if "chunk_rows" in names else None
