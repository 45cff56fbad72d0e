"""The joint graph as integers: what planners, timelines and solvers compute on.

Node ``i`` is the ``i``-th node of the joint graph; storage ``s`` is an alias class of tensors.
A storage, not a tensor, is what is live: views cost nothing and keep their base alive.
"""

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import fx

from memopt import graph as predicates
from memopt._torch import NodeInfo, forward_and_backward_outputs
from memopt.graph import OpKind
from memopt.storages import Storage, StorageBuilder


@dataclass(frozen=True)
class Encoding:
    """Another form of a value, in which the backward may hold it.

    Attributes:
        kind: what makes it, such as ``"pack"``.
        loss: error of the value that comes back, over its norm; 0 where it comes back as it was.
        source: index of the value.
        encoded: index of its other form.
        decoded: index of the value, made of the other form; nothing reads it.
        inner: indices of all nodes that encode and decode, the last two among them.
        host_nbytes: bytes that its other form has on the host; 0 where that is on the device.
    """

    kind: str
    loss: float
    source: int
    encoded: int
    decoded: int
    inner: tuple[int, ...]
    host_nbytes: int


ENCODES = "memopt_encodes"
"""Set in ``node.meta`` of a decoded value: kind, loss, the names of source and other form."""


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
        forwardable: nodes that can run in the forward: they depend on no tangent, and on no
            collective that is the backward's alone. That one runs where it was written, so that
            ranks with plans of their own meet at it.
        required_forward: nodes that the forward outputs need.
        recomputable: nodes that may run a second time.
        forward_outputs, backward_outputs: indices of the outputs, constants left out.
        tangents: indices of the incoming gradients.
        encodings: other forms of values, from which a plan may choose.
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
    encodings: tuple[Encoding, ...]
    index: dict[fx.Node, int] = field(repr=False)

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    def settled(self, saved: Iterable[int]) -> frozenset[int]:
        """A saved set with one form of each value: as it is, or else the first other one.

        What cannot run in the forward is left out.
        """
        chosen = {i for i in saved if self.forwardable[i]}
        once = set(chosen)
        for encoding in self.encodings:
            if encoding.encoded in chosen:
                if encoding.source in once:
                    chosen.remove(encoding.encoded)
                once.add(encoding.source)
        return frozenset(chosen)

    def holding(self, saved: Collection[int]) -> "JointGraph":
        """The graph as the backward runs it: a value that is held in another form is decoded.

        Args:
            saved: nodes whose values cross from the forward to the backward.
        """
        used = [e for e in self.encodings if e.encoded in saved]
        if not used:
            return self
        nodes = {e.source: e.decoded for e in used}
        storages = {self.storage_of[e.source][0]: self.storage_of[e.decoded][0] for e in used}
        inner = {i for e in used for i in e.inner}
        inputs = tuple(
            read if i in inner else tuple(nodes.get(u, u) for u in read)
            for i, read in enumerate(self.inputs)
        )
        storage_of = tuple(
            own if i in nodes else tuple(storages.get(s, s) for s in own)
            for i, own in enumerate(self.storage_of)
        )
        return replace(self, inputs=inputs, storage_of=storage_of)

    @cached_property
    def returned(self) -> frozenset[int]:
        """Results of the forward in storages of their own, which are alive to the end."""
        storages = self.storages
        return frozenset(
            i
            for i in self.forward_outputs
            if any(storages[s].base == i and not storages[s].resident for s in self.storage_of[i])
        )

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """What lies in memory while each node runs: its inputs; of a wait, what is sent as well.

        A collective may read what it sends until the wait.
        """
        return tuple(
            (*read, *self.inputs[self.index[predicates.awaited(node)]])
            if predicates.is_wait(node)
            else read
            for node, read in zip(self.nodes, self.inputs, strict=True)
        )

    @cached_property
    def parts(self) -> dict[int, list[int]]:
        """For each node whose tuple is taken apart, the ``getitem`` nodes that do so."""
        parts: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            if node.target is operator.getitem:
                parts.setdefault(self.inputs[i][0], []).append(i)
        return parts


