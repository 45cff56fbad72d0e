"""What an operator looks like in a Dynamo graph, spelled out as a value.

A pattern finds itself in a value, an argument of a node, and yields every way in which it can,
with what its names stand for. Casts between the usual floating-point dtypes are looked through.
In-place forms are no part of any pattern.

Source: after tinygrad's ``UPat``.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from memopt.emit import traced
from memopt.passes.row_losses import arguments
from memopt.passes.steps import cast_of

PRODUCTS = frozenset({operator.mul, torch.mul, "mul", torch.multiply, "multiply"})
QUOTIENTS = frozenset({operator.truediv, torch.div, "div", torch.true_divide, "true_divide"})
ADDITIONS = frozenset({operator.add, torch.add, "add"})
SUBTRACTIONS = frozenset({operator.sub, torch.sub, "sub"})
POWERS = frozenset({operator.pow, torch.pow, "pow"})
SQUARES = frozenset({torch.square, "square"})
_CLOSE = 1e-8  # relative; constants are written with ten digits or more


@dataclass(frozen=True)
class Match:
    """One way in which a pattern was found.

    Attributes:
        bound: what each name stands for: a node, or a number.
        inner: the nodes that the pattern stands for, the last one included.
        casts: conversions of inputs to a wider dtype, which others may read as well.
    """

    bound: Mapping[str, Any] = field(default_factory=dict)
    inner: frozenset[fx.Node] = frozenset()
    casts: frozenset[fx.Node] = frozenset()

    def binding(self, name: str, value: Any) -> Iterator["Match"]:
        """With one more name, unless that stands for something else already."""
        if name not in self.bound:
            yield replace(self, bound={**self.bound, name: value})
        elif self.bound[name] == value:
            yield self

    def taking(self, *nodes: fx.Node) -> "Match":
        """With more inner nodes."""
        return replace(self, inner=self.inner.union(nodes))


class Pattern(Protocol):
    """Something that finds itself in a value."""

    def find(self, value: Any, match: Match) -> Iterator[Match]: ...


def is_tensor(value: Any) -> bool:
    """Whether a value is a node that holds one tensor."""
    return isinstance(value, fx.Node) and isinstance(traced(value), torch.Tensor)


def anything(node: fx.Node) -> bool:
    """No condition."""
    return True


@dataclass(frozen=True)
class Value:
    """A tensor that a name stands for: the same one wherever the name occurs.

    Of a conversion to a wider dtype, which is exact, the source is meant.

    Attributes:
        name: the name.
        where: what it must satisfy.
    """

    name: str
    where: Callable[[fx.Node], bool] = anything

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if not is_tensor(value):
            return
        casts = set[fx.Node]()
        while (source := cast_of(value)) is not None and _wider(source, value):
            casts.add(value)
            value = source
        if self.where(value):
            yield from replace(match, casts=match.casts | casts).binding(self.name, value)


def _wider(source: fx.Node, node: fx.Node) -> bool:
    before, after = traced(source).dtype, traced(node).dtype
    return bool(torch.promote_types(before, after) == after)


@dataclass(frozen=True)
class Number:
    """A Python number: one that a name stands for, or this very one.

    Attributes:
        is_: a name, or a number.
    """

    is_: str | float

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if isinstance(self.is_, str):
            yield from match.binding(self.is_, float(value))
        elif math.isclose(value, self.is_, rel_tol=_CLOSE):
            yield match


@dataclass(frozen=True)
class Literal:
    """An argument that is no tensor and equal to this."""

    is_: object

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if type(value) is type(self.is_) and value == self.is_:
            yield match


@dataclass(frozen=True)
class Maybe:
    """An argument that may be left out."""

    pattern: Pattern

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if value is None:
            yield match
        else:
            yield from self.pattern.find(value, match)


@dataclass(frozen=True)
class Where:
    """An argument that satisfies a condition and has no name."""

    holds: Callable[[Any], bool]

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if self.holds(value):
            yield match


@dataclass(frozen=True)
class Items:
    """The items of a list, in order."""

    patterns: tuple[Pattern, ...]

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        if isinstance(value, (tuple, list)) and len(value) == len(self.patterns):
            yield from find_each(list(zip(self.patterns, value, strict=True)), match)


@dataclass(frozen=True)
class Either:
    """Any of several spellings."""

    patterns: tuple[Pattern, ...]

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        for pattern in self.patterns:
            yield from pattern.find(value, match)


@dataclass(frozen=True)
class Such:
    """What another pattern finds, if its names stand for the right things."""

    pattern: Pattern
    holds: Callable[[Mapping[str, Any]], bool]

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        yield from (m for m in self.pattern.find(value, match) if self.holds(m.bound))


@dataclass(frozen=True)
class Call:
    """A call whose arguments are these, and whose other arguments are left out.

    Attributes:
        targets: the functions and the names of methods.
        names: the parameters, in order, separated by spaces.
        given: the pattern of each argument by name; one that is left out is None.
        where: what the node must satisfy besides.
    """

    targets: frozenset[Any]
    names: str
    given: tuple[tuple[str, Pattern], ...]
    where: Callable[[fx.Node], bool] = anything

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        node, match = uncast(value, match)
        if node is None or node.target not in self.targets or not self.where(node):
            return
        own = arguments(node, self.names)
        expected = dict(self.given)
        if any(own[name] is not None for name in own.keys() - expected.keys()):
            return
        pairs = [(pattern, own.get(name)) for name, pattern in expected.items()]
        yield from find_each(pairs, match.taking(node))


def call(
    targets: frozenset[Any],
    names: str,
    where: Callable[[fx.Node], bool] = anything,
    **given: Pattern,
) -> Call:
    """A ``Call`` with its patterns by keyword."""
    return Call(targets, names, tuple(given.items()), where)


def find_each(pairs: list[tuple[Pattern, Any]], match: Match) -> Iterator[Match]:
    """Every way in which all of some patterns find themselves, each in its own value."""
    if not pairs:
        yield match
        return
    (pattern, value), *others = pairs
    for found in pattern.find(value, match):
        yield from find_each(others, found)


def uncast(value: Any, match: Match) -> tuple[fx.Node | None, Match]:
    """The node whose value was cast, once or more often; the casts are inner nodes."""
    if not isinstance(value, fx.Node):
        return None, match
    casts = []
    while (source := cast_of(value)) is not None:
        casts.append(value)
        value = source
    return value, match.taking(*casts)
