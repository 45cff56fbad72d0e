"""Which tensors of a graph share an allocation, and how many bytes each of these has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from memopt import graph as predicates


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


class StorageBuilder:
    """Assigns each node's tensors to storages: by the fake storage, and by the view schema.

    Args:
        nodes: of a graph, in order.
        index: of each of them.

    Attributes:
        storages: every allocation.
        storage_of: for each node the storages its value lives in.
        allocates: for each node the storages it brings into being.
    """

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
        over = (
            predicates.is_mutating(node)
            or predicates.is_wait(node)
            or predicates.IN_PLACE in node.meta
        )
        if over and isinstance(node.args[0], fx.Node):
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
        nbytes, expr = (0, 0) if predicates.on_host(node) else predicates.storage_nbytes(tensor)
        base = -1 if isinstance(node.meta.get("val"), (tuple, list)) or _is_on_its_way(node) else i
        self.storages.append(Storage(i, base, nbytes, expr, resident))
        self._by_fake[fake] = len(self.storages) - 1
        return len(self.storages) - 1

    def _note_base(self, i: int, node: fx.Node, found: tuple[int, ...]) -> None:
        """The first ``getitem`` of a tuple is the tensor to save; of a collective, its wait."""
        if len(found) == 1 and self.storages[found[0]].base < 0 and not _is_on_its_way(node):
            s = self.storages[found[0]]
            self.storages[found[0]] = Storage(s.owner, i, s.nbytes, s.expr, s.resident)


def _is_on_its_way(node: fx.Node) -> bool:
    """Whether a collective may still be writing the value."""
    return any(predicates.is_wait(user) for user in node.users)


def _fake_id(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)
