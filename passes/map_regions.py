"""Regions of a graph that are computed by rows of their maps together, and their order.

Which nodes those are is their rules' to say (`map_rules`); between two values that something needs
whole (`map_levels`), those that read the same values by rows are one region.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx
from torch import fx

from memopt.graph import is_collective, is_mutating, is_random, is_view
from memopt.passes.map_reads import Rule, bytes_of, rows_in
from memopt.passes.map_rules import rule_of

_DIMENSIONS = (0, 2, 3, 4)  # images of a batch first, then rows, then columns


def rules_of(graph: fx.Graph, pieces: int) -> dict[fx.Node, Rule]:
    """What can be computed by rows, along the first dimension of those that have the most of them.

    Nothing, where the order of the graph is more than that of its values.

    Args:
        graph: a graph.
        pieces: more rows than it takes for so many count for nothing.
    """
    if any(is_mutating(n) or is_random(n) or is_collective(n) for n in graph.nodes):
        return {}
    return max(
        (_rules_along(graph, along) for along in _DIMENSIONS),
        key=lambda rules: min(pieces, _most_pieces(rules)),
    )


def _rules_along(graph: fx.Graph, along: int) -> dict[fx.Node, Rule]:
    rules: dict[fx.Node, Rule] = {}
    dims: dict[fx.Node, int] = {}
    read_along: dict[fx.Node, int] = {}
    for node in graph.nodes:
        rule = rule_of(node, dims, along)
        if rule is None or _most_pieces({node: rule}) < 2:
            continue
        if all(read_along.get(r.source, r.dim) == r.dim for r in rule.reads):
            rules[node], dims[node] = rule, rule.dim
            read_along.update((r.source, r.dim) for r in rule.reads)
    return rules


def _most_pieces(rules: Mapping[fx.Node, Rule]) -> int:
    """Into how many pieces the value with the most rows can be cut: of rows of maps, two each."""
    counts = [rows_in(node, rule.dim) // (2 if rule.dim else 1) for node, rule in rules.items()]
    return 1 << max([1, *counts]).bit_length() - 1


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that are computed by rows together.

    Attributes:
        rules: how, in the order of the graph.
    """

    rules: Mapping[fx.Node, Rule]

    @cached_property
    def inputs(self) -> dict[fx.Node, int]:
        """What it reads by rows from outside, and the dimension of the rows."""
        reads = [read for rule in self.rules.values() for read in rule.reads]
        return {r.source: r.dim for r in reads if r.source not in self.rules}

    @cached_property
    def returned(self) -> list[fx.Node]:
        """What something outside reads."""
        return [n for n in self.rules if any(user not in self.rules for user in n.users)]

    @cached_property
    def outputs(self) -> list[fx.Node]:
        """What has to exist for that: of a view what it is a view of."""
        bases = map(self.base, self.returned)
        return [node for node in dict.fromkeys(bases) if node in self.rules]

    def base(self, node: fx.Node) -> fx.Node:
        """What a node is a view of."""
        while node in self.rules and is_view(node) and node.target is not operator.getitem:
            node = self.rules[node].reads[0].source
        return node

    @property
    def name(self) -> str:
        """Of the first node."""
        return next(iter(self.rules)).name

    @cached_property
    def nbytes(self) -> int:
        """Of its widest value."""
        return max(map(bytes_of, [*self.rules, *self.inputs]))

    def pieces(self, asked: Mapping[str, int]) -> int:
        """Into how many it is to be cut; 0 where none are asked for."""
        return min(_most_pieces(self.rules), max(asked.get(n.name, 0) for n in self.rules))


def regions_of(rules: Mapping[fx.Node, Rule], level: Mapping[fx.Node, int]) -> list[Region]:
    """Nodes of a level that read the same values by rows, in the order of levels.

    Args:
        rules: of what can be computed by rows.
        level: of every node.
    """
    bonds: networkx.Graph = networkx.Graph()
    for node, rule in rules.items():
        bonds.add_node((node, level[node]))
        bonds.add_edges_from(
            ((node, level[node]), (read.source, level[node])) for read in rule.reads
        )
    regions = []
    for bond in networkx.connected_components(bonds):
        own = {node: rule for node, rule in rules.items() if (node, level[node]) in bond}
        regions.append(Region(own))
    return sorted(regions, key=lambda region: level[next(iter(region.rules))])


def reorder(graph: fx.Graph, regions: Sequence[Region], level: Mapping[fx.Node, int]) -> None:
    """Put what is computed by rows of a level together, before what is not.

    Args:
        graph: changed in place.
        regions: what is computed by rows, in the order of levels.
        level: of every node.
    """
    place = {node: i for i, region in enumerate(regions) for node in region.rules}
    (output,) = graph.find_nodes(op="output")
    inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    early: dict[fx.Node, int] = {}
    for node in reversed(inner):  # what depends on no map comes as late as it can
        if level[node] < 0:
            early[node] = min((early.get(u, level.get(u, 0)) for u in node.users), default=0)

    def key(node: fx.Node) -> tuple[int, int, int]:
        if node in early:
            return early[node], 0, 0
        return (level[node], 1, place[node]) if node in place else (level[node], 2, 0)

    for node in sorted(inner, key=key):
        output.prepend(node)
