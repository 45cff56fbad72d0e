"""Which rows of its inputs an operator on maps needs for some of its own, and what makes those.

A map is a value with dimensions in space or time; its rows are its entries along one dimension.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt._torch import OpOverload, disable_modes, pytree
from memopt.graph import aten, prims
from memopt.passes.joint_nodes import call

Window = Callable[[int, int], tuple[int, int]]
"""Of a node's rows from ``a`` to before ``b``, the rows of an input, over its edges too."""

_COPIES = (aten.clone.default, aten._to_copy.default, prims.convert_element_type.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_GATHERS = (aten.index.Tensor, aten._unsafe_index.Tensor)
REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)


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
        is_costly: whether rows that are needed again are better kept than computed again.
    """

    dim: int
    reads: tuple[Read, ...]
    make: Make
    is_costly: bool = False


def rule_of(node: fx.Node, dims: Mapping[fx.Node, int], along: int) -> Rule | None:
    """How to compute a node by rows; None where it needs its inputs whole.

    Args:
        node: of a graph of functional operators.
        dims: the dimension of the rows of each value before it that is computed by rows.
        along: the dimension of the rows of a convolution's result.
    """
    target: Any = node.target
    if node.op != "call_function" or not isinstance(shape_of(node), torch.Size):
        return None
    if target is aten.convolution.default:
        return _of_convolution(node, dims, along)
    if dims.keys().isdisjoint(node.all_input_nodes):
        return None
    return _RULES.get(target, _of_loop)(node, dims)


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


def narrowed(graph: fx.Graph, rows: Rows, dim: int, start: int, end: int) -> fx.Node:
    """Some of a node's rows."""
    if (rows.start, rows.end) == (start, end):
        return rows.node
    first, last = start - rows.start, end - rows.start
    return call(graph, aten.slice.Tensor, rows.node, dim, first, last, like=rows.node)


def _same(a: int, b: int) -> tuple[int, int]:
    return a, b


def _whole_or_part(given: Given, node: fx.Node) -> fx.Node:
    return given[node].node if node in given else node


def _again(node: fx.Node) -> Make:
    """The same operator, on rows."""

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda n: _whole_or_part(given, n), (node.args, node.kwargs)
        )
        return call(graph, node.target, *args, like=node, **kwargs)

    return make


