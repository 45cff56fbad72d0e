"""Where results go that are computed by rows: into maps of their own, or into what others leave.

A map has channels, of which values take some. Those of a value that nothing reads any more are
free; those of one that dies while a result is computed take the result row by row.
"""

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memopt._torch import pytree
from memopt.graph import aten, is_view
from memopt.passes.joint_nodes import call
from memopt.passes.map_attention import ATTENTIONS
from memopt.passes.map_moves import empty, part, put, width_of
from memopt.passes.map_reads import Rows, Rule
from memopt.passes.map_rules import REDUCTIONS, VIEWS

_CHANNELS = 1  # the dimension
_ANY_LAYOUT = (*REDUCTIONS, aten.reshape.default)


@dataclass
class Room:
    """The maps of a graph that is being cut, in the order in which it runs.

    Attributes:
        level: of every node, when it is computed.
        alone: values that get maps of their own.
        by_rows: what is computed by rows.
        moved: what stands for the values that are computed by rows.
        maps: each map as it is by now, by the value that it was made for.
        places: of each value in a map the map, its first channel and the dimension of its rows.
    """

    level: Mapping[fx.Node, int]
    alone: Collection[fx.Node]
    by_rows: Collection[fx.Node]
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)
    maps: dict[fx.Node, fx.Node] = field(default_factory=dict)
    places: dict[fx.Node, tuple[fx.Node, int, int]] = field(default_factory=dict)

    def current(self, node: fx.Node) -> fx.Node:
        """A value as it is by now."""
        if node not in self.places:
            return self.moved.get(node, node)
        owner, channel, dim = self.places[node]
        return part(self.maps[owner], dim, channel, width_of(node), like=node)

    def put(self, node: fx.Node, rows: Rows) -> None:
        """Some rows of a value go to its place."""
        owner, channel, dim = self.places[node]
        where = dim, rows.start, channel
        before = self.maps[owner]
        self.maps[owner] = put(before, rows.node, *where, like=node)
        if before.target is aten.empty_strided.default:  # not there before it is needed
            self.maps[owner].prepend(before)

    def view(self, node: fx.Node) -> fx.Node:
        """All of a value that is a view of one in a map."""
        known = node in self.places or node in self.moved
        if known or not is_view(node) or node.target is operator.getitem:
            return self.current(node)
        seen = {source: self.view(source) for source in node.all_input_nodes}
        args, kwargs = pytree.tree_map_only(fx.Node, seen.__getitem__, (node.args, node.kwargs))
        target = aten.reshape.default if node.target in VIEWS else node.target
        return call(node.graph, target, *args, like=node, **kwargs)

    def find(
        self,
        node: fx.Node,
        dims: Mapping[fx.Node, int],
        members: Mapping[fx.Node, Rule],
        ends: Iterable[Mapping[fx.Node, int]],
    ) -> None:
        """Find a place for a result.

        Args:
            node: the result.
            dims: the dimension of the rows of every value of its region.
            members: what the region computes, and how.
            ends: for each piece the row before which it ends, of every value of the region.
        """
        at = self.level[node]
        for source in dims:
            if source not in members and source not in self.places and _is_own(source):
                self.maps[source] = source
                self.places[source] = source, 0, dims[source]

        def is_in_the_way(other: fx.Node) -> bool:
            if other in members or not self._is_done(other, at, members):
                return True
            if any(_is_whole(other, members[user]) for user in other.users if user in members):
                return True
            return other in dims and any(e[node] > e[other] for e in ends)

        width = width_of(node)
        owners = dict.fromkeys(owner for owner, *_ in self.places.values())
        for owner in () if node in self.alone else owners:
            values = [n for n, (own, *_) in self.places.items() if own is owner]
            taken = [n for n in values if is_in_the_way(n)]
            dying = [n for n in values if n in dims and n not in taken]
            if not (taken or dying) or not self._fits(node, owner, dims[node]):
                continue
            spans = [self._channels(n) for n in taken]
            for channel in (0, *(end for _, end in spans)):
                last = channel + width
                clear = all(last <= first or end <= channel for first, end in spans)
                if clear and last <= width_of(self.maps[owner]):
                    self.places[node] = owner, channel, dims[node]
                    return
        self.maps[node] = self._empty(node)
        self.places[node] = node, 0, dims[node]

    def overlap(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two values have channels of the same map."""
        if one not in self.places or other not in self.places:
            return False
        (first, end), (start, last) = self._channels(one), self._channels(other)
        return self.places[one][0] is self.places[other][0] and first < last and start < end

    def _channels(self, node: fx.Node) -> tuple[int, int]:
        first = self.places[node][1]
        return first, first + width_of(node)

    def _fits(self, node: fx.Node, owner: fx.Node, dim: int) -> bool:
        """Whether a result has the rows of a map, and, where it is returned, all of it."""
        own, whole = node.meta["val"], self.maps[owner].meta["val"]
        if own.dim() != whole.dim() or own.dim() < 3 or own.dtype != whole.dtype:
            return False
        if dim != self.places[owner][2] or dim == _CHANNELS or own.device != whole.device:
            return False
        shape = [*whole.shape]
        shape[_CHANNELS] = own.shape[_CHANNELS]
        alike = own.shape == whole.shape and own.stride() == whole.stride()
        return shape == [*own.shape] and (alike or not _is_returned(node))

    def _is_done(self, node: fx.Node, at: int, members: Collection[fx.Node]) -> bool:
        """Whether nothing reads a value, or a view of it, after a region of some level.

        Nor in the region by way of a view that is there before: what the region reads of the
        value itself it takes in order, of such a view it does not.
        """
        for user in node.users:
            inside = user in members
            if not inside and (user.op == "output" or self.level.get(user, -1) >= at):
                return False
            if is_view(user):
                if not inside and any(reader in members for reader in user.users):
                    return False
                if not self._is_done(user, at, members):
                    return False
        return True

    def _empty(self, node: fx.Node) -> fx.Node:
        """A map for a value: as it was, or in the layout that convolutions on the CPU prefer."""
        value = node.meta["val"]
        laid = torch.empty_like(value, memory_format=channels_last(value))
        return empty(node, laid if self._may_be(node, laid) else torch.empty_like(value))

    def _may_be(self, node: fx.Node, laid: torch.Tensor) -> bool:
        """Whether what is computed whole is laid out as before, if a value is as given."""
        for user in node.users:
            by_rows = user in self.by_rows and user.target not in ATTENTIONS
            if by_rows and not (is_view(user) and self._is_seen(user)):
                continue
            if not by_rows and user.target not in _ANY_LAYOUT:
                return False
            target: Any = aten.reshape.default if user.target in VIEWS else user.target
            result = target(laid, *user.args[1:], **user.kwargs)
            if _layouts(result) == _layouts(user.meta["val"]):
                continue
            shown = is_view(user) and isinstance(result, torch.Tensor)
            if not shown or not self._may_be(user, result):
                return False
        return True

    def _is_seen(self, view: fx.Node) -> bool:
        """Whether a view, or one of it, is read by what is not computed by rows."""
        return any(
            user not in self.by_rows or (is_view(user) and self._is_seen(user))
            for user in view.users
        )


def channels_last(value: torch.Tensor) -> torch.memory_format:
    """The layout that convolutions on the CPU prefer; that which it has on other devices."""
    if value.device.type != "cpu":
        return torch.preserve_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(
        value.dim(), torch.preserve_format
    )


def _layouts(value: object) -> list[list[int]]:
    """The strides of every tensor of a result, where there is more than one place to step to."""
    return [
        [step for size, step in zip(t.shape, t.stride(), strict=True) if size != 1]
        for t in pytree.tree_leaves(value)
    ]


def _is_whole(node: fx.Node, rule: Rule) -> bool:
    """Whether a reader with this rule needs all of a node."""
    return all(read.source is not node for read in rule.reads)


def _is_own(node: fx.Node) -> bool:
    """Whether a value that is not computed by rows has memory of its own."""
    return node.target is aten.convolution.default


def _is_returned(node: fx.Node) -> bool:
    return any(u.op == "output" or (is_view(u) and _is_returned(u)) for u in node.users)
