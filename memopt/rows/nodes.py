"""What a fused region needs to know of a node of an aten graph.

A view that keeps the order of entries, or repeats some, is seen through: its readers read what it
is a view of, at another index. So are constants, which cost nothing to make again.
"""

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from memopt._torch import size_expr
from memopt.graph import aten, packet_name, prims
from memopt.rows.index import Size, Space, UnfusableError, product, ratio

_SAME_ORDER = frozenset(
    "aten.view aten.reshape aten._unsafe_view aten.unsqueeze aten.squeeze aten.alias "
    "aten.detach".split()
)
FILLED = frozenset({"aten.full", "aten.scalar_tensor"})
_PROGRESSIONS = (prims.iota.default, aten.arange.start_step, aten.arange.default)
LOOKUP = prims.inductor_lookup_seed.default
RANDOM = prims.inductor_random.default
_MOMENTS = aten.var_mean.correction


def keeps_order(node: fx.Node) -> bool:
    """Whether the node is a view with the same entries in the same order."""
    return packet_name(node.target) in _SAME_ORDER


def repeats(node: fx.Node) -> bool:
    """Whether the node is a view that repeats entries."""
    return node.target is aten.expand.default


def is_progression(node: fx.Node) -> bool:
    """Whether the node's entries are whole numbers at equal distances."""
    return node.target in _PROGRESSIONS


def is_constant(node: fx.Node) -> bool:
    """Whether the node's entries follow from their places, or it looks one number up."""
    return packet_name(node.target) in FILLED or is_progression(node) or node.target is LOOKUP


def is_seen_through(node: fx.Node) -> bool:
    """Whether readers of the node read something else in its place."""
    return keeps_order(node) or repeats(node) or is_constant(node) or node.target is _MOMENTS


def is_part_of_moments(node: fx.Node) -> bool:
    """Whether the node is the variance or the mean of ``var_mean``."""
    return node.target is operator.getitem and node.all_input_nodes[0].target is _MOMENTS


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """What the node reads, symbolic sizes too, with what is seen through left out."""
    for source in node.all_input_nodes:
        if is_seen_through(source):
            yield from operands(source)
        else:
            yield source


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the node, with what is seen through left out."""
    for user in node.users:
        if is_seen_through(user):
            yield from readers(user)
        else:
            yield user


def results_of(members: Collection[fx.Node]) -> list[fx.Node]:
    """The members that other nodes read."""
    inside = set(members)
    return [node for node in members if set(readers(node)) - inside]


def shape_of(node: Any) -> tuple[Size, ...]:
    """The traced sizes, symbolic ones as sympy expressions.

    Raises:
        UnfusableError: it is no tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise UnfusableError(f"{node.name} is no tensor")
    return tuple(map(plain_size, value.shape))


def plain_size(size: Any) -> Size:
    """A size as an int, or a sympy expression where it is symbolic."""
    expression = size_expr(size)
    return (
        expression if isinstance(expression, int) or expression.free_symbols else int(expression)
    )


def dtype_of(node: Any) -> torch.dtype:
    """The traced dtype.

    Raises:
        UnfusableError: it is no tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise UnfusableError(f"{node.name} is no tensor")
    return value.dtype


def contiguous(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The strides of a contiguous tensor."""
    return tuple(product(shape[place + 1 :]) for place in range(len(shape)))


def space_of(node: fx.Node) -> Space:
    """The rows that a tensor consists of: everything but its last dimension.

    Raises:
        UnfusableError: it is no tensor, its last dimension is symbolic, or there is one row.
    """
    shape = shape_of(node)
    if not shape or not isinstance(shape[-1], int) or shape[-1] < 2:
        raise UnfusableError(f"{node.name} has no rows of a fixed width")
    rows = ratio(product(shape), shape[-1])
    if rows in (None, 0, 1):
        raise UnfusableError(f"{node.name} is one row")
    return Space(rows, shape[-1])


def progression(node: fx.Node) -> tuple[int, int]:
    """First number and distance of an ``arange``.

    Raises:
        UnfusableError: they are symbolic, or no whole numbers.
    """
    args, named = node.args, node.kwargs
    if node.target is prims.iota.default:
        first, step = named["start"], named["step"]
    else:
        first = args[0] if len(args) > 1 else 0
        step = args[2] if len(args) > 2 else 1
    if not isinstance(first, int) or not isinstance(step, int) or dtype_of(node).is_floating_point:
        raise UnfusableError(f"{node.name} is no progression of whole numbers")
    return first, step
