"""What masks that are made of positions show, at every length, where lengths are symbols.

Libraries make such masks from ``arange``, by comparing positions. Each value on the way is known
as a formula of its own coordinates: whole numbers as ``c0 i0 + c1 i1 + ... + c``, and what
compares two of them as "that is 0 or less". So the mask itself is known, for all sizes at once.
What has no rule is not known, and nor is a mask made of it.

Source: memopt's own.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from memopt.emit import shape_of, traced
from memopt.passes.heads import loosely
from memopt.passes.steps import name_of

_NEWAXIS, _WHOLE = None, slice(None)
# Functions that give a mask of what two masks show, and those that keep what one shows.
JOINING = "and_", "__and__", "logical_and", "bitwise_and"
KEEPING = "to", "expand", "contiguous", "clone"


@dataclass(frozen=True)
class Formula:
    """The entries of a tensor: ``sum(slopes[d] * index[d]) + constant``.

    Attributes:
        slopes: for each dimension.
        constant: the first entry.
        is_bound: for booleans, which are true where the formula is 0 or less.
    """

    slopes: tuple[int, ...]
    constant: int = 0
    is_bound: bool = False

    @property
    def is_true(self) -> bool:
        """Whether it is booleans that are all true."""
        return self.is_bound and not any(self.slopes) and self.constant <= 0


def formula_of(node: Any, known: dict[fx.Node, Formula | None]) -> Formula | None:
    """The formula of a node's entries, or of a number; None where it is not known.

    Args:
        node: whole numbers or booleans.
        known: of other nodes; what is found out is added.
    """
    if isinstance(node, int):
        return Formula((), int(node))
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return None
    if node not in known:
        known[node] = None
        rule = _RULES.get(name_of(node))
        found = (
            rule(node, lambda value: formula_of(value, known)) if rule and _counts(node) else None
        )
        known[node] = found and _fitted(found, node)
    return known[node]


def _counts(node: fx.Node) -> bool:
    """Whether a node's value is booleans, or whole numbers that no length brings to their end."""
    return getattr(traced(node), "dtype", None) in (torch.bool, torch.int32, torch.int64)


def _fitted(formula: Formula, node: fx.Node) -> Formula | None:
    """With one slope for each dimension, 0 where there is one entry; booleans as such."""
    shape = shape_of(node)
    if len(formula.slopes) > len(shape) or formula.is_bound != (traced(node).dtype == torch.bool):
        return None
    slopes = (0,) * (len(shape) - len(formula.slopes)) + formula.slopes
    alone = [isinstance(n, int) and n == 1 for n in shape]
    return replace(
        formula, slopes=tuple(0 if a else s for a, s in zip(alone, slopes, strict=True))
    )


Look = Callable[[Any], Formula | None]
Rule = Callable[[fx.Node, Look], Formula | None]


def _sum(one: Formula | None, other: Formula | None, sign: int = 1) -> Formula | None:
    if one is None or other is None or one.is_bound or other.is_bound:
        return None
    rank = max(len(one.slopes), len(other.slopes))
    a, b = ((0,) * (rank - len(f.slopes)) + f.slopes for f in (one, other))
    slopes = tuple(x + sign * y for x, y in zip(a, b, strict=True))
    return Formula(slopes, one.constant + sign * other.constant)


def _arange(node: fx.Node, look: Look) -> Formula | None:
    start = node.args[0] if len(node.args) == 2 else 0
    plain = len(node.args) in (1, 2) and not {"start", "end", "step", "out"} & set(node.kwargs)
    return Formula((1,), start) if plain and isinstance(start, int) else None


def _added(sign: int) -> Rule:
    def rule(node: fx.Node, look: Look) -> Formula | None:
        if node.kwargs or len(node.args) != 2:
            return None
        return _sum(look(node.args[0]), look(node.args[1]), sign)

    return rule


def _compared(sign: int, more: int) -> Rule:
    """``sign * (a - b) + more <= 0``."""

    def rule(node: fx.Node, look: Look) -> Formula | None:
        apart = _sum(look(node.args[0]), look(node.args[1]), -1)
        if apart is None:
            return None
        slopes = tuple(sign * slope for slope in apart.slopes)
        return Formula(slopes, sign * apart.constant + more, is_bound=True)

    return rule


def _equal(same: bool) -> Rule:
    """Of two that are a constant apart."""

    def rule(node: fx.Node, look: Look) -> Formula | None:
        apart = _sum(look(node.args[0]), look(node.args[1]), -1)
        if apart is None or any(apart.slopes):
            return None
        return replace(apart, constant=int((apart.constant == 0) != same), is_bound=True)

    return rule


