"""What a value is made of by channel: scales, shifts and views of another one.

A norm with running statistics, a layer scale and a frozen affine are chains of such steps. A chain
is followed from its end; an axis is followed with it, since only its place tells what a channel
is: two axes may have one length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from memopt._torch import size_expr
from memopt.graph import TURNS, aten, prims
from memopt.passes.joint_nodes import call

MULTIPLY, DIVIDE, NEGATE = aten.mul.Tensor, aten.div.Tensor, aten.neg.default
ADD, SUBTRACT, SUM = aten.add.Tensor, aten.sub.Tensor, aten.sum.dim_IntList
_STEPS = (MULTIPLY, DIVIDE, ADD, SUBTRACT)
_SHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_COPIES = (
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    prims.convert_element_type.default,
)


class Step(NamedTuple):
    """One operator: the value and an operand by channel, or nothing for a sign.

    Attributes:
        target: the operator.
        operand: a number, or a node whose shape is one but along the axis.
        turned: whether the operand comes first.
    """

    target: Any
    operand: Any = None
    turned: bool = False


@dataclass(frozen=True)
class Chain:
    """How a value is made of another.

    Attributes:
        source: the other value.
        axis: where its channels are.
        steps: what is done to it by channel, in order.
        views: how it is turned, reshaped and copied meanwhile, in order.
    """

    source: fx.Node
    axis: int
    steps: tuple[Step, ...] = ()
    views: tuple[fx.Node, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether nothing is added."""
        return all(step.target in (MULTIPLY, DIVIDE, NEGATE) for step in self.steps)


def chains(node: fx.Node, axis: int) -> Iterator[Chain]:
    """All that a value is made of by channel, itself first.

    Args:
        node: the value.
        axis: where its channels are.
    """
    chain: Chain | None = Chain(node, axis)
    while chain is not None:
        yield chain
        chain = _longer(chain)


def _longer(chain: Chain) -> Chain | None:
    node, axis = chain.source, chain.axis
    if node.target in (*TURNS, *_SHAPES, *_COPIES):
        source = node.all_input_nodes[0]
        inner = _inner_axis(node, source, axis)
        return inner if inner is None else Chain(source, inner, chain.steps, (node, *chain.views))
    if node.target is NEGATE:
        return Chain(node.all_input_nodes[0], axis, (Step(NEGATE), *chain.steps), chain.views)
    if node.target not in _STEPS or node.kwargs:
        return None
    arguments: Any = node.args
    for turned, (source, operand) in enumerate((arguments, arguments[::-1])):
        if (turned and node.target is DIVIDE) or not isinstance(source, fx.Node):
            continue
        if same_shape(source, node) and _is_by_channel(operand, node, axis):
            step = Step(node.target, operand, bool(turned))
            return Chain(source, axis, (step, *chain.steps), chain.views)
    return None


def sums_all_but(node: fx.Node, axis: int) -> bool:
    """Whether a node sums over all axes of a value but one."""
    if node.target is not SUM or node.kwargs:
        return False
    arguments: Any = node.args
    rank = arguments[0].meta["val"].dim()
    return {n % rank for n in arguments[1]} == {*range(rank)} - {axis}


def sizes(node: fx.Node) -> list[Any]:
    """A value's shape, in which symbols can be compared without a guard."""
    return [size_expr(n) for n in node.meta["val"].shape]


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values certainly have one shape."""
    return sizes(one) == sizes(other)


def _is_by_channel(operand: Any, node: fx.Node, axis: int) -> bool:
    if not isinstance(operand, fx.Node):
        return isinstance(operand, int | float) and node.target in (MULTIPLY, DIVIDE)
    value = operand.meta["val"]
    first = node.meta["val"].dim() - value.dim()
    rest = [n for at, n in enumerate(sizes(operand), first) if at != axis]
    return value.is_floating_point() and all(n == 1 for n in rest)


def _inner_axis(view: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where the axis of a view is in what it is a view of."""
    if view.target in _COPIES:
        return axis
    if view.target in TURNS:
        return _order(view)[axis]
    inner, outer = sizes(source), sizes(view)
    after = math.prod(outer[axis + 1 :])
    places = (i for i, n in enumerate(inner) if n == outer[axis])
    return next((i for i in places if math.prod(inner[i + 1 :]) == after), None)


def _order(turn: fx.Node) -> list[int]:
    """Which axis each axis of a transpose was."""
    rank = turn.meta["val"].dim()
    arguments: Any = turn.args[1:]
    if turn.target is aten.permute.default:
        return [axis % rank for axis in arguments[0]]
    order = [*range(rank)]
    one, other = arguments or (0, rank - 1)
    order[one], order[other] = order[other], order[one]
    return order


def undo_one_another(views: Sequence[fx.Node]) -> bool:
    """Whether a value that goes through all the views is laid out as it was.

    False where that does not follow from neighbours that undo one another.
    """
    left: list[tuple[bool, list[Any], list[Any]]] = []  # is it a turn, before, and after
    for view in views:
        if view.target in _COPIES:
            continue
        turns = view.target in TURNS
        before, after = sizes(view.all_input_nodes[0]), sizes(view)
        if turns:
            before, after = [*range(len(after))], _order(view)
        if left and left[-1][0] == turns:
            _, before, middle = left.pop()
            after = [middle[axis] for axis in after] if turns else after
        if before != after:
            left.append((turns, before, after))
    return not left


def view_again(graph: fx.Graph, source: fx.Node, views: Sequence[fx.Node]) -> fx.Node:
    """The views, of another value, whose strides may be others when the graph runs."""
    for view in views:
        target = aten.reshape.default if view.target is aten.view.default else view.target
        source = call(graph, target, source, *view.args[1:], like=view, **view.kwargs)
    return source


def step_again(graph: fx.Graph, step: Step, value: fx.Node, shape: Sequence[int]) -> fx.Node:
    """The step, of another value.

    Args:
        graph: the graph, positioned.
        step: the step.
        value: with channels somewhere.
        shape: of one operand for all channels that can be broadcast over ``value``.
    """
    if step.target is NEGATE:
        return call(graph, NEGATE, value, like=value)
    operand = as_vector(graph, step.operand)
    if isinstance(operand, fx.Node) and len(shape) > 1:
        alone = operand.meta["val"].shape[0] == 1
        operand = call(
            graph,
            aten.view.default,
            operand,
            [1] * len(shape) if alone else [*shape],
            like=operand,
        )
    first, second = (operand, value) if step.turned else (value, operand)
    if not isinstance(first, fx.Node):
        first, second = second, first  # of a product, whose factors may change places
    return call(graph, step.target, first, second, like=value)


def as_vector(graph: fx.Graph, operand: Any) -> Any:
    """An operand by channel with the one axis alone; a number as it is."""
    if not isinstance(operand, fx.Node) or operand.meta["val"].dim() == 1:
        return operand
    return call(graph, aten.view.default, operand, [operand.meta["val"].numel()], like=operand)