def _of_loop(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Each entry is of entries in the same place."""
    target: Any = node.target
    tags = target.tags if isinstance(target, OpOverload) else ()
    if not (torch.Tag.pointwise in tags or target in _COPIES):
        return None
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(node.meta["val"], torch.Tensor):
        return None
    shape = node.meta["val"].shape
    own = {n: len(shape) - len(shape_of(n) or ()) for n in node.all_input_nodes}
    places = {dims[n] + own[n] for n in node.all_input_nodes if n in dims}
    if len(places) != 1:
        return None
    (dim,) = places
    reads = []
    for source in node.all_input_nodes:
        theirs, at = shape_of(source) or (), dim - own[source]
        if 0 <= at < len(theirs) and theirs[at] == shape[dim] != 1:
            reads.append(Read(source, at, _same))
        elif source in dims:
            return None
    return Rule(dim, tuple(reads), _again(node))


def _of_concatenation(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Of maps, along another dimension than that of the rows."""
    parts: Any = node.args[0]
    across: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    places = {dims[part] for part in parts if part in dims}
    if len(places) != 1 or across % node.meta["val"].dim() in places:
        return None
    (dim,) = places
    return Rule(dim, tuple(Read(p, dim, _same) for p in dict.fromkeys(parts)), _again(node))


def _of_permutation(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule:
    source, order = _source(node), node.args[1]
    assert isinstance(order, Sequence)
    dim = [int(d) % len(order) for d in order].index(dims[source])  # type: ignore[arg-type]
    return Rule(dim, (Read(source, dims[source], _same),), _again(node))


def _of_reduction(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Over other dimensions than that of the rows."""
    source = _source(node)
    rank, own, named = source.meta["val"].dim(), dims[source], node.args[1:2]
    if not named or not isinstance(named[0], Sequence) or not named[0]:
        return None
    over = {int(d) % rank for d in named[0]}  # type: ignore[arg-type]
    if own in over:
        return None
    kept = node.meta["val"].dim() == rank
    dim = own if kept else own - sum(d < own for d in over)
    return Rule(dim, (Read(source, own, _same),), _again(node))


def _of_view(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """A row stays a row, becomes several, or is one of several that become one."""
    source = _source(node)
    before, after, own = source.meta["val"].shape, node.meta["val"].shape, dims[source]
    ahead = before[:own].numel()
    places = [d for d, n in enumerate(after) if n != 1 and after[:d].numel() == ahead]
    if not places or before[own] == 1:
        return None
    dim = places[0]
    many, few = after[dim] // before[own], before[own] // after[dim]  # rows of one, for one
    if many * before[own] != after[dim] and few * after[dim] != before[own]:
        return None

    def window(a: int, b: int) -> tuple[int, int]:
        return (a // many, -(-b // many)) if many else (a * few, b * few)

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece = given[source]
        first, last = rows.start, rows.end
        if many:
            first, last = piece.start * many, piece.end * many
        shape = [*after[:dim], last - first, *after[dim + 1 :]]
        made = call(graph, aten.reshape.default, piece.node, shape, like=node)
        return narrowed(graph, Rows(made, first, last), dim, rows.start, rows.end)

    return Rule(dim, (Read(source, own, window),), make)


def _of_gather(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Rows by number, as the nearest pixels of an image are taken to enlarge it.

    The numbers of several dimensions are broadcast over each other.
    """
    source = _source(node)
    if source not in dims:
        return None
    dim = dims[source]
    indices: Any = node.args[1]
    named = [d for d, index in enumerate(indices) if index is not None]
    shape = node.meta["val"].shape
    if dim not in named or named != [*range(named[0], named[-1] + 1)]:
        return None
    if len(shape) != source.meta["val"].dim():
        return None
    others = [indices[d] for d in named if d != dim]
    behind = named[-1] + 1 - dim  # from the right, the dimension of what the rows' numbers give
    index = indices[dim]
    own = index.meta["val"].shape
    if len(own) < behind or any(_size_from_right(other, behind) != 1 for other in others):
        return None
    ahead, after = [1] * (len(own) - behind), [1] * (behind - 1)
    numbers = _constant_of(index) if [*own] == [*ahead, shape[dim], *after] else None
    if numbers is None:
        return None
    size = source.meta["val"].shape[dim]
    at = [n % size for n in numbers.flatten().tolist()]

    def window(a: int, b: int) -> tuple[int, int]:
        return min(at[a:b]), max(at[a:b]) + 1

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece = given[source]
        moved = torch.tensor([n - piece.start for n in at[rows.start : rows.end]])
        placed = [i and _whole_or_part(given, i) for i in indices]
        placed[dim] = _constant(graph, moved.reshape([*ahead, -1, *after]), like=index)
        return call(graph, node.target, piece.node, placed, like=node)

    return Rule(dim, (Read(source, dim, window),), make)


def _of_convolution(node: fx.Node, dims: Mapping[fx.Node, int], along: int) -> Rule | None:
    """Rows around each row; over the edges lie zeros."""
    arguments: tuple[Any, ...] = node.args
    x, weight, bias, strides, paddings, dilations, transposed, beyond, groups = arguments
    rank = node.meta["val"].dim()
    if along >= rank or rank != weight.meta["val"].dim() or dims.get(x, along) != along:
        return None
    if x is weight or weight in dims or bias in dims:
        return None
    if along == 0:
        return Rule(0, (Read(x, 0, _same),), _again(node), is_costly=True)
    at, axes = along - 2, rank - 2
    sizes = [_each(argument, axes) for argument in (strides, paddings, dilations, beyond)]
    stride, padding, dilation, more = (size[at] for size in sizes)
    reach = dilation * (weight.meta["val"].shape[along] - 1)
    unpadded = [0 if d == at else n for d, n in enumerate(sizes[1])]
    if transposed and (more or stride > reach + 1):  # rows of no input row
        return None
    if padding > reach:  # rows of zeros alone
        return None

    def window(a: int, b: int) -> tuple[int, int]:
        if transposed:
            return -((reach - a - padding) // stride), (b - 1 + padding) // stride + 1
        return a * stride - padding, (b - 1) * stride - padding + reach + 1

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece, (first, last) = given[x], window(rows.start, rows.end)
        padded = piece.node
        if not transposed:
            padded = _padded(graph, piece, along, first, last, 0.0)
        wholes = [_whole_or_part(given, weight), bias and _whole_or_part(given, bias)]
        rest = (strides, unpadded, dilations, transposed, beyond, groups)
        made = call(graph, node.target, padded, *wholes, *rest, like=node)
        if not transposed:
            return made
        start = piece.start * stride - padding
        whole = Rows(made, start, start + made.meta["val"].shape[along])
        return narrowed(graph, whole, along, rows.start, rows.end)

    return Rule(along, (Read(x, along, window),), make, is_costly=True)


def _of_pool(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """The largest entry around each; nothing over the edges is one."""
    x = _source(node)
    arguments: tuple[Any, ...] = node.args
    kernel, strides, paddings, dilations, ceil = arguments[1:]
    dim, rank = dims[x], x.meta["val"].dim()
    at = dim - rank + len(kernel)
    parts = [user for user in node.users if user.target is operator.getitem]
    alone = len(parts) == len(node.users) == 1 and parts[0].args[1] == 0
    if at < 0 or not alone or ceil:  # the numbers of the entries are of the whole
        return None
    stride, padding, reach = strides[at], paddings[at], dilations[at] * (kernel[at] - 1)

    def window(a: int, b: int) -> tuple[int, int]:
        return a * stride - padding, (b - 1) * stride - padding + reach + 1

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        unpadded = [0 if d == at else n for d, n in enumerate(paddings)]
        padded = _padded(graph, given[x], dim, *window(rows.start, rows.end), -float("inf"))
        return call(
            graph, node.target, padded, kernel, strides, unpadded, dilations, ceil, like=node
        )

    return Rule(dim, (Read(x, dim, window),), make)


def _of_part(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Of several results of which all have the same rows."""
    source = _source(node)
    return Rule(dims[source], (Read(source, dims[source], _same),), _again(node))


_RULES: dict[Any, Callable[[fx.Node, Mapping[fx.Node, int]], Rule | None]] = {
    **dict.fromkeys(VIEWS, _of_view),
    **dict.fromkeys(_GATHERS, _of_gather),
    **dict.fromkeys(REDUCTIONS, _of_reduction),
    aten.cat.default: _of_concatenation,
    aten.permute.default: _of_permutation,
    prims._low_memory_max_pool_with_offsets.default: _of_pool,
    operator.getitem: _of_part,
}


def _padded(graph: fx.Graph, rows: Rows, dim: int, first: int, last: int, value: float) -> fx.Node:
    """Rows with others, of one value, before and after."""
    edges = [rows.start - first, last - rows.end]
    if not any(edges):
        return rows.node
    widths = [*(0, 0) * (rows.node.meta["val"].dim() - 1 - dim), *edges]
    return call(graph, aten.constant_pad_nd.default, rows.node, widths, value, like=rows.node)


def _constant_of(node: fx.Node) -> torch.Tensor | None:
    """A value that depends on no input of a graph without random numbers; None where it does."""
    todo, seen = [node], {node}
    while todo:
        sources = set(todo.pop().all_input_nodes) - seen
        if any(source.op != "call_function" for source in sources):
            return None
        seen |= sources
        todo += sources
    made: dict[fx.Node, Any] = {}
    with disable_modes():
        for inner in node.graph.nodes:
            if inner in seen:
                args, kwargs = pytree.tree_map_only(
                    fx.Node, made.__getitem__, (inner.args, inner.kwargs)
                )
                made[inner] = inner.target(*args, **kwargs)
    found = made[node]
    return found if isinstance(found, torch.Tensor) else None


def _constant(graph: fx.Graph, value: torch.Tensor, *, like: fx.Node) -> fx.Node:
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


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _size_from_right(node: fx.Node, place: int) -> int:
    shape = node.meta["val"].shape
    return int(shape[-place]) if place <= len(shape) else 1


def _each(given: Sequence[int], axes: int) -> list[int]:
    """One number for each axis: one given stands for all."""
    return [*given] * axes if len(given) == 1 else [*given]
