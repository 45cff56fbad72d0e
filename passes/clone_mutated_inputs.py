"""Let the backward read an input as it was before the forward overwrote it.

An input that the forward updates in place, such as a buffer, is handed to the backward as it is:
by then it holds the new value. Where a backward node reads it, it must read a copy made before.

Pays never; it is there for correctness. It costs the bytes of the copies, which the planner sees.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.graph import aten, source_line
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


@dataclass(frozen=True)
class CloneMutatedInputs:
    """``copy_(x, new)`` in the forward and ``f(x)`` in the backward -> ``f(clone(x))``."""

    name: ClassVar[str] = "clone_mutated_inputs"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset({"inputs_survive"})

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        copies = graph.find_nodes(op="call_function", target=aten.copy_.default)
        overwritten = {n.args[0]: n for n in copies if _is_forward(n) and _is_input(n.args[0])}
        rewrites = 0
        for value, writer in overwritten.items():
            readers = [n for n in value.users if not _is_forward(n) and n.op != "output"]
            if not readers:
                continue
            with graph.inserting_before(_first_computation(graph)):
                before = graph.call_function(aten.clone.default, (value,))
            before.meta.update(val=value.meta["val"].clone(), partitioner_tag="is_forward")
            for reader in readers:
                reader.replace_input_with(value, before)
            text = f"the forward overwrites it in place; {len(readers)} backward nodes read a copy"
            ctx.remark(self.name, RemarkKind.APPLIED, text, value.name, source_line(writer))
            rewrites += 1
        return rewrites


def _is_forward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") != "is_backward"


def _is_input(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _first_computation(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op != "placeholder")