def _both(node: fx.Node, look: Look) -> Formula | None:
    one, other = (look(argument) for argument in node.args[:2])
    if one is None or other is None or not (one.is_bound and other.is_bound):
        return None
    if one.is_true or other.is_true:
        return other if one.is_true else one
    return one if one == other else None


def _same(node: fx.Node, look: Look) -> Formula | None:
    """The entries as they are, in new dimensions of one entry in front, or in another dtype."""
    formula = look(node.args[0])
    if formula is None:
        return None
    becomes_bool = traced(node).dtype == torch.bool
    return formula if formula.is_bound == becomes_bool else None


def _unsqueeze(node: fx.Node, look: Look) -> Formula | None:
    given: Any = loosely(node.args)
    formula = look(given[0])
    if formula is None or len(given) != 2 or not isinstance(given[1], int):
        return None
    at = given[1] % (len(formula.slopes) + 1)
    return replace(formula, slopes=(*formula.slopes[:at], 0, *formula.slopes[at:]))


def _item(node: fx.Node, look: Look) -> Formula | None:
    """``x[..., None, :, :1]``, or entries that other formulas point at."""
    source, index = loosely(node.args)
    formula = look(source)
    index = index if isinstance(index, tuple | list) else (index,)
    if formula is None:
        return None
    if any(isinstance(part, fx.Node) for part in index):
        return _pointed(formula, [look(part) for part in index])
    if Ellipsis in index:
        at = index.index(Ellipsis)
        missing = len(formula.slopes) - sum(part not in (None, Ellipsis) for part in index)
        index = (*index[:at], *(_WHOLE,) * missing, *index[at + 1 :])
    slopes, left = [], list(formula.slopes)
    for part in index:
        if part is _NEWAXIS:
            slopes.append(0)
        elif (
            left and isinstance(part, slice) and part.start in (None, 0) and part.step in (None, 1)
        ):
            slopes.append(left.pop(0))
        else:
            return None
    return replace(formula, slopes=(*slopes, *left))


def _pointed(formula: Formula, index: Sequence[Formula | None]) -> Formula | None:
    """Entries at whole numbers from 0 on, one formula for each dimension."""
    if len(index) != len(formula.slopes):
        return None
    found: Formula | None = Formula((), formula.constant)
    for slope, at in zip(formula.slopes, index, strict=True):
        if at is None or at.is_bound or at.constant < 0 or min((0, *at.slopes)) < 0:
            return None
        step = Formula(tuple(slope * s for s in at.slopes), slope * at.constant)
        found = _sum(found, step)
    return found and replace(found, is_bound=formula.is_bound)


def _difference(node: fx.Node, look: Look) -> Formula | None:
    """Of neighbours in the last dimension, with one in front that is as far from the first."""
    given: Any = dict(zip(("input", "n", "dim", "prepend", "append"), node.args, strict=False))
    given |= node.kwargs
    formula, before = look(given.get("input")), look(given.get("prepend"))
    if formula is None or before is None or not formula.slopes or formula.is_bound:
        return None
    if given.get("n", 1) != 1 or given.get("append") is not None:
        return None
    if given.get("dim", -1) not in (-1, len(formula.slopes) - 1):
        return None
    *others, slope = formula.slopes
    if before != Formula((*others, 0), formula.constant - slope):
        return None
    return Formula((0,) * len(formula.slopes), slope)


def _running_sum(node: fx.Node, look: Look) -> Formula | None:
    """Of nothing."""
    formula = look(node.args[0])
    if formula is None or any(formula.slopes):
        return None
    is_nothing = not formula.is_true if formula.is_bound else formula.constant == 0
    return Formula(formula.slopes) if is_nothing else None


def _ones(node: fx.Node, look: Look) -> Formula | None:
    """All true."""
    return Formula((), is_bound=True) if traced(node).dtype == torch.bool else None


_RULES: Mapping[str, Rule] = {
    "arange": _arange,
    "add": _added(1),
    "sub": _added(-1),
    "le": _compared(1, 0),
    "lt": _compared(1, 1),
    "ge": _compared(-1, 0),
    "gt": _compared(-1, 1),
    "eq": _equal(same=True),
    "ne": _equal(same=False),
    **dict.fromkeys(JOINING, _both),
    **dict.fromkeys(KEEPING, _same),
    "unsqueeze": _unsqueeze,
    operator.getitem.__name__: _item,
    "diff": _difference,
    "cumsum": _running_sum,
    "ones": _ones,
    "new_ones": _ones,
}
