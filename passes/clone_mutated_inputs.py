"""Let the backward read an input as it was before the forward overwrote it.

An input that the forward updates in place, such as a running mean, has its new value by the time
the backward runs. Whatever the backward reads of it, or recomputes from it, must read a copy that
was made before.

Never pays in itself: it is there for correctness. The copies are bytes that the planner sees, and
they are made only where a path leads from the input to the backward.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt._torch import mutated_inputs
from memopt.graph import READ_ONCE, aten, is_mutating
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


@dataclass(frozen=True)
class CloneMutatedInputs:
    """``f(x)`` on the way to the backward, with ``x`` overwritten -> ``f(clone(x))``."""

    name: ClassVar[str] = "clone_mutated_inputs"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset({"inputs_survive"})

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        overwritten = _overwritten_inputs(graph)
        if not overwritten:
            return 0
        needed = _needed_by_backward(graph)
        rewrites = 0
        for value in overwritten:
            readers = [n for n in value.users if n in needed and not is_mutating(n)]
            if not readers:
                continue
            with graph.inserting_before(_first_computation(graph)):
                before = graph.call_function(aten.clone.default, (value,))
            before.meta.update(val=value.meta["val"].clone(), partitioner_tag="is_forward")
            before.meta[READ_ONCE] = True
            for reader in readers:
                reader.replace_input_with(value, before)
            text = (
                f"overwritten in place; {len(readers)} nodes that lead to the backward read a copy"
            )
            ctx.remark(self.name, RemarkKind.APPLIED, text, value.name)
            rewrites += 1
        return rewrites


def _overwritten_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Inputs that the forward writes to: in the graph, or right after it by AOTAutograd."""
    copies = graph.find_nodes(op="call_function", target=aten.copy_.default)
    written = [n.args[0] for n in copies if getattr(n.args[0], "op", "") == "placeholder"]
    return [n for n in dict.fromkeys([*mutated_inputs(graph), *written]) if "val" in n.meta]


def _needed_by_backward(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the backward reads, directly or through other nodes, and the backward's own."""
    backward = {n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)}
    for node in graph.nodes:
        if node.op == "call_function" and not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
    needed: set[fx.Node] = set()
    stack = list(backward)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed


def _first_computation(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(n for n in graph.nodes if n.op != "placeholder")
    return first
