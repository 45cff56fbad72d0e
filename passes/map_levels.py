"""When values on maps are computed: how many times something needs a whole map before.

All that is computed by rows at a level can be computed together, piece by piece.
"""

import operator
from collections.abc import Collection, Mapping

from torch import fx

from memopt.passes.map_reads import Rule, bytes_of


def assign_levels(
    graph: fx.Graph, rules: Mapping[fx.Node, Rule], whole: Collection[fx.Node] = ()
) -> dict[fx.Node, int]:
    """A level for each node; of what has rules the one at which the fewest bytes are held.

    A node that has a rule comes after all of the levels before its own; one that has none after
    all that has rules and the same level; one that depends on no map has level -1.

    Args:
        graph: without a backward.
        rules: how nodes are computed by rows, of those that can be.
        whole: values that are to be there before anything reads them.
    """
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        level[node] = _earliest(node, rules, whole, level)
    latest = _latest(rules, whole, level)
    first = dict(level)
    for node in rules:
        earliest = _earliest(node, rules, whole, level)
        is_part = node.target is operator.getitem  # of several results: where they are made
        choices = range(earliest, (earliest if is_part else latest[node]) + 1)
        cost = {at: _held_bytes(node, at, choices, rules, level, first) for at in choices}
        level[node] = min(choices, key=cost.__getitem__)
    for node in graph.nodes:
        if node not in rules:
            level[node] = _earliest(node, rules, whole, level)
    return level


def _earliest(
    node: fx.Node,
    rules: Mapping[fx.Node, Rule],
    whole: Collection[fx.Node],
    level: Mapping[fx.Node, int],
) -> int:
    if node not in rules:
        return max((level[source] for source in node.all_input_nodes), default=-1)
    rows = {r.source for r in rules[node].reads if r.source in rules and r.source not in whole}
    return max([0, *(level[source] + (source not in rows) for source in node.all_input_nodes)])


def _latest(
    rules: Mapping[fx.Node, Rule], whole: Collection[fx.Node], level: Mapping[fx.Node, int]
) -> dict[fx.Node, int]:
    latest: dict[fx.Node, int] = {}
    for node in reversed([*rules]):
        ends = [level[node]] if not node.users else []
        for user in node.users:
            by_rows = (
                user in rules
                and node not in whole
                and any(read.source is node for read in rules[user].reads)
            )
            own = latest.get(user, level[user])
            ends.append(own if by_rows or user not in rules else own - 1)
        latest[node] = max(level[node], min(ends))
    return latest


def _held_bytes(
    node: fx.Node,
    at: int,
    choices: range,
    rules: Mapping[fx.Node, Rule],
    level: Mapping[fx.Node, int],
    first: Mapping[fx.Node, int],
) -> int:
    """Bytes times levels that a choice costs: of the node's own value, and of what it reads."""
    held = bytes_of(node) * (choices[-1] - at)
    for read in rules[node].reads:
        if read.source in rules:
            others = [first[user] for user in read.source.users if user is not node]
            there = max([level[read.source], *others])
            held += bytes_of(read.source) * max(0, at - there)
    return held


def waist(rules: Mapping[fx.Node, Rule]) -> fx.Node | None:
    """A value of a region through which all else goes, if to have it whole is to hold less.

    That is where it has fewer bytes than what is read before it alone, and than what is returned.

    Args:
        rules: of the region, in the order of the graph.
    """
    order = {node: i for i, node in enumerate(rules)}
    last = {node: max((order[u] for u in node.users if u in order), default=-1) for node in rules}
    returned = [node for node in rules if any(user not in rules for user in node.users)]
    reads = {
        read.source: order[node]
        for node, rule in rules.items()
        for read in rule.reads
        if read.source not in rules
    }
    found = []
    reached = -1
    for node, at in order.items():
        alone = reached <= at < last[node] and node not in returned
        before = sum(bytes_of(source) for source, end in reads.items() if end <= at)
        after = sum(bytes_of(result) for result in returned if order[result] > at)
        if alone and 0 < bytes_of(node) < min(before, after):
            found.append(node)
        reached = max(reached, last[node])
    return min(found, key=bytes_of, default=None)
