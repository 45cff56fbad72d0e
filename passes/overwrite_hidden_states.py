"""Write the gradient of a head's hidden states over the hidden states, where nothing reads them.

A chunked cross-entropy computes the gradient in the forward, a chunk at a time, and is done with a
chunk's hidden states when it has their gradient. Decided on the joint graph, so that the planner
counts one tensor and not two; done in the forward graph after it was cut out, so that nothing
before Inductor sees an operator that writes to its input. Where

(1) the gradient has the hidden states' dtype and layout, and their whole storage,
(2) the operator alone reads that storage, in the forward, in the backward and as an output,
(3) the storage is the result of arithmetic: not an input, and not a copy that Inductor may leave
    out, which would make it one,

Pays: ``N * H`` elements at the operator, often the peak of the step; costs nothing. Does not where
the logits are returned and computed on demand: that keeps the hidden states.

Source: memopt's own; the floor without it is that of gradients computed in the forward.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from memopt._torch import OpOverload, pytree, size_expr
from memopt.graph import OVERWRITES, aten, is_view, overwrites, packet_name, prims
from memopt.kernels.in_place_gradient import IN_PLACE, fits_in_place
from memopt.kernels.linear_cross_entropy import REDUCED, Arguments
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_GRADIENT = 1  # its place among the operator's results
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_NORMS = (aten.native_layer_norm.default, aten._fused_rms_norm.default)
# Pointwise operators that Inductor leaves out where they change nothing.
_COPIES = frozenset("aten.clone aten.pow aten.ceil aten.floor aten.round aten.trunc".split())


@dataclass(frozen=True)
class MarkHiddenStates:
    """The decision: a mark on each operator whose hidden states die in it; the graph stays."""

    name: ClassVar[str] = "overwrite_hidden_states"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        for node in graph.find_nodes(op="call_function", target=REDUCED):
            reason = _obstacle(node)
            if reason:
                ctx.remark(self.name, RemarkKind.MISSED, reason, node.name)
            else:
                node.meta[OVERWRITES] = True
        return 0


@dataclass(frozen=True)
class OverwriteHiddenStates:
    """``loss, dx, dw = f(x, w)`` -> ``loss, dw = f_(x, w); dx = x``, where it is marked."""

    name: ClassVar[str] = "overwrite_hidden_states"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        found = graph.find_nodes(op="call_function", target=REDUCED)
        marked = [node for node in found if overwrites(node)]
        for node in marked:
            _replace(node, graph)
            text = "the gradient of the hidden states takes their place"
            ctx.remark(self.name, RemarkKind.APPLIED, text, node.name)
        return len(marked)


def _obstacle(node: fx.Node) -> str:
    """Why the hidden states may not be overwritten, if they may not."""
    args = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], node.args[:-1])
    if not fits_in_place(Arguments(*args)):
        return "no gradient of the hidden states in their dtype and layout is made"  # (1)
    base = node.args[0]
    assert isinstance(base, fx.Node)
    nbytes = base.meta["val"].numel() * base.meta["val"].element_size()
    while len(base.users) == 1 and is_view(base) and base.target is not operator.getitem:
        base = base.all_input_nodes[0]  # the others are sizes
    if len(base.users) > 1:
        others = [n.name for n in base.users if n is not node]
        return f"the hidden states are also read by {others[0]}"  # (2)
    if not is_arithmetic(base):
        return f"the hidden states are an input or a copy: {base.name}"  # (3)
    if size_expr(base.meta["val"].untyped_storage().nbytes()) != size_expr(nbytes):
        return "the hidden states are a part of a larger tensor"  # (1)
    return ""


def is_arithmetic(node: fx.Node) -> bool:
    """Whether the node's result is sure to be a new storage in whatever lowering."""
    if node.target is operator.getitem:
        source, place = node.args
        return isinstance(source, fx.Node) and source.target in _NORMS and bool(place == 0)
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    if node.target is prims.convert_element_type.default:
        source = node.all_input_nodes[0]  # the others are sizes
        return bool(source.meta["val"].dtype != node.meta["val"].dtype)
    if node.target in _PRODUCTS:
        return True
    return torch.Tag.pointwise in node.target.tags and packet_name(node.target) not in _COPIES


def _replace(node: fx.Node, graph: fx.Graph) -> None:
    """Put the operator in place that writes to its input."""
    hidden = node.args[0]
    assert isinstance(hidden, fx.Node)
    with graph.inserting_before(node):
        changed = graph.call_function(IN_PLACE, node.args)
    changed.meta.update(node.meta)
    values = node.meta["val"]
    changed.meta["val"] = (*values[:_GRADIENT], *values[_GRADIENT + 1 :])
    for part in list(node.users):
        at = part.args[1]
        assert isinstance(at, int)
        if at == _GRADIENT:
            part.replace_all_uses_with(hidden)
            graph.erase_node(part)
        else:
            part.args = (changed, at - (at > _GRADIENT))
    graph.erase_node(node)
