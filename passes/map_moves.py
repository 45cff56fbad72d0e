"""Rows of maps that move: out of one, into another, into memory of their own.

Which rows they are is said by a constant tensor of their numbers. So a compiler reads rows in the
loops that need them and writes them in those that make them, copies nothing, and has one kernel
for all pieces of a map, since the numbers are no part of its code.

Pays: bytes, time and kernels. Does not: where rows are innermost in memory, since loops over those
gather one by one.
"""

from typing import Any

import torch
from torch import fx

from memopt._torch import disable_modes
from memopt.graph import IN_PLACE, aten
from memopt.kernels.map_rows import PUT
from memopt.passes.joint_nodes import call

_CHANNELS = 1  # the dimension
_INLINED = 8  # numbers of a constant that Inductor makes part of the code


def take(x: fx.Node, dim: int, start: int, end: int, *, like: fx.Node) -> fx.Node:
    """Rows of a map from ``start`` to before ``end``."""
    places = *[None] * dim, _places(x, start, end)
    made = call(x.graph, aten._unsafe_index.Tensor, x, places, like=like)
    # As Inductor has it, whose loops keep the order of dimensions in memory.
    made.meta["val"] = torch.empty_like(x.meta["val"].narrow(dim, start, end - start))
    return made


def put(
    x: fx.Node, rows: fx.Node, dim: int, start: int, channel: int = 0, *, like: fx.Node
) -> fx.Node:
    """A map with other rows from ``start`` on, and there in the channels from ``channel`` on."""
    made = call(x.graph, PUT, x, rows, dim, start, channel, like=like)
    made.meta[IN_PLACE] = True
    return made


def part(x: fx.Node, dim: int, channel: int, width: int, *, like: fx.Node) -> fx.Node:
    """The room in a map of a value with fewer channels, and the same size otherwise.

    Where each row of the map has all its channels, the value has a stretch of each row, and lies
    dense in it: entries of its own are neighbours. Else it has some channels of the map.

    Args:
        x: the map.
        dim: of its rows.
        channel: of the map, the first whose room is taken.
        width: how many.
        like: the value.
    """
    whole = x.meta["val"]
    shape, strides = [*whole.shape], [*whole.stride()]
    if whole.dim() <= _CHANNELS or dim == _CHANNELS or shape[_CHANNELS] == width:
        return x
    shape[_CHANNELS] = width
    inner = [d for d in range(whole.dim()) if strides[d] < strides[dim]]
    if _CHANNELS not in inner or _base(x).target is not aten.empty_strided.default:
        ends = _CHANNELS, channel, channel + width
        return call(x.graph, aten.slice.Tensor, x, *ends, like=like)
    size = 1
    for d in sorted(inner, key=strides.__getitem__):
        strides[d], size = size, size * shape[d]
    offset = channel * size // width
    return call(x.graph, aten.as_strided.default, x, shape, strides, offset, like=like)


def _base(x: fx.Node) -> fx.Node:
    """The map as it was before any rows were put into it, whose layout is known."""
    while x.target is PUT:
        x = x.args[0]  # type: ignore[assignment]
    return x


def empty(node: fx.Node, value: torch.Tensor) -> fx.Node:
    """Memory for a value.

    Args:
        node: whose it is.
        value: of its shape, with the strides that the memory is to have.
    """
    shape = [*value.shape], [*value.stride()]
    kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    made = node.graph.call_function(aten.empty_strided.default, shape, kwargs)
    made.meta.update(node.meta, val=value)
    return made


def width_of(node: fx.Node) -> int:
    """Channels of a value, 1 where it has none."""
    shape = node.meta["val"].shape
    return int(shape[_CHANNELS]) if len(shape) > _CHANNELS else 1


@disable_modes()
def write_in_place(graph: fx.Graph) -> None:
    """Where rows are put into a map, put them into that very map: nothing reads it as it was."""
    for node in graph.find_nodes(op="call_function", target=PUT):
        x, rows, dim, start, channel = node.args
        shape = rows.meta["val"].shape
        with graph.inserting_before(node):
            place = part(x, dim, channel, width_of(rows), like=node)
            places = *[None] * dim, _places(x, start, start + shape[dim])
            call(graph, aten.index_put_.default, place, places, rows, like=node)
        node.replace_all_uses_with(x)
        graph.erase_node(node)


def _places(x: fx.Node, start: int, end: int) -> fx.Node:
    """The numbers of rows, as a tensor of the graph's own."""
    gm: Any = x.graph.owning_module
    fake = x.meta["val"]
    length = max(end - start, _INLINED + 1)
    name = f"_rows_{start}_{length}_{fake.device}".replace(":", "_")
    if not hasattr(gm, name):
        gm.register_buffer(name, torch.arange(start, start + length, device=fake.device))
    node = x.graph.get_attr(name)
    seen = fake.fake_mode.from_tensor(getattr(gm, name), static_shapes=True)
    node.meta.update(x.meta, val=seen)
    if length == end - start:
        return node
    return call(x.graph, aten.slice.Tensor, node, 0, 0, end - start, like=node)
