"""Writes the coefficients that values by rows have in a scalar.

A scalar that is linear in values ``v``, but for a constant, changes by ``sum(c * dv)``. The
coefficients ``c`` are found by walking back from the scalar, where they are 1: the transpose of
every step makes of the coefficients of its result those of its input. Coefficients are a number,
or a tensor that broadcasts to the shape of what they belong to.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, extent, same_shape, shape_of, traced
from memopt.passes.heads import loosely

Coefficients = float | fx.Node


def picks(node: fx.Node) -> bool:
    """Whether a node picks values by a mask."""
    mask = node.args[1] if node.target is operator.getitem else None
    return isinstance(mask, fx.Node) and bool(shape_of(mask))


class Writer:
    """Writes the nodes of coefficients.

    Attributes:
        graph: positioned where they are to stand.
        inputs: what each node of values comes from; None for the values by rows themselves.
        zeros: makes zeros of the shape of these.
        dtype: of coefficients: that of losses.
        like: the node whose source line they inherit.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Mapping[fx.Node, fx.Node | None],
        zeros: Callable[[], fx.Node],
        dtype: torch.dtype,
        like: fx.Node,
    ) -> None:
        self.graph, self.dtype, self.like = graph, dtype, like
        self._inputs, self._zeros = inputs, zeros
        self._ghosts: dict[fx.Node, fx.Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)

    def ghost(self, node: fx.Node) -> fx.Node:
        """Zeros of a node's shape, which may be symbolic: zeros that took the same steps."""
        if node not in self._ghosts:
            before = self._inputs[node]
            if before is None:
                self._ghosts[node] = self._zeros()
            elif same_shape(shape_of(node), shape_of(before)):
                self._ghosts[node] = self.ghost(before)
            else:
                args = [self.ghost(before) if a is before else a for a in node.args]
                self._ghosts[node] = self.call(node.target, *args, **node.kwargs)
        return self._ghosts[node]

    def sizes(self, node: fx.Node, dims: Iterable[int]) -> list[int | fx.Node]:
        """Some sizes of a node, and for rows that a mask picked how many these are."""
        picked: fx.Node | None = node
        while picked is not None and not picks(picked):
            picked = self._inputs[picked]
        if picked is None:
            return [extent(self.graph, self.ghost(node), d) for d in dims]
        before, mask = loosely(picked.args)
        rest = range(len(shape_of(mask)), len(shape_of(before)))
        count = self.call("sum", mask)
        return [count, *(extent(self.graph, self.ghost(before), d) for d in rest)]

    def scaled(
        self, c: Coefficients, factor: Any, target: Callable[..., Any] = operator.mul
    ) -> Coefficients:
        """``c * factor``, or another operator of the two."""
        if not isinstance(c, fx.Node) and not isinstance(factor, fx.Node):
            return float(target(c, factor))
        factor = self._wide(factor)
        plain = isinstance(c, float) and c == 1.0 and target is operator.mul
        return factor if plain else self.call(target, c, factor)

    def _wide(self, value: Any) -> Any:
        """A tensor in the coefficients' dtype; numbers as they are."""
        tensor = isinstance(value, fx.Node) and isinstance(traced(value), torch.Tensor)
        if not tensor or traced(value).dtype == self.dtype:
            return value
        return self.call("to", value, self.dtype)

    def filled(self, c: Coefficients, node: fx.Node) -> Coefficients:
        """Coefficients in the shape of their node, unless one number serves all."""
        if not isinstance(c, fx.Node) or not shape_of(c):
            return c
        if same_shape(shape_of(c), shape_of(node)):
            return c
        return self.call("expand_as", c, self.ghost(node))

    def tensor(self, c: Coefficients, node: fx.Node) -> fx.Node:
        """Coefficients as a tensor of the shape of their node."""
        if not isinstance(c, fx.Node) or not isinstance(traced(c), torch.Tensor):
            return self.call(operator.add, self.ghost(node), c)
        return self.call("expand_as", c, self.ghost(node))
