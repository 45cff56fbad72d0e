"""Builds the body of a `RowProgram`: each value once, broadcast and converted explicitly."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memopt.rows.index import Offset, UnfusableError
from memopt.rows.ir import Compute, Extent, Operand, Position, Reduce, Spread, Value

LOW_PRECISION = (torch.bfloat16, torch.float16)
_RESERVED = frozenset(
    "row rows rows_each column tile tiling start block threads programs inputs torch tl triton "
    "libdevice kernel launch as_traced grid warps float range".split()
)


class Body:
    """Values so far, by name.

    Args:
        width: columns of a row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.values: dict[str, Value] = {}
        self._known: dict[Value, str] = {}

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def add(self, value: Value) -> str:
        """Put a value into the body, once, under a name of its own."""
        nameless = dataclasses.replace(value, name="")
        if nameless not in self._known:
            name = next(n for n in _names(value.name) if n not in self.values)
            self.values[name] = dataclasses.replace(value, name=name)
            self._known[nameless] = name
        return self._known[nameless]

    def compute(self, name: str, dtype: torch.dtype, text: str, sources: Sequence[Operand]) -> str:
        """One entry from an entry of each source.

        Raises:
            UnfusableError: all are numbers.
        """
        extents = [self[s].extent for s in sources if isinstance(s, str)]
        if not extents:
            raise UnfusableError(f"{name} is computed of numbers alone")
        group = min((e.group for e in extents if e.group), default=0)
        extent = Extent(any(e.rows for e in extents), group)
        spread = tuple(self.spread(s, group) if isinstance(s, str) else s for s in sources)
        return self.add(Compute(name=name, dtype=dtype, extent=extent, text=text, operands=spread))

    def spread(self, source: str, group: int) -> str:
        """The value for each group of so many columns; as it is where a row shares one.

        Raises:
            UnfusableError: groups of its own do not consist of those.
        """
        value = self[source]
        coarse, rows = value.extent.group, value.extent.rows
        if coarse in (0, group):
            return source
        if not group or coarse % group:
            raise UnfusableError(f"{source} has groups of another size")
        name, extent = f"{source}_spread", Extent(rows, group)
        return self.add(
            Spread(name=name, dtype=value.dtype, extent=extent, source=source, source_group=coarse)
        )

    def converted(self, source: Operand, dtype: torch.dtype, name: str = "") -> Operand:
        """The same number in another dtype."""
        if not isinstance(source, str):
            return number(source, dtype)
        if self[source].dtype == dtype:
            return source
        text = "{0} != 0" if dtype == torch.bool else f"{{0}}.to({spelled(dtype)})"
        return self.compute(name or f"{source}_{short(dtype)}", dtype, text, [source])

    def rounded(self, source: str, name: str, dtype: torch.dtype) -> str:
        """What a tensor of a low precision keeps of it."""
        text = f"{{0}}.to({spelled(dtype)}).to(tl.float32)"
        return self.compute(f"{name}_rounded", torch.float32, text, [source])

    def position(self, name: str, dtype: torch.dtype, offset: Offset) -> Operand:
        """A whole number that follows from the place."""
        if not offset.terms:
            return offset.start
        extent = Extent(offset.rows, even(offset.group))
        return self.add(Position(name=name, dtype=dtype, extent=extent, offset=offset))

    def reduce(self, name: str, kind: Any, source: str, count: int, dtype: torch.dtype) -> str:
        """The sum or an extremum of so many columns at a time.

        Raises:
            UnfusableError: a program cannot hold such groups, or the dtype has no extremum.
        """
        group = 0 if count == self.width else count
        if group and even(group) != group:
            raise UnfusableError(f"{name} reduces groups of {group}: not a power of two")
        if kind != "sum" and dtype != torch.float32:
            raise UnfusableError(f"{name} is an extremum of {dtype}")
        operand = self.converted(source, dtype)
        assert isinstance(operand, str)
        extent = Extent(self[operand].extent.rows, group)
        return self.add(
            Reduce(name=name, dtype=dtype, extent=extent, operator=kind, source=operand)
        )

    def mean(self, name: str, source: str, count: int) -> str:
        """Of so many columns at a time."""
        total = self.reduce(f"{name}_sum", "sum", source, count, torch.float32)
        return self.compute(name, torch.float32, "tl.div_rn({0}, {1})", [total, float(count)])

    def variance(self, name: str, source: str, count: int, freedom: float) -> str:
        """Of so many columns at a time, around their mean, which is a sum of its own."""
        mean = self.mean(f"{name}_mean", source, count)
        away = self.compute(f"{name}_away", torch.float32, "{0} - {1}", [source, mean])
        square = self.compute(f"{name}_square", torch.float32, "{0} * {0}", [away])
        total = self.reduce(f"{name}_total", "sum", square, count, torch.float32)
        return self.compute(name, torch.float32, "tl.div_rn({0}, {1})", [total, freedom])


def number(value: Any, dtype: torch.dtype) -> Operand:
    """A number as one of a dtype."""
    if dtype.is_floating_point:
        return float(value)
    return bool(value) if dtype == torch.bool else int(value)


def even(group: int) -> int:
    """The group where it is a power of two; else each column by itself."""
    return group if group & (group - 1) == 0 else 1


def held(dtype: torch.dtype) -> torch.dtype:
    """The dtype in registers."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def short(dtype: torch.dtype) -> str:
    """The dtype's name."""
    return str(dtype).removeprefix("torch.")


def spelled(dtype: torch.dtype) -> str:
    """As Triton spells a dtype."""
    return "tl.int1" if dtype == torch.bool else f"tl.{short(dtype)}"


def _names(name: str) -> Iterator[str]:
    """The name, and others like it, none of which the source needs for something else."""
    if name not in _RESERVED:
        yield name
    number = 1
    while True:
        yield f"{name}_at_{number}"
        number += 1
