"""A fused region as data: rows of equal width, and what is computed for each of them.

A `RowProgram` is a straight line of values over ``R x W`` lanes. Each value has an extent: one for
every column of every row, one for a group of neighbouring columns, one for a row, one for a
column, or one for all. Values of several extents meet by the rules of broadcasting, except that
groups are spread over their columns by an instruction of their own.

Legend: ``R`` rows, ``W`` columns of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import sympy
import torch

from memopt.rows.index import Offset, Size, Space, UnfusableError, product

Number = int | float | bool
Operand = str | Number  # the name of a value, or a number


@dataclass(frozen=True, slots=True)
class Extent:
    """How many different entries a value has.

    Attributes:
        rows: whether rows differ.
        group: how many neighbouring columns share an entry: 1 where each has its own, 0 where
            all share one.
    """

    rows: bool
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One instruction and what it gives.

    Attributes:
        name: of the node that it stands for.
        dtype: in registers.
        extent: of its entries.
    """

    name: str
    dtype: torch.dtype
    extent: Extent

    def sources(self) -> tuple[str, ...]:
        """The values that it reads, by name."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Value):
    """Read from memory.

    Attributes:
        tensor: the argument's name.
        offset: where each lane's entry is.
    """

    tensor: str
    offset: Offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Position(Value):
    """A whole number that follows from the place of the lane.

    Attributes:
        offset: the number.
    """

    offset: Offset


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute(Value):
    """One entry from an entry of each operand.

    Attributes:
        text: Triton's expression, with ``{0}`` for the first operand.
        operands: names and numbers.
    """

    text: str
    operands: tuple[Operand, ...]

    def sources(self) -> tuple[str, ...]:
        return tuple(o for o in self.operands if isinstance(o, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread(Value):
    """The entry of a group for every smaller group, or column, in it.

    Attributes:
        source: a value of larger groups.
        source_group: columns of those.
    """

    source: str
    source_group: int

    def sources(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce(Value):
    """One entry from all columns of a row, or from those of each group.

    Attributes:
        operator: which; the maximum and minimum of what holds a NaN are NaN.
        source: a value with an entry for each column.
    """

    operator: Literal["sum", "max", "min"]
    source: str

    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def of_row(self) -> bool:
        """Whether it needs the whole row."""
        return self.extent.group == 0


@dataclass(frozen=True, slots=True)
class Store:
    """Write to memory.

    Attributes:
        tensor: the result's name.
        source: a value; it is broadcast to the extent of the store.
        offset: where each lane's entry is.
    """

    tensor: str
    source: str
    offset: Offset


@dataclass(frozen=True, slots=True)
class Tensor:
    """An argument or a result, as it was traced.

    Attributes:
        name: of the node.
        dtype: in memory.
        shape: sizes, which may be symbolic.
        strides: in elements.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]


@dataclass(frozen=True)
class RowProgram:
    """A fused region.

    Attributes:
        space: rows and columns.
        arguments: tensors that it reads.
        results: tensors that it makes, contiguous.
        body: values, each behind its sources.
        stores: one for each result.
    """

    space: Space
    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    body: tuple[Value, ...]
    stores: tuple[Store, ...]

    @property
    def values(self) -> dict[str, Value]:
        """The body by name."""
        return {value.name: value for value in self.body}

    @property
    def ideal_bytes(self) -> sympy.Expr:
        """What it must move: each entry that it reads once, each result once; in bytes."""
        read: dict[str, Size] = {}
        for load in self.loads():
            read[load.tensor] = read.get(load.tensor, 0) + load.offset.entries
        total = sympy.Integer(0)
        for tensor in self.arguments:
            there = product(tensor.shape)
            entries = read[tensor.name]
            if isinstance(there, int) and isinstance(entries, int):
                entries = min(there, entries)
            total += entries * tensor.dtype.itemsize
        return total + sum(product(t.shape) * t.dtype.itemsize for t in self.results)

    @property
    def size_names(self) -> dict[sympy.Symbol, str]:
        """What sizes that vary are called in the source, in the order of the arguments."""
        sizes = [s for t in self.arguments for s in (*t.shape, *t.strides)]
        symbols: dict[sympy.Symbol, str] = {}
        for size in (*sizes, self.space.rows):
            for symbol in sorted(getattr(size, "free_symbols", ()), key=str):
                symbols.setdefault(symbol, f"size_{len(symbols)}")
        return symbols

    def where_size_is(self, symbol: sympy.Symbol) -> tuple[str, int]:
        """The argument, and its dimension, whose size the symbol is.

        Raises:
            UnfusableError: there is none.
        """
        for tensor in self.arguments:
            if symbol in tensor.shape:
                return tensor.name, tensor.shape.index(symbol)
        raise UnfusableError(f"no argument has the size {symbol}")

    def loads(self) -> Iterator[Load]:
        """What it reads from memory, in order."""
        return (value for value in self.body if isinstance(value, Load))

    def levels(self) -> dict[str, int]:
        """For each value, how many sums over whole rows must be done, one after another, first."""
        level: dict[str, int] = {}
        done: dict[str, int] = {}  # behind the value itself
        for value in self.body:
            name = value.name
            level[name] = max((done[s] for s in value.sources()), default=0)
            done[name] = level[name] + (isinstance(value, Reduce) and value.of_row)
        return level

    def live_tiles(self) -> int:
        """How many values with an entry for each column are held at a time, at most."""
        last: dict[str, int] = {}
        for place, value in enumerate(self.body):
            last.update(dict.fromkeys(value.sources(), place))
        last.update({store.source: len(self.body) for store in self.stores})
        live = most = 0
        ends = [0] * (len(self.body) + 1)
        for place, value in enumerate(self.body):
            if value.extent.group == 1:
                live += 1
                ends[last.get(value.name, place)] += 1
            most = max(most, live)
            live -= ends[place]
        return most
