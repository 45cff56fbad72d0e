"""Arithmetic as patterns: factors in any order and any brackets, terms in either order.

A quotient counts as a product, as does the product with the inverse of a number.

Source: the associative matchers of term rewriting (Baader and Nipkow, "Term Rewriting and All
That", 1998).
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from memopt.passes.patterns import (
    ADDITIONS,
    POWERS,
    PRODUCTS,
    QUOTIENTS,
    SQUARES,
    SUBTRACTIONS,
    Either,
    Match,
    Number,
    Pattern,
    call,
    find_each,
    uncast,
)

_NEGATIONS = frozenset({operator.neg, torch.neg, "neg"})


class _Operation(NamedTuple):
    """A call of two arguments.

    Attributes:
        target: what is called.
        left: its first argument.
        right: its second.
        match: with the call and the casts of its result as inner nodes.
    """

    target: Any
    left: Any
    right: Any
    match: Match


def _operation(value: Any, match: Match) -> _Operation | None:
    """A value as a call of two arguments and no others."""
    node, match = uncast(value, match)
    if node is None or len(node.args) != 2 or node.kwargs:
        return None
    return _Operation(node.target, *node.args, match.taking(node))


@dataclass(frozen=True)
class Inverse:
    """A factor that may also be spelled as a division.

    Attributes:
        factor: the factor.
        divisor: what is divided by in its place.
    """

    factor: Pattern
    divisor: Pattern

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        yield from self.factor.find(value, match)


@dataclass(frozen=True)
class Product:
    """Two or more factors, in any order and any brackets."""

    factors: tuple[Pattern, ...]

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        yield from _product(self.factors, value, match)


def _product(factors: tuple[Pattern, ...], value: Any, match: Match) -> Iterator[Match]:
    if len(factors) == 1:
        yield from factors[0].find(value, match)
        return
    own = _operation(value, match)
    if own is not None and own.target in PRODUCTS:
        for some, others in _splits(factors):
            for found in _product(some, own.left, own.match):
                yield from _product(others, own.right, found)
    if own is not None and own.target in QUOTIENTS:
        for divisor, others in _divisors(factors):
            for found in divisor.find(own.right, own.match):
                yield from _product(others, own.left, found)


def _divisors(
    factors: tuple[Pattern, ...],
) -> Iterator[tuple[Pattern, tuple[Pattern, ...]]]:
    """What a product may be divided by in place of one of its factors, with the others."""
    for i, factor in enumerate(factors):
        others = factors[:i] + factors[i + 1 :]
        if isinstance(factor, Inverse):
            yield factor.divisor, others
        elif isinstance(factor, Number) and not isinstance(factor.is_, str):
            yield Number(1 / factor.is_), others


@dataclass(frozen=True)
class Sum:
    """Two terms, in either order."""

    first: Pattern
    second: Pattern

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        own = _operation(value, match)
        if own is not None and own.target in ADDITIONS:
            for left, right in ((own.left, own.right), (own.right, own.left)):
                yield from find_each([(self.first, left), (self.second, right)], own.match)


@dataclass(frozen=True)
class Ordered:
    """Two arguments of an operator that tells them apart.

    Attributes:
        targets: the spellings of the operator.
        first: its first argument.
        second: its second.
    """

    targets: frozenset[Any]
    first: Pattern
    second: Pattern

    def find(self, value: Any, match: Match) -> Iterator[Match]:
        own = _operation(value, match)
        if own is not None and own.target in self.targets:
            yield from find_each([(self.first, own.left), (self.second, own.right)], own.match)


def difference(first: Pattern, second: Pattern) -> Pattern:
    """``first - second``."""
    return Ordered(SUBTRACTIONS, first, second)


def quotient(first: Pattern, second: Pattern) -> Pattern:
    """``first / second``."""
    return Ordered(QUOTIENTS, first, second)


def squared(pattern: Pattern) -> Pattern:
    """``v * v``, which may be spelled as a power."""
    power = call(POWERS, "input exponent", input=pattern, exponent=Number(2))
    plain = call(SQUARES, "input", input=pattern)
    return Either((power, plain, Product((pattern, pattern))))


def negated(pattern: Pattern) -> Pattern:
    """``-v``."""
    return Either((call(_NEGATIONS, "input", input=pattern), Product((pattern, Number(-1.0)))))


def _splits(
    factors: tuple[Pattern, ...],
) -> Iterator[tuple[tuple[Pattern, ...], tuple[Pattern, ...]]]:
    """Every way to give some factors to the left side and the others to the right side."""
    places = range(len(factors))
    for count in range(1, len(factors)):
        for chosen in itertools.combinations(places, count):
            left = tuple(factors[i] for i in chosen)
            yield left, tuple(factors[i] for i in places if i not in chosen)