def index_joint_graph(gm: fx.GraphModule, info: NodeInfo, *, num_fwd_outputs: int) -> JointGraph:
    """Index a joint graph.

    Args:
        gm: the graph, perhaps with other forms of its values since it was classified.
        info: torch's classification of its nodes.
        num_fwd_outputs: how many of its outputs are the forward's.
    """
    forward_outputs, backward_outputs, *_ = forward_and_backward_outputs(
        gm, num_fwd_outputs=num_fwd_outputs
    )
    nodes = tuple(node for node in gm.graph.nodes if node.op != "output")
    index = {node: i for i, node in enumerate(nodes)}
    tangents = tuple(
        i for i, n in enumerate(nodes) if n.op == "placeholder" and "tangents" in str(n.target)
    )
    inputs = tuple(tuple(index[a] for a in n.all_input_nodes) for n in nodes)
    returned = _indices(forward_outputs, index)
    forwardable = _forwardable(nodes, info.tangents_closure, _ancestors(inputs, returned))
    required = set(info.required_fw_nodes)
    builder = StorageBuilder(nodes, index)
    held = {s for i in returned for s in builder.storage_of[i]}  # as they are, in any case
    encodings = (
        e
        for e in _encodings(nodes, inputs)
        if forwardable[e.source] and held.isdisjoint(builder.storage_of[e.source])
    )
    return JointGraph(
        nodes=nodes,
        inputs=inputs,
        storages=tuple(builder.storages),
        storage_of=tuple(builder.storage_of),
        allocates=tuple(builder.allocates),
        kind=tuple(predicates.op_kind(n) for n in nodes),
        forwardable=forwardable,
        required_forward=tuple(
            n in required and early for n, early in zip(nodes, forwardable, strict=True)
        ),
        recomputable=tuple(predicates.is_recomputable(n) for n in nodes),
        forward_outputs=returned,
        backward_outputs=_indices(backward_outputs, index),
        tangents=tangents,
        encodings=tuple(encodings),
        index=index,
    )


def _ancestors(inputs: Sequence[Sequence[int]], roots: Iterable[int]) -> set[int]:
    """The roots, and all that they are made from.

    Torch's own answer has every wait in it that could run in the forward: it counts as an effect.
    """
    found, pending = set[int](), [*roots]
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending += inputs[i]
    return found


def _forwardable(
    nodes: Sequence[fx.Node], tangents_closure: Collection[fx.Node], required: Collection[int]
) -> tuple[bool, ...]:
    late = set(tangents_closure)
    for i, node in enumerate(nodes):
        starts = predicates.is_collective(node) and not predicates.is_wait(node)
        if (starts and i not in required) or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    return tuple(node not in late for node in nodes)


def _encodings(nodes: Sequence[fx.Node], inputs: Sequence[Sequence[int]]) -> Iterator[Encoding]:
    """The other forms that a graph offers."""
    by_name = {node.name: i for i, node in enumerate(nodes)}
    for decoded, node in enumerate(nodes):
        if ENCODES in node.meta:
            kind, loss, *names = node.meta[ENCODES]
            source, encoded = (by_name[name] for name in names)
            inner, edge = {decoded}, [decoded]
            while edge:
                more = {u for u in inputs[edge.pop()] if u != source} - inner
                inner |= more
                edge += more
            copied = nodes[source] if predicates.on_host(nodes[encoded]) else None
            host_nbytes = predicates.storage_nbytes(copied.meta["val"])[0] if copied else 0
            yield Encoding(kind, loss, source, encoded, decoded, tuple(sorted(inner)), host_nbytes)


def _indices(values: Sequence[Any], index: dict[fx.Node, int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index[v] for v in values if isinstance(v, fx.Node)))
