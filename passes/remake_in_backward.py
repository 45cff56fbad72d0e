"""Let a backward operator make its forward's result once more, for the products that read it.

The product behind a norm or a gated activation reads that result in the backward too, so it is
held from the forward on, as large as a layer's input or larger. The norm's own backward has all
that it takes in its registers: with ``again`` it writes the result beside its gradients. The
products of the weights' gradients then run after it. Where something reads the result before, as
an activation's backward does, it is held anyway, and the graph is left alone.

Pays: the bytes of every such result, held through the whole step, for one write of it. What
their gradients are made from lives on until the operator has run.

Source: the forward results that need not be saved are those of Korthikanti et al. (2022),
"Reducing Activation Recomputation in Large Transformer Models", arXiv:2205.05198; making them in
the backward's own kernel is memopt's.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import fx

from memopt._torch import pytree, stable_topological_sort
from memopt.graph import backward_nodes, source_line
from memopt.kernels.gated import GATED, GATED_BACKWARD
from memopt.kernels.gated_packed import GATED_PACKED, GATED_PACKED_BACKWARD
from memopt.kernels.norm import NORM, NORM_BACKWARD
from memopt.passes.joint_nodes import late_reads, same_view
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


class Remake(NamedTuple):
    """An operator whose backward can make its first result once more.

    Attributes:
        forward: the operator.
        backward: its backward. Its last argument says whether to, and its last result is it.
        known_by: position of an argument of the backward that tells which call it belongs to.
        result: which result of the forward that argument is; None where the forward has one
            result, and it is its first argument.
    """

    forward: Any
    backward: Any
    known_by: int
    result: int | None


TABLE = (
    Remake(NORM, NORM_BACKWARD, known_by=6, result=3),
    Remake(GATED, GATED_BACKWARD, known_by=1, result=None),
    Remake(GATED_PACKED, GATED_PACKED_BACKWARD, known_by=1, result=None),
)


@dataclass(frozen=True)
class RemakeInBackward:
    """``mm(dz, y); norm_backward(dy, x)`` -> ``_, y = norm_backward(dy, x); mm(dz, y)``."""

    name: ClassVar[str] = "remake_in_backward"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        late = backward_nodes(graph)
        rewrites = 0
        for rule in TABLE:
            for node in graph.find_nodes(op="call_function", target=rule.forward):
                rewrites += self._rewrite(graph, node, rule, late, ctx)
        if rewrites:
            stable_topological_sort(graph)
        return rewrites

    def _rewrite(
        self, graph: fx.Graph, node: fx.Node, rule: Remake, late: set[fx.Node], ctx: PassContext
    ) -> int:
        own = node if rule.result is None else _result(node, 0)
        twin = _twin(graph, node, rule)
        if own is None or twin is None:
            return 0
        reads = [*late_reads(own, late)]
        if not reads:
            return 0
        if early := {reader for _, reader in reads} & _ancestors(twin):
            text = f"{min(early).name} reads its result before {twin.name} can make it"
            ctx.remark(self.name, RemarkKind.MISSED, text, node.name, source_line(node))
            return 0
        copies = {own: _made_again(graph, twin)}
        for source, reader in reads:
            reader.replace_input_with(source, same_view(graph, source, copies))
        text = f"its result is not held for the backward: {twin.name} makes it once more"
        ctx.remark(self.name, RemarkKind.APPLIED, text, node.name, source_line(node))
        return 1


def _result(node: fx.Node, number: int) -> fx.Node | None:
    """The node that takes one result of an operator with several."""
    parts = (n for n in node.users if n.target is operator.getitem and n.args[1] == number)
    return next(parts, None)


def _twin(graph: fx.Graph, node: fx.Node, rule: Remake) -> fx.Node | None:
    """The one backward of a call."""
    mark = node.args[0] if rule.result is None else _result(node, rule.result)
    calls = graph.find_nodes(op="call_function", target=rule.backward)
    found = [n for n in calls if mark is not None and n.args[rule.known_by] is mark]
    return found[0] if len(found) == 1 else None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """What a node depends on."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = set(stack.pop().all_input_nodes) - found
        found |= new
        stack.extend(new)
    return found


def _made_again(graph: fx.Graph, twin: fx.Node) -> fx.Node:
    """Have a backward make the forward's result, and take it."""
    twin.args = (*twin.args[:-1], True)
    seen = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], twin.args)
    twin.meta["val"] = twin.target(*seen)  # type: ignore[operator]
    (output,) = graph.find_nodes(op="output")
    last = len(twin.meta["val"]) - 1
    with graph.inserting_before(output):
        made = graph.call_function(operator.getitem, (twin, last))
    made.meta.update(twin.meta, val=twin.meta["val"][last])
    for part in twin.users:
        part.meta["val"] = twin.meta["val"][part.args[1]]
    return made
