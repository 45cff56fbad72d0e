"""Steps of a Dynamo graph that are linear in values by rows, each with its transpose.

A rule takes the coefficients of a step's result to those of its input; see
``memopt.passes.coefficients``. A step may also add what does not depend on the values.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.coefficients import Coefficients, Writer, picks
from memopt.passes.heads import loosely, memory
from memopt.passes.logits import RESHAPES
from memopt.passes.row_losses import arguments
from memopt.passes.steps import TRANSPOSES, overwrites

Transpose = Callable[[Writer, Coefficients], Coefficients]

_SUMS = frozenset({torch.sum, "sum"})
_MEANS = frozenset({torch.mean, "mean"})
_CASTS = ("float", "half", "bfloat16", "double", "to", "type", "type_as", "contiguous", "clone")
_PLUS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MINUS = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_ADDITIONS = frozenset({*_PLUS, *_MINUS})
_DIVISIONS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_VIEWS = (
    *("flatten", torch.flatten, "squeeze", torch.squeeze, "unsqueeze", torch.unsqueeze),
    *("view_as", "reshape_as", "ravel", torch.ravel, torch.reshape, "unflatten", torch.unflatten),
)


def transpose_of(node: fx.Node, before: fx.Node) -> Transpose | None:
    """Takes the coefficients of a node to those of its input; None where it is not linear."""
    if node.op not in ("call_function", "call_method"):
        return None
    rule = _RULES.get(node.target)
    if rule is None or _in_place(node, before):
        return None
    return rule(node, before)


def read_by_transpose(node: fx.Node, before: fx.Node) -> list[fx.Node]:
    """What the transpose of a step depends on."""
    if node.target in _ADDITIONS:
        return []
    if node.target is torch.where:
        return [loosely(node.args[0])]
    return [n for n in node.all_input_nodes if n is not before]


def factors_only(node: fx.Node, before: fx.Node) -> bool:
    """Whether a step scales all values alike or takes the sum or mean of all.

    Its transpose does not need to know how many there are, which for rows that were picked is
    known too late.
    """
    if node.target in (*_SUMS, *_MEANS):
        return not shape_of(node) and len(node.args) == 1
    elementwise = _RULES.get(node.target) in (_same, _negated, _product, _quotient)
    return elementwise and all(not shape_of(n) for n in node.all_input_nodes if n is not before)


def _in_place(node: fx.Node, before: fx.Node) -> bool:
    """Whether a step writes into what somebody else may read."""
    if not overwrites(node) or not isinstance(node.args[0], fx.Node):
        return False
    if node.args[0] is not before:
        return True
    while len(before.users) == 1:
        bases = [n for n in before.all_input_nodes if memory(n) == memory(before)]
        if not bases:
            return False
        before = bases[0]
    return True


def _constant(value: Any) -> bool:
    """Whether an argument is a number, or a node without gradient."""
    if isinstance(value, fx.Node):
        return not getattr(traced(value), "requires_grad", False)
    return isinstance(value, (int, float))


def _pair(node: fx.Node, before: fx.Node) -> tuple[Any, Any] | None:
    """Both arguments of an operator that does not expand ``before``."""
    whole = same_shape(shape_of(node), shape_of(before)) and len(node.args) == 2
    return loosely(node.args) if whole and not node.kwargs else None


def _same(node: fx.Node, before: fx.Node) -> Transpose | None:
    source, result = traced(before), traced(node)
    floating = result.dtype.is_floating_point and result.device == source.device
    return (lambda w, c: c) if floating and node.args[0] is before else None


def _negated(node: fx.Node, before: fx.Node) -> Transpose | None:
    return lambda w, c: w.scaled(c, -1.0)


def _product(node: fx.Node, before: fx.Node) -> Transpose | None:
    pair = _pair(node, before)
    if pair is None:
        return None
    other = pair[1] if pair[0] is before else pair[0]
    return (lambda w, c: w.scaled(c, other)) if _constant(other) else None


def _quotient(node: fx.Node, before: fx.Node) -> Transpose | None:
    pair = _pair(node, before)
    if pair is None or not _constant(pair[1]):
        return None
    return lambda w, c: w.scaled(c, pair[1], operator.truediv)


def _sum_of_two(node: fx.Node, before: fx.Node, *, sign: float) -> Transpose | None:
    pair = _pair(node, before)
    if pair is None:
        return None
    factor = float(pair[0] is before) + sign * float(pair[1] is before)
    return lambda w, c: c if factor == 1.0 else w.scaled(c, factor)


def _chosen(node: fx.Node, before: fx.Node) -> Transpose | None:
    """``where(mask, v, other)`` and the other way round."""
    if len(node.args) != 3 or node.kwargs or not same_shape(shape_of(node), shape_of(before)):
        return None
    mask, yes, no = loosely(node.args)
    if mask is before or yes is no:
        return None
    return partial(_masked, before, mask, yes is before)


def _unfilled(node: fx.Node, before: fx.Node) -> Transpose | None:
    """``v.masked_fill(mask, other)``."""
    plain = len(node.args) == 3 and not node.kwargs and node.args[0] is before
    if not plain or not same_shape(shape_of(node), shape_of(before)):
        return None
    return partial(_masked, before, loosely(node.args[1]), False)


def _masked(
    before: fx.Node, mask: fx.Node, kept: bool, w: Writer, c: Coefficients
) -> Coefficients:
    """Coefficients where a mask has a value, and zeros elsewhere."""
    sides = w.tensor(c, before), 0.0
    return w.call(torch.where, mask, *(sides if kept else sides[::-1]))


def _viewed(node: fx.Node, before: fx.Node) -> Transpose | None:
    """Other shapes for the same numbers in the same order."""
    if node.args[0] is not before or any(isinstance(a, torch.dtype) for a in node.args[1:]):
        return None

    def transpose(w: Writer, c: Coefficients) -> Coefficients:
        c = w.filled(c, node)
        tensor = isinstance(c, fx.Node) and shape_of(c)
        return w.call("reshape_as", c, w.ghost(before)) if tensor else c

    return transpose


def _turned(node: fx.Node, before: fx.Node) -> Transpose | None:
    """Two dimensions in each other's place."""

    def transpose(w: Writer, c: Coefficients) -> Coefficients:
        c = w.filled(c, node)
        tensor = isinstance(c, fx.Node) and shape_of(c)
        return w.call(node.target, c, *node.args[1:], **node.kwargs) if tensor else c

    return transpose


