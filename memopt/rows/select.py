"""Which nodes of an aten graph become fused regions: convex, over the same rows, few registers.

A region grows from a node by whichever neighbour saves most bytes: one that it reads, that reads
it, or that reads the same. What it grows by is

(1) convex: no path leaves the region and comes back, or the region would wait for itself. Nodes on
    such a path come along; a region that was chosen before is one node.
(2) between two library calls: a node moves to where its first reader is, but past no call, so
    that what is alive during calls changes by what regions keep and read alone. Neither does it
    move past a node that writes to its input, or draws numbers.
(3) known to the lowering, which says so by reading it.
(4) held in registers: few values with an entry for each column are needed at a time.

Its price is what it reads and writes once. It saves what its nodes, each by itself, would read and
write beyond that. Large tensors come first, and among them wide rows: rows of a part of their
width are groups in them.

Source: for convexity and contraction, DNNFusion (Niu et al. 2021, arXiv:2108.13342).
"""

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from memopt._torch import size_hint
from memopt.graph import OpKind, is_mutating, is_random, op_kind, stretches
from memopt.rows.index import Space, UnfusableError
from memopt.rows.ir import RowProgram
from memopt.rows.nodes import is_seen_through, operands, readers, results_of, space_of
from memopt.rows.reader import read_rows

_MOST_LIVE = 12
_MOST_MEMBERS = 96


@dataclass(frozen=True)
class FusedRows:
    """Nodes that become one kernel.

    Attributes:
        members: in the graph's order.
        program: what they compute.
        saved_bytes: what they would move beyond it, each by itself.
    """

    members: tuple[fx.Node, ...]
    program: RowProgram
    saved_bytes: int


def choose_regions(graph: fx.Graph) -> list[FusedRows]:
    """The regions of a graph; they share no node, and as one node each they make no cycle.

    Args:
        graph: of aten operators with traced values.
    """
    found: list[FusedRows] = []
    for block in _blocks(graph):
        found += Chooser(block).regions()
    return found


def latest(graph: fx.Graph) -> dict[fx.Node, int]:
    """Clause (2): for each node, before how many library calls it can run at the latest."""
    own = stretches(graph)
    last: dict[fx.Node, int] = {}
    barrier = len(own)
    for node in reversed(graph.nodes):
        if _keeps_its_place(node):
            barrier = own[node]
        users = [last[user] for user in node.users if user.op != "output"]
        fixed = not users or op_kind(node) in (OpKind.EXTERN, OpKind.REDUCTION)
        last[node] = own[node] if fixed else max(own[node], min(*users, barrier))
    return last


def moved_bytes(members: Collection[fx.Node]) -> int:
    """What a kernel of these nodes reads and writes once."""
    inside = set(members)
    read = {source for node in members for source in operands(node)} - inside
    return sum(map(_nbytes, read)) + sum(map(_nbytes, results_of(members)))


