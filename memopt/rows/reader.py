"""From nodes of an aten graph to a `RowProgram`, or the reason why there is none.

Values are asked for by index, from the results back: a view hands on another index, a broadcast
leaves digits out, and what comes from outside is loaded at the index where it is wanted. So no
view is ever materialised, and nothing is assumed of shapes but that sizes divide.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memopt.graph import packet_name
from memopt.rows.body import LOW_PRECISION, Body, even, held, number
from memopt.rows.index import (
    Digit,
    Index,
    Offset,
    Space,
    UnfusableError,
    broadcast,
    flat,
    merged,
    product,
    ratio,
    regroup,
)
from memopt.rows.ir import Extent, Load, Operand, RowProgram, Store, Tensor
from memopt.rows.nodes import (
    FILLED,
    LOOKUP,
    RANDOM,
    contiguous,
    dtype_of,
    is_constant,
    is_part_of_moments,
    is_progression,
    is_seen_through,
    keeps_order,
    plain_size,
    progression,
    repeats,
    results_of,
    shape_of,
)
from memopt.rows.rules import DTYPES, is_conversion, rule_of

_SUMS = {"aten.sum": "sum", "prims.sum": "sum", "aten.amax": "max", "aten.amin": "min"}
_MOMENTS = {"aten.mean": "mean", "aten.var": "variance"}


def read_rows(members: Sequence[fx.Node], space: Space) -> RowProgram:
    """Read a region.

    Args:
        members: its nodes, in order; none that is seen through.
        space: the rows that it goes over.

    Raises:
        UnfusableError: something in it is not known to be right.
    """
    return _Reader(members, space).program()


class _Reader:
    """What has been read so far, by node and index."""

    def __init__(self, members: Sequence[fx.Node], space: Space) -> None:
        self.space = space
        self.inside = set(members)
        self.results = results_of(members)
        self.memo: dict[tuple[fx.Node, Index], Operand] = {}
        self.body = Body(space.width)
        self.arguments: dict[str, Tensor] = {}
        self.devices: set[torch.device] = set()

    def program(self) -> RowProgram:
        results, stores = [], []
        for node in self.results:
            shape = shape_of(node)
            result = Tensor(node.name, dtype_of(node), shape, contiguous(shape))
            if tuple(map(plain_size, node.meta["val"].stride())) != result.strides:
                raise UnfusableError(f"{node.name} is not contiguous")
            self.devices.add(node.meta["val"].device)
            index = self.space.index(shape)
            offset = Offset.of(index, result.strides)
            source = self.value(node, index)
            if not isinstance(source, str):
                raise UnfusableError(f"{node.name} is a number")
            results.append(result)
            stores.append(Store(node.name, self.body.spread(source, offset.group), offset))
        program = RowProgram(
            self.space,
            tuple(self.arguments.values()),
            tuple(results),
            tuple(self.body.values.values()),
            tuple(stores),
        )
        if len(self.devices) != 1 or not program.arguments:
            raise UnfusableError("tensors are on several devices, or there are none")
        if dead := self.inside - {node for node, _ in self.memo}:
            raise UnfusableError(f"nothing reads {dead}")
        for symbol in program.size_names:
            program.where_size_is(symbol)
        return program

    def value(self, node: Any, index: Index) -> Operand:
        """The node's entry at an index into its shape; what is written is rounded before."""
        key = node, index
        if key not in self.memo:
            if dtype_of(node) not in DTYPES:
                raise UnfusableError(f"{node.name} is a tensor of {dtype_of(node)}")
            known = node in self.inside or is_seen_through(node)
            read = self.computed(node, index) if known else self.load(node, index)
            if node in self.results and dtype_of(node) in LOW_PRECISION and isinstance(read, str):
                read = self.body.rounded(read, node.name, dtype_of(node))
            self.memo[key] = read
        return self.memo[key]

    def computed(self, node: fx.Node, index: Index) -> Operand:
        args: Any = node.args
        name = packet_name(node.target)
        if keeps_order(node):
            return self.value(args[0], regroup(flat(index), shape_of(args[0])))
        if repeats(node):
            return self.value(args[0], broadcast(index, shape_of(args[0])))
        if is_constant(node):
            return self.constant(node, index)
        if name in _SUMS:
            source, count = self.reduced(node, index)
            kind = _SUMS[name]
            return self.body.reduce(node.name, kind, source, count, held(dtype_of(node)))
        if name in _MOMENTS:
            return self.moment(_MOMENTS[name], node, node, index)
        if is_part_of_moments(node):
            return self.moment("mean" if args[1] else "variance", node, args[0], index)
        if node.target is RANDOM:
            return self.random(node, index)
        return self.pointwise(node, index)

    def pointwise(self, node: fx.Node, index: Index) -> Operand:
        dtype = held(dtype_of(node))
        if is_conversion(node):
            return self.body.converted(self.operand(node.args[0], index), dtype, node.name)
        rule, args = rule_of(node)
        wanted = dtype
        if rule.kind == "float":
            wanted = torch.float32
        elif rule.kind == "promoted":
            seen = [a.meta["val"] if isinstance(a, fx.Node) else a for a in (*args, *args)]
            wanted = held(torch.result_type(*seen[:2]))
        if (rule.kind == "float" and dtype != wanted) or (
            rule.kind == "result" and dtype == torch.bool
        ):
            raise UnfusableError(f"{node.name} gives {dtype}")
        sources = [self.operand(a, index) for a in args]
        first = int(packet_name(node.target) == "aten.where")  # the condition stays one
        sources[first:] = [self.body.converted(s, wanted) for s in sources[first:]]
        return self.body.compute(node.name, dtype, rule.text, sources)

    def operand(self, argument: Any, index: Index) -> Operand:
        if isinstance(argument, fx.Node):
            return self.value(argument, broadcast(index, shape_of(argument)))
        if not isinstance(argument, int | float):
            raise UnfusableError(f"{argument!r} is neither a tensor nor a number")
        return argument

    def load(self, node: fx.Node, index: Index, start: int = 0) -> str:
        shape, dtype = shape_of(node), dtype_of(node)
        if node.meta["val"].layout != torch.strided:
            raise UnfusableError(f"{node.name} is no strided tensor")
        strides = tuple(map(plain_size, node.meta["val"].stride()))
        offset = Offset.of(index, strides if index else (), start)
        if offset.group and offset.column_stride != 1:
            raise UnfusableError(f"neighbours in a row of {node.name} lie apart")
        self.devices.add(node.meta["val"].device)
        self.arguments[node.name] = Tensor(node.name, dtype, shape, strides)
        extent = Extent(offset.rows, even(offset.group))
        return self.body.add(
            Load(
                name=node.name,
                dtype=held(dtype),
                extent=extent,
                tensor=node.name,
                offset=offset,
            )
        )

    def constant(self, node: fx.Node, index: Index) -> Operand:
        args: Any = node.args
        name = packet_name(node.target)
        if node.target is LOOKUP:
            return self.load(args[0], (), args[1])
        if is_progression(node):
            first, step = progression(node)
            place = Offset.of(index, (step,), first)
            return self.body.position(node.name, dtype_of(node), place)
        value = args[name == "aten.full"]
        if name not in FILLED or not isinstance(value, int | float):
            raise UnfusableError(f"{node.name} is filled with no number")
        return number(value, dtype_of(node))

    def random(self, node: fx.Node, index: Index) -> Operand:
        """As Inductor draws on a GPU, so that it does not matter who draws again."""
        args: Any = node.args
        if len(args) != 3 or args[2] != "rand" or node.kwargs:
            raise UnfusableError(f"{node.name} draws other than uniform numbers")
        place = Offset.of(index, contiguous(shape_of(node)))
        at = self.body.position(f"{node.name}_place", torch.int64, place)
        text = "tl.rand({0}, ({1}).to(tl.uint32))"
        return self.body.compute(node.name, torch.float32, text, [self.value(args[1], ()), at])

    def reduced(self, node: fx.Node, index: Index) -> tuple[str, int]:
        """What a reduction of the last dimensions reduces, and how many entries at a time."""
        args: Any = node.args
        shape = shape_of(args[0])
        dims = args[1] if len(args) > 1 and args[1] else range(len(shape))
        dims = sorted(d % len(shape) for d in ([dims] if isinstance(dims, int) else dims))
        first = len(shape) - len(dims)
        count, lead = product(shape[first:]), index[:first]
        lanes = ratio(self.space.width, count)
        if dims != [*range(first, len(shape))] or not isinstance(lanes, int) or count == 1:
            raise UnfusableError(f"{node.name} does not reduce whole rows or groups of them")
        if merged(flat(lead)) != (Digit("row", 1, self.space.rows), *self.space.columns(lanes)):
            raise UnfusableError(f"{node.name} reduces rows that are not those of the region")
        inner = regroup([Digit("column", 1, count)], shape[first:])
        source = self.value(args[0], (*lead, *inner))
        if not isinstance(source, str) or self.body[source].extent.group != 1:
            raise UnfusableError(f"{node.name} reduces what is the same in neighbouring columns")
        return source, count

    def moment(self, kind: str, node: fx.Node, reduction: fx.Node, index: Index) -> str:
        """The mean, or the variance around it."""
        source, count = self.reduced(reduction, index)
        if held(dtype_of(node)) != torch.float32 or self.body[source].dtype != torch.float32:
            raise UnfusableError(f"{node.name} gives {dtype_of(node)}")
        if kind == "mean":
            return self.body.mean(node.name, source, count)
        given: Any = reduction.kwargs.get("correction")
        freedom = count - (1.0 if given is None else float(given))
        if freedom <= 0:
            raise UnfusableError(f"{node.name} has no degree of freedom")
        return self.body.variance(node.name, source, count, freedom)
