"""The cheapest saved set at a given price per byte: one minimum cut.

For each node two binary choices: ``a`` (its value is available to the backward) and ``r`` (it
got there by recomputation). Needed values have ``a = 1``; ``r = 1`` needs ``a = 1`` of every
input; ``a = 1, r = 0`` means saved. Minimise

    sum over recomputed nodes of seconds  +  sum over saved nodes of seconds to save.

Every term is an edge: ``source -> a`` (needed, infinite), ``a -> r`` (price of saving), ``r ->
sink`` (seconds to recompute), ``r -> a of each input`` (infinite). So the minimum cut is exact,
and a node that serves many is recomputed, and paid for, once.

Source: the construction is maximal closure, or project selection (Picard, 1976). Torch's min-cut
partitioner cuts saved bytes alone, with recomputation free or banned; here recomputation has its
own price, and the sweep over prices per byte gives the convex hull of (saved bytes, recompute
seconds).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_INFINITE = 2**30
_FORBIDDEN = _INFINITE - 1  # so that a needed node whose both prices are infinite stays reachable
_SCALE = 2**29


class SavedSetNetwork:
    """The network of one graph: its edges are laid out once, its prices change with every cut.

    Args:
        inputs: inputs of each node, by index.
        needed: nodes whose value the backward reads.
    """

    def __init__(self, inputs: Sequence[Sequence[int]], needed: Sequence[int]) -> None:
        relevant = _ancestors(inputs, needed)
        place = {i: k for k, i in enumerate(relevant)}
        reads = [(place[i], place[u]) for i in relevant for u in set(inputs[i])]
        a = np.arange(len(relevant))
        r = a + len(relevant)
        wanted = np.array([place[i] for i in dict.fromkeys(needed)], dtype=int)
        reader, read = np.array(reads, dtype=int).reshape(-1, 2).T
        self.source, self.sink = 2 * len(relevant), 2 * len(relevant) + 1
        tail = np.concatenate([a, r, r[reader], np.full_like(wanted, self.source)])
        head = np.concatenate([r, np.full_like(r, self.sink), a[read], wanted])
        self.relevant = np.array(relevant, dtype=int)
        self.order = np.lexsort((head, tail))  # rows, then columns: what a csr array holds
        self.columns = head[self.order].astype(np.int32)
        rows = np.bincount(tail, minlength=2 * len(relevant) + 2)
        self.row_starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)

    def cheapest(self, save_seconds: ArrayLike, recompute_seconds: ArrayLike) -> frozenset[int]:
        """Choose which nodes to save.

        Args:
            save_seconds: price of saving each node; ``inf`` forbids it, 0 is free.
            recompute_seconds: price of running each node again; ``inf`` forbids it.

        Returns:
            The saved nodes. A needed node that may be neither saved nor recomputed is saved.
        """
        count = len(self.relevant)
        save, recompute = (
            np.asarray(p, dtype=float)[self.relevant] for p in (save_seconds, recompute_seconds)
        )
        prices = np.concatenate([save, recompute])
        scale = _SCALE / max(prices[np.isfinite(prices)].sum(), 1e-30)
        capacity = np.full(len(self.order), _INFINITE, dtype=np.int32)
        capacity[: 2 * count] = _capacities(prices, scale)
        reached = self._source_side(capacity[self.order])
        saved = reached[:count] & ~reached[count : 2 * count]
        return frozenset(self.relevant[saved].tolist())

    def _source_side(self, capacity: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which nodes the residual graph still connects to the source."""
        size = self.sink + 1
        graph = csr_array((capacity, self.columns, self.row_starts), shape=(size, size))
        residual = graph - maximum_flow(graph, self.source, self.sink).flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        reached[breadth_first_order(residual, self.source, return_predecessors=False)] = True
        return reached


def _capacities(seconds: NDArray[np.float64], scale: float) -> NDArray[np.int32]:
    """Seconds as integer capacities; a positive price never rounds to free."""
    units = np.minimum(seconds * scale + (seconds > 0), _FORBIDDEN - 1)
    return np.where(np.isinf(seconds), _FORBIDDEN, units).astype(np.int32)


def _ancestors(inputs: Sequence[Sequence[int]], roots: Sequence[int]) -> list[int]:
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack.extend(inputs[i])
    return sorted(seen)
