"""Makes one rotary operator of two that turn by the same tables: queries and keys."""

import operator
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, same_shape, traced
from memopt.kernels.rotary import ROTARY
from memopt.passes.heads import loosely, overwriter
from memopt.passes.rules import changes_mode

_VIEWS = frozenset({"view", "transpose", "unsqueeze", operator.getitem})
_VIEWS |= {"unflatten", "flatten"}  # the copy that takes pairs apart
_PURE = frozenset(
    {operator.getitem, operator.neg, "unsqueeze", "repeat_interleave", torch.repeat_interleave}
    | {"to", "float", torch.view_as_real, torch.complex, "contiguous"}
)


def pair_up(graph: fx.Graph) -> None:
    """Let one operator do what two do by the same tables, where one can stand for both."""
    alone: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=ROTARY):
        key = str([_key(argument) for argument in node.args[2:]])
        first = alone.pop(key, None)
        if first is None or not _merge(graph, first, node):
            alone[key] = node


def _key(value: Any) -> str:
    """Equal for tables that are made of the same nodes in the same way."""
    if isinstance(value, fx.Node) and value.target in _PURE:
        return f"{value.target}{[_key(a) for a in (*value.args, *value.kwargs.values())]}"
    return str(value)


def _merge(graph: fx.Graph, first: fx.Node, second: fx.Node) -> bool:
    """Turn both operators' tensors in the place of the first, or else of the second."""
    q, k = loosely(first.args[0]), loosely(second.args[0])
    a, b = traced(q), traced(k)
    alike = a.dtype == b.dtype and same_shape(a.shape[2:], b.shape[2:])
    if not alike or not same_shape(a.shape[:1], b.shape[:1]):
        return False
    views, base = _views(k, first)
    early = base < first
    readers = (reader for result in first.users for reader in result.users)
    if not early and any(reader < second for reader in readers):
        return False
    read = [*((k, base) if early else (q,)), *loosely(second.args[2:4])]
    if changes_mode(first, second) or overwriter(read, first, second):
        return False
    for view in views if early else ():
        first.prepend(view)
    with graph.inserting_before(first if early else second):
        like = next(iter(first.users))
        both = emit(graph, ROTARY, (q, k, *first.args[2:]), like=like)
        turned = [emit(graph, operator.getitem, (both, place), like=like) for place in (0, 1)]
    for old, new in zip((first, second), turned, strict=True):
        for result in list(old.users):
            result.replace_all_uses_with(new)
            graph.erase_node(result)
        nothing = loosely(old.args[1])
        graph.erase_node(old)
        if not nothing.users:
            graph.erase_node(nothing)
    return True


def _views(node: fx.Node, place: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The views behind a place that a node is made by, in order, and what they are views of."""
    views: list[fx.Node] = []
    while not node < place and node.target in _VIEWS and len(node.all_input_nodes) == 1:
        views.insert(0, node)
        node = loosely(node.args[0])
    return views, node
