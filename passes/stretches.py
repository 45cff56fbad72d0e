"""Stretches of row-wise operators, which are computed by pieces of their rows together.

What a value is to the rows is its `Role`, and a rule for each operator says what it must read to
give that. A stretch grows from a wide value to all that is as wide, and to what reads it, until
only narrow values cross its border; where a reader wants a wide value whole, there is none.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memopt._torch import OpOverload
from memopt.graph import TURNS, aten, prims

_WIDE = 0.5  # of the widest value: what is narrower is read or returned, not cut for its own sake
_COPIES = (aten.clone.default, aten._to_copy.default, prims.convert_element_type.default)
_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class Role(enum.Enum):
    """How a value stands to the rows: what a piece of it is."""

    ROWS = enum.auto()  # some of its first entries
    COLUMNS = enum.auto()  # of a transpose, some of its second ones
    SUM = enum.auto()  # a part of a sum
    WHOLE = enum.auto()  # all of it, for every piece


@dataclass(frozen=True)
class Stretch:
    """Operators that are cut together.

    Attributes:
        rows: how many there are.
        pieces: how many they are cut into.
        members: what each operator gives of a piece.
        reads: what each needs of what it reads.
    """

    rows: int
    pieces: int
    members: dict[fx.Node, Role] = field(default_factory=dict)
    reads: dict[fx.Node, Mapping[fx.Node, Role]] = field(default_factory=dict)

    def add(self, node: fx.Node, role: Role) -> bool:
        """Whether a node can give that, and gives nothing else already."""
        if node in self.members:
            return self.members[node] is role
        reads = self.roles(node, role)
        if reads is None:
            return False
        self.members[node], self.reads[node] = role, reads
        return True

    def is_consistent(self) -> bool:
        """Whether every operator reads of the others what they give."""
        return all(
            self.members.get(source, role) is role
            for reads in self.reads.values()
            for source, role in reads.items()
        )

    def is_returned(self, node: fx.Node) -> bool:
        """Whether something outside reads it."""
        return any(user not in self.members for user in node.users)

    def role_of(self, user: fx.Node, member: fx.Node) -> Role | None:
        """What a reader gives of a piece, if it takes one of a member."""
        for role in (Role.ROWS, Role.COLUMNS, Role.SUM):
            reads = self.roles(user, role)
            if reads is not None and reads.get(member) is self.members[member]:
                return role
        return None

    def roles(self, node: fx.Node, role: Role) -> Mapping[fx.Node, Role] | None:
        """What a node must read to give that; None where it cannot."""
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        shape = node.meta["val"].shape
        if role is Role.ROWS and not self.lead(node):
            return None
        if role is Role.COLUMNS and (len(shape) != 2 or shape[1] != self.rows):
            return None
        reads = _ROLES.get(node.target, _of_loop)(self, node, role)
        found = {} if reads is None else dict(reads)
        cut = [n for n, r in found.items() if r is Role.ROWS]
        if reads is None or len(found) < len(set(reads)) or not all(map(self.lead, cut)):
            return None
        return found

    @property
    def each(self) -> int:
        """Rows of a piece."""
        return self.rows // self.pieces

    def lead(self, node: fx.Node) -> int:
        """How many dimensions the rows are; 0 where a value has none, or not in equal pieces."""
        shape = node.meta["val"].shape
        if self.rows % self.pieces or any(not isinstance(size, int) for size in shape):
            return 0
        if shape and shape[0] == self.rows:
            return 1
        if len(shape) < 2 or shape[0] * shape[1] != self.rows:
            return 0
        return 2 if self.each % shape[1] == 0 or shape[1] % self.each == 0 else 0

    def piece_shape(self, node: fx.Node) -> list[int]:
        """Of one that the rows lead."""
        shape = [*node.meta["val"].shape]
        if self.lead(node) == 1:
            return [self.each, *shape[1:]]
        rows = [self.each // shape[1], shape[1]] if self.each % shape[1] == 0 else [1, self.each]
        return [*rows, *shape[2:]]

    def places(self, node: fx.Node, number: int) -> list[tuple[int, int, int]]:
        """Dimension, start and end of what is to be sliced for a piece."""
        start = number * self.each
        sizes = self.piece_shape(node)
        if self.lead(node) == 1:
            return [(0, start, start + self.each)]
        batch, inside = divmod(start, node.meta["val"].shape[1])
        places = [(0, batch, batch + sizes[0])]
        return places if sizes[1] != self.each else [*places, (1, inside, inside + sizes[1])]


Reads = Sequence[tuple[Any, Role]] | None
"""What a node must read, and as what."""


def _of_product(stretch: Stretch, node: fx.Node, role: Role) -> Reads:
    arguments: tuple[Any, ...] = node.args
    *bias, left, right = arguments
    inner = left.meta["val"].shape[1]
    if node.kwargs or (role is Role.SUM and inner != stretch.rows):
        return None
    if role is Role.ROWS and all(added.meta["val"].dim() == 1 for added in bias):
        return [*((added, Role.WHOLE) for added in bias), (left, Role.ROWS), (right, Role.WHOLE)]
    if role is Role.SUM and not bias:
        return [(left, Role.COLUMNS), (right, Role.ROWS)]
    return None


def _of_turn(stretch: Stretch, node: fx.Node, role: Role) -> Reads:
    value = node.all_input_nodes[0].meta["val"]
    if value.dim() != 2 or node.meta["val"].stride() != value.stride()[::-1]:
        return None
    other = {Role.ROWS: Role.COLUMNS, Role.COLUMNS: Role.ROWS}.get(role)
    return [(node.args[0], other)] if other else None


def _of_view(stretch: Stretch, node: fx.Node, role: Role) -> Reads:
    return [(node.args[0], Role.ROWS)] if role is Role.ROWS else None


def _of_reduction(stretch: Stretch, node: fx.Node, role: Role) -> Reads:
    """Over all rows, a sum; over other dimensions, of each row."""
    source: Any = node.args[0]
    if not stretch.lead(source) or node.kwargs or len(node.args) < 2:
        return None
    value, lead = source.meta["val"], stretch.lead(source)
    named: Any = node.args[1]
    dims = {d % value.dim() for d in named}
    over = dims == set(range(lead)) and node.target is aten.sum.dim_IntList
    inside = bool(dims) and min(dims) >= lead
    if (role is Role.SUM and over) or (role is Role.ROWS and inside):
        return [(source, Role.ROWS)]
    return None


def _of_loop(stretch: Stretch, node: fx.Node, role: Role) -> Reads:
    """Of each entry, from entries in the same place."""
    target = node.target
    is_loop = isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags
    random = isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    if role is not Role.ROWS or random or not (is_loop or target in _COPIES):
        return None
    shape = node.meta["val"].shape
    reads = []
    for source in node.all_input_nodes:
        own = source.meta["val"].shape if isinstance(source.meta["val"], torch.Tensor) else ()
        rows = [*own[: max(0, len(own) - len(shape) + stretch.lead(node))]]
        if len(own) == len(shape) and rows == [*shape[: stretch.lead(node)]]:
            reads.append((source, Role.ROWS))
        elif all(size == 1 for size in rows):
            reads.append((source, Role.WHOLE))
        else:
            return None
    return reads


_ROLES: dict[Any, Any] = {
    aten.mm.default: _of_product,
    aten.addmm.default: _of_product,
    **dict.fromkeys(TURNS, _of_turn),
    **dict.fromkeys((*VIEWS, aten.detach.default, aten.alias.default), _of_view),
    **dict.fromkeys(_REDUCTIONS, _of_reduction),
}


def numel(node: Any) -> int:
    """Entries of an operator's result; 0 where it has none, or their number is a symbol."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or node.op != "call_function":
        return 0
    entries = value.numel()
    return entries if isinstance(entries, int) else 0


