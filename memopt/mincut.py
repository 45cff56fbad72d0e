"""The cheapest saved set at a given price per byte: one minimum cut.

For each node two binary choices: ``a`` (its value is available to the backward) and ``r`` (it
got there by recomputation). Needed values have ``a = 1``; ``r = 1`` needs ``a = 1`` of every
input; ``a = 1, r = 0`` means saved. Minimise

    sum over recomputed nodes of seconds  +  sum over saved nodes of seconds to save.

Every term is an edge: ``source -> a`` (needed, infinite), ``a -> r`` (price of saving), ``r ->
sink`` (seconds to recompute), ``r -> a of each input`` (infinite). So the minimum cut is exact,
and a node that serves many is recomputed, and paid for, once.

Source: the construction is project selection (Picard, 1976). Torch's min-cut partitioner cuts
saved bytes alone, with recomputation free or banned; here recomputation has its own price, and
the sweep over prices per byte gives the convex hull of (saved bytes, recompute seconds).
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_INFINITE = 2**30
_FORBIDDEN = _INFINITE - 1  # so that a needed node whose both prices are infinite stays reachable
_SCALE = 2**29


def cheapest_saved_set(
    inputs: Sequence[Sequence[int]],
    needed: Sequence[int],
    save_seconds: Sequence[float],
    recompute_seconds: Sequence[float],
) -> frozenset[int]:
    """Choose which nodes to save.

    Args:
        inputs: inputs of each node, by index.
        needed: nodes whose value the backward reads.
        save_seconds: price of saving each node; ``inf`` forbids it, 0 is free.
        recompute_seconds: price of running each node again; ``inf`` forbids it.

    Returns:
        The saved nodes. A needed node that may be neither saved nor recomputed is saved.
    """
    n = len(inputs)
    relevant = _ancestors(inputs, needed)
    if not relevant:
        return frozenset()
    finite = [recompute_seconds[i] for i in relevant if recompute_seconds[i] != float("inf")]
    finite += [save_seconds[i] for i in relevant if save_seconds[i] != float("inf")]
    scale = _SCALE / max(sum(finite), 1e-30)
    source, sink = 2 * n, 2 * n + 1
    edges: list[tuple[int, int, int]] = [(source, i, _INFINITE) for i in needed]
    for i in relevant:
        edges.append((i, n + i, _capacity(save_seconds[i], scale)))
        edges.append((n + i, sink, _capacity(recompute_seconds[i], scale)))
        edges.extend((n + i, u, _INFINITE) for u in inputs[i])
    reached = _source_side(edges, 2 * n + 2, source, sink)
    return frozenset(i for i in relevant if i in reached and n + i not in reached)


def _capacity(seconds: float, scale: float) -> int:
    """Seconds as an integer capacity; a positive price never rounds to free."""
    if seconds == float("inf"):
        return _FORBIDDEN
    return min(int(seconds * scale) + (seconds > 0), _FORBIDDEN - 1)


def _source_side(edges: list[tuple[int, int, int]], size: int, source: int, sink: int) -> set[int]:
    """Nodes that the residual graph still connects to the source."""
    tail, head, capacity = (
        np.array(column, dtype=np.int32) for column in zip(*edges, strict=True)
    )
    graph = csr_array((capacity, (tail, head)), shape=(size, size), dtype=np.int32)
    graph.sum_duplicates()
    graph.data = np.minimum(graph.data, _INFINITE)
    flow = maximum_flow(graph, source, sink).flow
    residual = graph - flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    order = breadth_first_order(residual, source, return_predecessors=False)
    return set(order.tolist())


def _ancestors(inputs: Sequence[Sequence[int]], roots: Sequence[int]) -> list[int]:
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack.extend(inputs[i])
    return sorted(seen)