def _indexed(node: fx.Node, before: fx.Node) -> Transpose | None:
    """``v[mask]``, and views of a part."""
    index = loosely(node.args[1])
    if node.args[0] is not before:
        return None
    if picks(node):
        masks = traced(index).dtype == torch.bool
        return partial(_put_back, before, index) if masks else None
    if any(shape_of(n) for n in node.all_input_nodes[1:]):
        return None

    def padded(w: Writer, c: Coefficients) -> Coefficients:
        zeros = w.call("clone", w.ghost(before))
        w.call(operator.setitem, zeros, index, c)
        return zeros

    return padded


def _put_back(before: fx.Node, mask: fx.Node, w: Writer, c: Coefficients) -> Coefficients:
    """One coefficient for all values that a mask picks."""
    for _ in range(len(shape_of(before)) - len(shape_of(mask))):
        mask = w.call("unsqueeze", mask, -1)
    return _masked(before, mask, True, w, c)


def _dotted(node: fx.Node, before: fx.Node) -> Transpose | None:
    """The inner product with a constant vector."""
    if len(node.args) != 2 or node.kwargs or len(shape_of(before)) != 1 or shape_of(node):
        return None
    left, right = loosely(node.args)
    other = right if left is before else left
    constant = _constant(other) and shape_of(other)
    return (lambda w, c: w.scaled(c, other)) if constant else None


def _totalled(node: fx.Node, before: fx.Node) -> Transpose | None:
    """Sums and means over some dimensions, or all."""
    a = arguments(node, "input dim keepdim")
    dtype = a.get("dtype")
    known = set(a) <= {"input", "dim", "keepdim", "dtype"} and a.get("input") is before
    if not known or (dtype is not None and not dtype.is_floating_point):
        return None
    rank, dim = len(shape_of(before)), a.get("dim")
    dims = (
        range(rank) if dim in (None, (), []) else dim if isinstance(dim, (tuple, list)) else [dim]
    )
    if not all(isinstance(d, int) for d in dims):
        return None
    over = sorted(d % rank for d in dims)
    whole = not shape_of(node)

    def transpose(w: Writer, c: Coefficients) -> Coefficients:
        c = c if whole else w.filled(c, node)
        if not whole and not a.get("keepdim") and isinstance(c, fx.Node) and shape_of(c):
            for d in over:
                c = w.call("unsqueeze", c, d)
        if node.target in _MEANS:
            for size in w.sizes(before, over):
                c = w.scaled(c, size, operator.truediv)
        return c

    return transpose


_RULES: Mapping[Any, Callable[[fx.Node, fx.Node], Transpose | None]] = {
    target: rule
    for targets, rule in (
        (_CASTS, _same),
        ((operator.neg, torch.neg, "neg", "neg_"), _negated),
        ((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _product),
        ((*_DIVISIONS, torch.true_divide), _quotient),
        (_PLUS, partial(_sum_of_two, sign=1.0)),
        (_MINUS, partial(_sum_of_two, sign=-1.0)),
        ((torch.dot, "dot", torch.matmul, operator.matmul, "matmul"), _dotted),
        ((torch.where,), _chosen),
        ((torch.masked_fill, "masked_fill", "masked_fill_"), _unfilled),
        ((*RESHAPES, *_VIEWS), _viewed),
        ((*TRANSPOSES, "t", torch.t), _turned),
        ((operator.getitem,), _indexed),
        ((*_SUMS, *_MEANS), _totalled),
    )
    for target in targets
}