def stretch_of(seed: fx.Node, pieces: int) -> Stretch | None:
    """All that must be cut with a value; None where something keeps it whole."""
    if not numel(seed) or seed.meta["val"].dim() < 2:
        return None
    shape = seed.meta["val"].shape
    for rows in (shape[0] * shape[1], shape[0]) if len(shape) > 2 else (shape[0],):
        stretch = Stretch(rows, pieces)
        if stretch.add(seed, Role.ROWS) and _grow(stretch, seed) and stretch.is_consistent():
            return stretch
    return None


def _grow(stretch: Stretch, seed: fx.Node) -> bool:
    """Add what is as wide, and what reads that; False where a reader wants it whole.

    What a wide value is read from is taken whole where it cannot be cut.
    """
    least = _WIDE * numel(seed)
    members, todo = stretch.members, [seed]
    while todo:
        node = todo.pop()
        for source, role in stretch.reads[node].items():
            wide = role is not Role.WHOLE and numel(source) >= least
            if wide and source not in members and stretch.add(source, role):
                todo.append(source)
        if members[node] is Role.SUM or numel(node) < least:
            continue
        for user in node.users:
            if user not in members:
                role_ = stretch.role_of(user, node)
                if role_ is None or not stretch.add(user, role_):
                    return False
                todo.append(user)
    _absorb(stretch)
    return True


def _absorb(stretch: Stretch) -> None:
    """Add what is read from pieces alone, where that leaves fewer values to put together."""
    todo = [*stretch.members]
    for node in todo:
        if stretch.members[node] is not Role.ROWS:
            continue
        outside = [user for user in node.users if user not in stretch.members]
        if outside and all(_needs_no_more(stretch, user) for user in outside):
            for user in outside:
                stretch.add(user, Role.ROWS)
            todo += outside


def _needs_no_more(stretch: Stretch, user: fx.Node) -> bool:
    reads = stretch.roles(user, Role.ROWS)
    return reads is not None and all(
        stretch.members.get(source) is Role.ROWS
        for source, role in reads.items()
        if role is not Role.WHOLE
    )
