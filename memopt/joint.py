"""The joint graph as integers: what planners, timelines and solvers compute on.

Node ``i`` is the ``i``-th node of the joint graph; storage ``s`` is an alias class of tensors.
A storage, not a tensor, is what is live: views cost nothing and keep their base alive.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from memopt import graph as predicates
from memopt._torch import NodeInfo, classify_nodes, forward_and_backward_outputs
from memopt.graph import OpKind


@dataclass(frozen=True)
class Storage:
    """One allocation.

    Attributes:
        owner: index of the node that allocates it, or of the placeholder that brings it.
        base: index of the first node whose value is a tensor in this storage; the one to save.
        nbytes: its size, at the traced shapes.
        expr: its size as a sympy expression of the shape symbols.
        resident: whether it exists before the step starts (parameter, buffer, input, constant).
    """

    owner: int
    base: int
    nbytes: int
    expr: Any
    resident: bool


@dataclass(frozen=True)
class JointGraph:
    """A joint forward-and-backward graph, indexed.

    Attributes:
        nodes: every node but the output, in order.
        inputs: indices of each node's inputs.
        storages: every allocation.
        storage_of: for each node the storages its value lives in.
        allocates: for each node the storages it brings into being.
        kind: how a fusing lowering treats each node.
        forwardable: nodes that depend on no tangent: they can run in the forward.
        required_forward: nodes that the forward outputs need.
        recomputable: nodes that may run a second time.
        forward_outputs, backward_outputs: indices of the outputs, constants left out.
        tangents: indices of the incoming gradients.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[tuple[int, ...], ...]
    storages: tuple[Storage, ...]
    storage_of: tuple[tuple[int, ...], ...]
    allocates: tuple[tuple[int, ...], ...]
    kind: tuple[OpKind, ...]
    forwardable: tuple[bool, ...]
    required_forward: tuple[bool, ...]
    recomputable: tuple[bool, ...]
    forward_outputs: tuple[int, ...]
    backward_outputs: tuple[int, ...]
    tangents: tuple[int, ...]
    index: dict[fx.Node, int] = field(repr=False)

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @cached_property
    def parts(self) -> dict[int, list[int]]:
        """For each node whose tuple is taken apart, the ``getitem`` nodes that do so."""
        parts: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            if node.target is operator.getitem:
                parts.setdefault(self.inputs[i][0], []).append(i)
        return parts


def index_joint_graph(
    gm: fx.GraphModule, *, num_fwd_outputs: int, static_inputs: Sequence[int] = ()
) -> tuple[JointGraph, NodeInfo]:
    """Index a joint graph; also return torch's own classification of its nodes."""
    info = classify_nodes(gm, list(static_inputs), num_fwd_outputs)
    forward_outputs, backward_outputs, *_ = forward_and_backward_outputs(
        gm, num_fwd_outputs=num_fwd_outputs
    )
    nodes = tuple(node for node in gm.graph.nodes if node.op != "output")
    index = {node: i for i, node in enumerate(nodes)}
    tangents = tuple(
        i for i, n in enumerate(nodes) if n.op == "placeholder" and "tangents" in str(n.target)
    )
    builder = _StorageBuilder(nodes, index)
    joint = JointGraph(
        nodes=nodes,
        inputs=tuple(tuple(index[a] for a in n.all_input_nodes) for n in nodes),
        storages=tuple(builder.storages),
        storage_of=tuple(builder.storage_of),
        allocates=tuple(builder.allocates),
        kind=tuple(predicates.op_kind(n) for n in nodes),
        forwardable=tuple(n not in info.tangents_closure for n in nodes),
        required_forward=tuple(n in info.required_fw_nodes for n in nodes),
        recomputable=tuple(predicates.is_recomputable(n) for n in nodes),
        forward_outputs=_indices(forward_outputs, index),
        backward_outputs=_indices(backward_outputs, index),
        tangents=tangents,
        index=index,
    )
    return joint, info


def _indices(values: Sequence[Any], index: dict[fx.Node, int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index[v] for v in values if isinstance(v, fx.Node)))


class _StorageBuilder:
    """Assigns each node's tensors to storages: by the fake storage, and by the view schema."""

    def __init__(self, nodes: Sequence[fx.Node], index: dict[fx.Node, int]) -> None:
        self.storages: list[Storage] = []
        self.storage_of: list[tuple[int, ...]] = []
        self.allocates: list[tuple[int, ...]] = []
        self._by_fake: dict[int, int] = {}
        for i, node in enumerate(nodes):
            known = len(self.storages)
            value = node.meta.get("val")
            found = self._aliased(node, index)
            if found is None:
                found = tuple(
                    dict.fromkeys(self._storage(i, node, t) for t in predicates.tensors(value))
                )
            elif found:
                self._note_base(i, node, found)
            self.storage_of.append(found)
            self.allocates.append(tuple(s for s in found if s >= known))

    def _aliased(self, node: fx.Node, index: dict[fx.Node, int]) -> tuple[int, ...] | None:
        """The storages of the node that ``node`` is a view of; None where it is no view."""
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        if predicates.is_mutating(node) and isinstance(node.args[0], fx.Node):
            return self.storage_of[index[node.args[0]]]
        if not predicates.is_view(node):
            return None
        parent = self.storage_of[index[node.all_input_nodes[0]]]
        if len(parent) <= 1:
            return parent
        own = {self._by_fake.get(_fake_id(t)) for t in predicates.tensors(node.meta.get("val"))}
        narrowed = tuple(s for s in parent if s in own)
        if narrowed:
            return narrowed
        position = node.args[1] if len(node.args) > 1 else None
        return (parent[position],) if isinstance(position, int) else parent

    def _storage(self, i: int, node: fx.Node, tensor: Any) -> int:
        resident = node.op != "call_function" and "tangents" not in str(node.target)
        fake = _fake_id(tensor)
        if node.op != "call_function" and fake in self._by_fake:
            return self._by_fake[fake]
        nbytes, expr = predicates.storage_nbytes(tensor)
        base = i if not isinstance(node.meta.get("val"), (tuple, list)) else -1
        self.storages.append(Storage(i, base, nbytes, expr, resident))
        self._by_fake[fake] = len(self.storages) - 1
        return len(self.storages) - 1

    def _note_base(self, i: int, node: fx.Node, found: tuple[int, ...]) -> None:
        """The first ``getitem`` of a tuple is the tensor to save."""
        if len(found) == 1 and self.storages[found[0]].base < 0:
            s = self.storages[found[0]]
            self.storages[found[0]] = Storage(s.owner, i, s.nbytes, s.expr, s.resident)


def _fake_id(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)
