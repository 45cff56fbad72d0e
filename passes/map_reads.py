"""Rows of maps: which of them are read, and what makes some of them.

A map is a value with dimensions in space or time; its rows are its entries along one dimension.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt._torch import pytree
from memopt.graph import aten
from memopt.passes.joint_nodes import call

Window = Callable[[int, int], tuple[int, int]]
"""For rows ``a`` to before ``b`` of a node, those of an input that they need; may be beyond it."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a value: a node, and which they are."""

    node: fx.Node
    start: int
    end: int


@dataclass(frozen=True)
class Read:
    """An input of which a node needs rows.

    Attributes:
        source: the input.
        dim: the dimension of its rows.
        window: which of them.
    """

    source: fx.Node
    dim: int
    window: Window


Given = Mapping[fx.Node, Rows]
Make = Callable[[fx.Graph, Rows, Given], fx.Node]
"""Computes rows of a node from rows of its inputs; an input that is not among them is whole."""


@dataclass(frozen=True)
class Rule:
    """How rows of one node are computed.

    Attributes:
        dim: the dimension of its rows.
        reads: the inputs of which it needs rows; of the others it needs all.
        make: computes some rows.
    """

    dim: int
    reads: tuple[Read, ...]
    make: Make


def shape_of(node: fx.Node) -> torch.Size | None:
    """The shape of a tensor, or of the first of several; None where it is not one of numbers."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(first, torch.Tensor) or not all(isinstance(n, int) for n in first.shape):
        return None
    return first.shape


def rows_in(node: fx.Node, dim: int) -> int:
    """How many rows a value has along a dimension."""
    return int((shape_of(node) or ())[dim])


def bytes_of(node: fx.Node) -> int:
    """What a tensor takes; 0 of anything else."""
    value = node.meta.get("val")
    return value.numel() * value.itemsize if isinstance(value, torch.Tensor) else 0


def narrowed(graph: fx.Graph, rows: Rows, dim: int, start: int, end: int) -> Rows:
    """Some of a node's rows; of several results all, of which `getitem` takes some."""
    is_tensor = isinstance(rows.node.meta["val"], torch.Tensor)
    if not is_tensor or (rows.start, rows.end) == (start, end):
        return rows
    first, last = start - rows.start, end - rows.start
    part = call(graph, aten.slice.Tensor, rows.node, dim, first, last, like=rows.node)
    return Rows(part, start, end)


def same(a: int, b: int) -> tuple[int, int]:
    """The window of an operator that reads of each row that row."""
    return a, b


def whole_or_part(given: Given, node: fx.Node) -> fx.Node:
    """An argument as it is to be read."""
    return given[node].node if node in given else node


def again(node: fx.Node) -> Make:
    """The same operator, on rows."""

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda n: whole_or_part(given, n), (node.args, node.kwargs)
        )
        return call(graph, node.target, *args, like=node, **kwargs)

    return make


def source_of(node: fx.Node) -> fx.Node:
    """The first argument."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def constant_of(node: fx.Node) -> torch.Tensor | None:
    """A value that depends on no input of a graph without random numbers; None where it does."""
    todo, cone = [node], {node}
    while todo:
        inner = todo.pop()
        if inner.op != "call_function":
            return None
        todo += set(inner.all_input_nodes) - cone
        cone.update(inner.all_input_nodes)
    order = [inner for inner in node.graph.nodes if inner in cone]
    last = {source: inner for inner in order for source in inner.all_input_nodes}
    made: dict[fx.Node, Any] = {}
    for inner in order:
        args, kwargs = fx.map_arg((inner.args, inner.kwargs), made.__getitem__)
        made[inner] = inner.target(*args, **kwargs)
        for source in inner.all_input_nodes:
            if last[source] is inner:
                del made[source]
    found = made[node]
    return found if isinstance(found, torch.Tensor) else None


def constant(graph: fx.Graph, value: torch.Tensor, *, like: fx.Node) -> fx.Node:
    """A tensor of the graph's own; equal ones are one."""
    gm: Any = graph.owning_module
    fake = like.meta["val"]
    value = value.to(fake.device, fake.dtype)
    count = 0
    while (known := getattr(gm, f"_map_rows_{count}", None)) is not None:
        if known.dtype == value.dtype and torch.equal(known, value):
            break
        count += 1
    else:
        gm.register_buffer(f"_map_rows_{count}", value)
    node = graph.get_attr(f"_map_rows_{count}")
    seen = fake.fake_mode.from_tensor(value, static_shapes=True)
    node.meta.update(like.meta, val=seen)
    return node
