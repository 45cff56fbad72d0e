"""Operators on maps that read other rows than their own: those around them, those of a table."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memopt.graph import aten
from memopt.passes.joint_nodes import call
from memopt.passes.map_reads import (
    Given,
    Read,
    Rows,
    Rule,
    again,
    constant,
    constant_of,
    narrowed,
    same,
    source_of,
    whole_or_part,
)


def of_gather(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Rows by number, as the nearest pixels of an image are taken to enlarge it.

    The numbers of several dimensions are broadcast over each other.
    """
    source = source_of(node)
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
    numbers = constant_of(index) if [*own] == [*ahead, shape[dim], *after] else None
    if numbers is None:
        return None
    size = source.meta["val"].shape[dim]
    at = [n % size for n in numbers.flatten().tolist()]

    def window(a: int, b: int) -> tuple[int, int]:
        return min(at[a:b]), max(at[a:b]) + 1

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece = given[source]
        moved = torch.tensor([n - piece.start for n in at[rows.start : rows.end]])
        placed = [i and whole_or_part(given, i) for i in indices]
        placed[dim] = constant(graph, moved.reshape([*ahead, -1, *after]), like=index)
        return call(graph, node.target, piece.node, placed, like=node)

    return Rule(dim, (Read(source, dim, window),), make)


def of_convolution(node: fx.Node, dims: Mapping[fx.Node, int], along: int) -> Rule | None:
    """Rows around each row; over the edges lie zeros."""
    arguments: tuple[Any, ...] = node.args
    x, weight, bias, strides, paddings, dilations, transposed, beyond, groups = arguments
    rank = node.meta["val"].dim()
    if along >= rank or rank != weight.meta["val"].dim() or dims.get(x, along) != along:
        return None
    if x is weight or weight in dims or bias in dims:
        return None
    if along == 0:
        return Rule(0, (Read(x, 0, same),), again(node))
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
        wholes = [whole_or_part(given, weight), bias and whole_or_part(given, bias)]
        rest = (strides, unpadded, dilations, transposed, beyond, groups)
        made = call(graph, node.target, padded, *wholes, *rest, like=node)
        if not transposed:
            return made
        start = piece.start * stride - padding
        whole = Rows(made, start, start + made.meta["val"].shape[along])
        return narrowed(graph, whole, along, rows.start, rows.end).node

    return Rule(along, (Read(x, along, window),), make)


def of_pool(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """The largest entry around each; nothing over the edges is one."""
    x = source_of(node)
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


def _padded(graph: fx.Graph, rows: Rows, dim: int, first: int, last: int, value: float) -> fx.Node:
    """Rows with others, of one value, before and after."""
    edges = [rows.start - first, last - rows.end]
    if not any(edges):
        return rows.node
    widths = [*(0, 0) * (rows.node.meta["val"].dim() - 1 - dim), *edges]
    return call(graph, aten.constant_pad_nd.default, rows.node, widths, value, like=rows.node)


def _size_from_right(node: fx.Node, place: int) -> int:
    shape = node.meta["val"].shape
    return int(shape[-place]) if place <= len(shape) else 1


def _each(given: Sequence[int], axes: int) -> list[int]:
    """One number for each axis: one given stands for all."""
    return [*given] * axes if len(given) == 1 else [*given]