def _blocks(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Nodes that may run one behind the other, with no library call in between."""
    last = latest(graph)
    blocks: dict[tuple[int, int], list[fx.Node]] = {}
    changes = 0
    for node in graph.nodes:
        changes += _keeps_its_place(node)
        if node.op == "call_function" and not is_seen_through(node):
            blocks.setdefault((last[node], changes), []).append(node)
    yield from blocks.values()


class ConvexClosure:
    """Clause (1): of a set of nodes, the smallest one around it that no path leaves and enters.

    Args:
        dag: no cycles; an edge goes from what is read to what reads it.
    """

    def __init__(self, dag: Any) -> None:
        self.below: Mapping[Any, Set[Any]] = {n: nx.descendants(dag, n) for n in dag}
        self.above: Mapping[Any, Set[Any]] = {n: nx.ancestors(dag, n) for n in dag}

    def __call__(self, members: Collection[Any]) -> frozenset[Any]:
        below = frozenset().union(*(self.below[n] for n in members))
        above = frozenset().union(*(self.above[n] for n in members))
        return frozenset(members) | (below & above)


class Chooser:
    """Regions among the nodes of one block."""

    def __init__(self, block: list[fx.Node]) -> None:
        self.order = {node: place for place, node in enumerate(block)}
        self.dag = nx.DiGraph()
        self.dag.add_nodes_from(block)
        self.sources = {node: frozenset(operands(node)) for node in block}
        self.users: dict[fx.Node, frozenset[fx.Node]] = {}
        for node, sources in self.sources.items():
            self.dag.add_edges_from((s, node) for s in sources if s in self.order)
        self.taken: set[fx.Node] = set()
        self.closure = ConvexClosure(self.dag)

    def regions(self) -> Iterator[FusedRows]:
        seeds = [(space, node) for node in self.order if (space := _space(node))]
        for space, seed in sorted(seeds, key=lambda s: (-entries(s[1]), -s[0].width)):
            region = None if seed in self.taken else self.grown(seed, space)
            if region is not None:
                self.contract(region)
                yield region

    def grown(self, seed: fx.Node, space: Space) -> FusedRows | None:
        """The region around a node; it grows by more at a time as long as that can be read.

        What is refused is tried again once the rest has grown: it may be read by then.
        """
        members: frozenset[fx.Node] = frozenset({seed})
        program: RowProgram | None = None
        refused: set[fx.Node] = set()
        stride, has_grown = 1, False
        while True:
            larger, last = self.larger(members, refused, stride)
            if last is None and has_grown and refused:
                refused, has_grown = set(), False
            elif last is None:
                break
            elif found := self.read(larger, space):
                members, program, stride, has_grown = larger, found, 2 * stride, True
            elif stride == 1:
                refused.add(last)
            else:
                stride = 1
        saved = sum(moved_bytes([n]) for n in members) - moved_bytes(members)
        if program is None or saved <= 0:
            return None
        return FusedRows(self.sorted(members), program, saved)

    def larger(
        self, members: frozenset[Any], refused: Set[fx.Node], count: int
    ) -> tuple[frozenset[Any], fx.Node | None]:
        """The members and so many neighbours, each the one that saves most, and the last one."""
        last = None
        for _ in range(count):
            best = self.best(members, refused)
            if best is None:
                break
            members, last = self.closure(members | {best}), best
        return members, last

    def best(self, members: frozenset[Any], refused: Set[fx.Node]) -> fx.Node | None:
        if not all(isinstance(member, fx.Node) for member in members):
            return None
        read = {s for n in members for s in self.sources[n]} - members
        near = {*read, *(n for s in read | members for n in self.users_of(s))}
        near = {n for n in near - members - refused if n in self.order and n not in self.taken}
        gain = {n: self.gain(n, members, read) for n in near}
        saving = [n for n in near if gain[n] > 0]
        return min(saving, key=lambda n: (-gain[n], self.order[n]), default=None)

    def gain(self, node: fx.Node, members: Set[Any], read: Set[fx.Node]) -> int:
        """How much less the members move with the node than they and it by themselves.

        Args:
            node: another one.
            members: of a region.
            read: what they read.
        """
        total = 0
        for source in self.sources[node]:
            if source in members:
                unwritten = self.users_of(source) - members <= {node}
                total += _nbytes(source) * (1 + unwritten)
            elif source in read:
                total += _nbytes(source)
        if node in read:
            total += _nbytes(node) * (1 + (self.users_of(node) <= members))
        return total

    def users_of(self, node: fx.Node) -> Set[fx.Node]:
        if node not in self.users:
            self.users[node] = frozenset(readers(node))
        return self.users[node]

    def read(self, members: frozenset[Any], space: Space) -> RowProgram | None:
        """Clauses (3) and (4)."""
        if len(members) > _MOST_MEMBERS or not all(_is_free(n, self.taken) for n in members):
            return None
        try:
            program = read_rows(self.sorted(members), space)
        except UnfusableError:
            return None
        return program if program.live_tiles() <= _MOST_LIVE else None

    def sorted(self, members: Collection[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(sorted(members, key=self.order.__getitem__))

    def contract(self, region: FusedRows) -> None:
        """Make the region one node, so that no other one goes around it in a circle."""
        inside = set(region.members)
        self.taken |= inside
        edges = [(u, v) for u, v in self.dag.edges if (u in inside) != (v in inside)]
        self.dag.remove_nodes_from(inside)
        self.dag.add_node(region)
        for source, user in edges:
            self.dag.add_edge(
                region if source in inside else source, region if user in inside else user
            )
        self.closure = ConvexClosure(self.dag)


def _keeps_its_place(node: fx.Node) -> bool:
    return is_mutating(node) or is_random(node)


def _is_free(node: Any, taken: Collection[fx.Node]) -> bool:
    """Whether a node may become a member: a tensor, in no region yet."""
    return isinstance(node, fx.Node) and node not in taken and _is_tensor(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _space(node: fx.Node) -> Space | None:
    try:
        return space_of(node)
    except UnfusableError:
        return None


def entries(node: fx.Node) -> int:
    """Of a tensor, with the sizes that tracing saw; 0 of what is none."""
    return size_hint(node.meta["val"].numel()) if _is_tensor(node) else 0


def _nbytes(node: fx.Node) -> int:
    return entries(node) * node.meta["val"].element_size() if _is_tensor(node) else 0
