"""Gradients of a convolution's or a linear layer's weight in a joint graph, and what goes with it.

Where a layer's result is scaled by channel, the gradient that comes in is a scaled one. The same
kernels run with what it was before: for the gradient of the layer's input the weight is scaled
instead, and the weight's gradient afterwards. A scale may be 0, so it cannot be taken back later.

Legend: ``x`` a layer's input, ``y`` its result, ``d`` a gradient that is ``y``'s once scaled.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from memopt.graph import TURNS, aten
from memopt.passes.channels import Step, step_again, sums_all_but
from memopt.passes.joint_nodes import call

_BACKWARD, _CONVOLUTION = aten.convolution_backward.default, aten.convolution.default
_PRODUCT, _PRODUCT_AND_SUM = aten.mm.default, aten.addmm.default


@dataclass(frozen=True)
class ConvolutionGradient:
    """Of a convolution in any number of dimensions, whose gradients are one operator's.

    Attributes:
        node: the operator.
    """

    node: fx.Node

    @property
    def dy(self) -> Any:
        """The gradient that comes in; its channels are axis 1."""
        return self.node.args[0]

    @property
    def is_trained(self) -> bool:
        """Whether the weight's gradient is asked for."""
        mask: Any = self.node.args[10]
        return bool(mask[1])

    def is_of(self, y: fx.Node) -> bool:
        """Whether ``y`` is a convolution of the same input in the same way, by any weight."""
        alike = y.target is _CONVOLUTION and y.args[0] is self.node.args[1]
        return alike and [*y.args[3:9]] == [*self.node.args[4:10]]

    def parts(self, y: fx.Node) -> tuple[Any, Any]:
        """Weight and bias of a convolution."""
        return y.args[1], y.args[2]

    def unscaled(
        self, graph: fx.Graph, d: fx.Node, steps: Sequence[Step], total: fx.Node
    ) -> tuple["ConvolutionGradient", fx.Node]:
        """Replace the operator by one that takes ``d``.

        Args:
            graph: the graph, positioned before the operator.
            d: the gradient before it was scaled.
            steps: the scales.
            total: its sums by channel, of which the bias's gradient is made.

        Returns:
            The new operator, and its unscaled gradient of the weight.
        """
        arguments: Any = self.node.args
        _, x, weight, _, *geometry, mask = arguments
        weight = self._scaled(graph, weight, steps) if mask[0] else weight
        wanted = [mask[0], True, False]
        node = call(graph, _BACKWARD, d, x, weight, None, *geometry, wanted, like=self.node)
        own = call(graph, operator.getitem, node, 1, like=self.node)
        made: dict[Any, Callable[[], fx.Node]] = {
            0: lambda: call(graph, operator.getitem, node, 0, like=self.node),
            1: lambda: self._scaled(graph, own, steps),
            2: lambda: _stepped(graph, total, steps, [-1]),
        }
        for part in self.node.users:
            part.replace_all_uses_with(made[part.args[1]]())
        return ConvolutionGradient(node), own

    def sums(self, graph: fx.Graph, own: fx.Node, y: fx.Node) -> fx.Node:
        """``d * y`` summed by channel, but for the bias, from the weight's unscaled gradient."""
        shape, channels = self._shapes(own)
        product = call(graph, aten.mul.Tensor, own, self.parts(y)[0], like=own)
        product = _view(graph, product, shape)
        rest = [axis for axis, n in enumerate(channels) if n == 1]
        return _view(graph, call(graph, aten.sum.dim_IntList, product, rest, like=own), [-1])

    def _scaled(self, graph: fx.Graph, weight: fx.Node, steps: Sequence[Step]) -> fx.Node:
        shape, channels = self._shapes(weight)
        value = _stepped(graph, _view(graph, weight, shape), steps, channels)
        return _view(graph, value, [*weight.meta["val"].shape])

    def _shapes(self, weight: fx.Node) -> tuple[list[int], list[int]]:
        """The weight's shape with the result's channels apart, and the shape of one for each."""
        (first, *rest), (transposed, _, groups) = weight.meta["val"].shape, self.node.args[7:10]
        if not transposed:
            return [first, *rest], [first] + [1] * len(rest)
        own = [groups, 1, rest[0]] + [1] * (len(rest) - 1)
        return [groups, first // groups, *rest], own


@dataclass(frozen=True)
class LinearGradient:
    """Of a linear layer, a product of its own: ``dy.t() @ x``, or ``x.t() @ dy``.

    Attributes:
        node: the product.
        axis: where the result's channels are in it.
    """

    node: fx.Node
    axis: int
    is_trained: ClassVar[bool] = True

    @property
    def dy(self) -> Any:
        """The gradient that comes in; its channels are axis 1."""
        return self._factors[self.axis]

    @property
    def _factors(self) -> tuple[Any, Any]:
        turn, other = self.node.args
        return turn.all_input_nodes[0], other  # type: ignore[union-attr]

    def is_of(self, y: fx.Node) -> bool:
        """Whether ``y`` is a product of the same input, with any weight."""
        adds = y.target is _PRODUCT_AND_SUM
        if y.kwargs or not (adds or y.target is _PRODUCT):
            return False
        by_channel = not adds or self.parts(y)[1].meta["val"].dim() < 2
        return by_channel and y.args[int(adds)] is self._factors[1 - self.axis]

    def parts(self, y: fx.Node) -> tuple[Any, Any]:
        """Weight, as the product takes it, and bias of a layer."""
        return (y.args[1], None) if y.target is _PRODUCT else (y.args[2], y.args[0])

    def unscaled(
        self, graph: fx.Graph, d: fx.Node, steps: Sequence[Step], total: fx.Node
    ) -> tuple["LinearGradient", fx.Node]:
        """Replace the product by one with ``d``, and those of the input and the bias likewise.

        Args:
            graph: the graph, positioned before the product.
            d: the gradient before it was scaled.
            steps: the scales.
            total: its sums by channel, of which the bias's gradient is made.

        Returns:
            The new product, which is the weight's unscaled gradient, twice.
        """
        dy, factors = self.dy, [*self._factors]
        factors[self.axis] = d
        factors[0] = call(graph, aten.permute.default, factors[0], [1, 0], like=self.node)
        own = call(graph, _PRODUCT, *factors, like=self.node)
        channels = [1, -1] if self.axis else [-1, 1]
        self.node.replace_all_uses_with(_stepped(graph, own, steps, channels))
        for other in [*dy.users] if steps else ():
            with graph.inserting_before(other):
                if other.target is _PRODUCT and other.args[0] is dy:
                    weight = _stepped(graph, other.args[1], steps, [-1, 1])
                    other.replace_all_uses_with(call(graph, _PRODUCT, d, weight, like=other))
                elif sums_all_but(other, 1):
                    bias = _stepped(graph, total, steps, [-1])
                    bias = _view(graph, bias, [*other.meta["val"].shape])
                    other.replace_all_uses_with(bias)
        return LinearGradient(own, self.axis), own

    def sums(self, graph: fx.Graph, own: fx.Node, y: fx.Node) -> fx.Node:
        """``d * y`` summed by channel, but for the bias, from the weight's unscaled gradient."""
        weight = self.parts(y)[0]
        if not self.axis:
            weight = call(graph, aten.permute.default, weight, [1, 0], like=own)
        product = call(graph, aten.mul.Tensor, own, weight, like=own)
        return call(graph, aten.sum.dim_IntList, product, [1 - self.axis], like=own)


WeightGradient = ConvolutionGradient | LinearGradient


def weight_gradients(graph: fx.Graph, late: set[fx.Node]) -> Iterator[WeightGradient]:
    """What may be one of a layer's weight; of a frozen convolution, what would make it."""
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        yield ConvolutionGradient(node)
    for node in graph.find_nodes(op="call_function", target=_PRODUCT):
        turn: Any = node.args[0]
        if turn.target in TURNS and node in late:
            yield LinearGradient(node, int(turn not in late))


def _stepped(graph: fx.Graph, value: Any, steps: Sequence[Step], channels: Sequence[int]) -> Any:
    for step in steps:
        value = step_again(graph, step, value, channels)
    return value


def _view(graph: fx.Graph, value: fx.Node, shape: list[int]) -> fx.Node:
    if [*value.meta["val"].shape] == shape:
        return value
    return call(graph, aten.view.default, value, shape, like=value)
