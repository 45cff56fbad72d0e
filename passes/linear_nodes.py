"""Which nodes of a joint graph are linear in which of their inputs, by operator."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from memopt._torch import OpOverload, pytree
from memopt.graph import aten, is_mutating, is_view, packet_name, prims

_LINEAR = frozenset(
    "aten.sum aten.mean aten.neg aten.clone aten._to_copy aten.expand aten.cumsum aten.flip "
    "aten.repeat aten.gather aten.index aten.index_select aten.as_strided "
    "prims.convert_element_type".split()
)
_BACKWARD = ("_backward", "_backward_data")
_PRODUCTS = frozenset("aten.mul aten.mm aten.bmm".split())
_INTO_ZEROS = frozenset(
    "aten.slice_scatter aten.select_scatter aten.index_put aten.scatter_add aten.index_add".split()
)


def is_linear(node: fx.Node, read: list[fx.Node]) -> bool:
    """Whether a node is linear in some of its inputs, all at once.

    Args:
        node: of a joint graph.
        read: the inputs.
    """
    target, name = node.target, packet_name(node.target)
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or is_mutating(node):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    slots = [at for at, given in enumerate(node.args) if _among(given, read)]
    if _among([*node.kwargs.values()], read):
        return False
    return bool(
        (slots == [0] and (is_view(node) or name in _LINEAR))
        or (name in _PRODUCTS and len(slots) == 1)
        or (name in ("aten.add", "aten.sub") and slots == [0, 1])
        or (name == "aten.constant_pad_nd" and slots == [0] and not any(node.args[2:]))
        or (name == "aten.addmm" and slots in ([0, 1], [0, 2]))
        or (name in ("aten.div", "aten.embedding_dense_backward") and slots == [0])
        or (name == "aten.where" and _is_choice(node, slots))
        or (name == "aten.cat" and _are_parts(node, read))
        or (name in _INTO_ZEROS and _is_zero(node.args[0]) and 0 not in slots)
        or (slots == [0] and name.startswith(("aten.", "memopt.")) and name.endswith(_BACKWARD))
    )


def _among(given: Any, read: Iterable[fx.Node]) -> bool:
    leaves = pytree.tree_leaves(given)
    return any(leaf in read for leaf in leaves if isinstance(leaf, fx.Node))


def _is_choice(node: fx.Node, slots: list[int]) -> bool:
    """Whether each entry is of an input, or zero."""
    return 0 not in slots and all(at in slots or _is_zero(node.args[at]) for at in (1, 2))


def _are_parts(node: fx.Node, read: list[fx.Node]) -> bool:
    parts: Any = node.args[0]
    return all(part in read or _is_zero(part) for part in parts)


def _is_zero(value: Any) -> bool:
    if isinstance(value, int | float):
        return value == 0
    if not isinstance(value, fx.Node):
        return False
    if is_view(value) or value.target in (aten.clone.default, prims.convert_element_type.default):
        return _is_zero(value.all_input_nodes[0])
    filled = value.target in (aten.full.default, aten.full_like.default)
    return filled and bool(value.args[1] == 0)
