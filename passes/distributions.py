"""What elementwise nodes of a Dynamo graph say about distributions over classes.

A node is understood if it is a polynomial in probabilities and log-probabilities of some logits
and of mixtures of those; see ``memopt.passes.terms``. Arithmetic on nodes is arithmetic on
polynomials, so a loss is recognised by what it computes and not by how it is spelled.
"""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import Head, loosely, source_of
from memopt.passes.logits import Logits, follow, shaped, step
from memopt.passes.row_losses import arguments
from memopt.passes.steps import overwrites
from memopt.passes.terms import (
    ONE,
    Softmax,
    Terms,
    added,
    divergence_terms,
    exponential,
    frozen,
    logarithm,
    mapped,
    multiplied,
    scaled,
)

_NUMBERS: Mapping[Any, Callable[[float], float]] = {
    torch.log: math.log,
    "log": math.log,
    torch.log1p: math.log1p,
    "log1p": math.log1p,
    torch.exp: math.exp,
    "exp": math.exp,
}
_CASTS = ("float", "half", "bfloat16", "double", "to", "type", "type_as")
_SAME = frozenset({"contiguous", "clone", "detach", torch.clone, torch.detach, *_CASTS})


def at_hand(node: fx.Node) -> Head:
    """Logits that are no head's product, as the head that reads them as they are."""
    return Head(node, node, node, None)


def is_at_hand(head: Head) -> bool:
    """Whether this is no layer but the logits themselves."""
    return head.hidden is head.node


def understand(graph: fx.Graph) -> dict[fx.Node, Terms]:
    """Every node that is such a polynomial, numbers left out."""
    known: dict[fx.Node, Terms] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if not isinstance(traced(node), torch.Tensor):
            continue
        rule = _RULES.get(node.target)
        terms = rule(node, known) if rule else _shape_step(node, known)
        if terms is None:
            continue
        if not traced(node).requires_grad:
            terms = mapped(terms, frozen)
        known[node] = terms
    return {node: terms for node, terms in known.items() if set(terms) - {ONE}}


def _value(value: Any, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """What an argument is: a number, or a node that is understood."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {ONE: float(value)}
    return known.get(value) if isinstance(value, fx.Node) else None


def _number(terms: Terms | None) -> float | None:
    """The number that a polynomial is, if it is one."""
    if terms is None or set(terms) - {ONE}:
        return None
    return terms.get(ONE, 0.0)


def _operands(node: fx.Node, known: Mapping[fx.Node, Terms]) -> list[Terms] | None:
    """Both sides of an operator, neither of which is expanded over classes or rows."""
    sides = [_value(side, known) for side in node.args]
    if len(sides) != 2 or node.kwargs:
        return None
    for side, argument in zip(sides, node.args, strict=True):
        wide = side is not None and _number(side) is None
        if wide and not same_shape(shape_of(loosely(argument)), shape_of(node)):
            return None
    return [side for side in sides if side is not None] if None not in sides else None


def _add(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    sides = _operands(node, known)
    return added(*sides) if sides else None


def _subtract(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    sides = _operands(node, known)
    return added(sides[0], scaled(sides[1], -1.0)) if sides else None


def _multiply(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    sides = _operands(node, known)
    return multiplied(*sides) if sides else None


def _divide(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    sides = _operands(node, known)
    by = _number(sides[1]) if sides else None
    return scaled(sides[0], 1 / by) if sides and by else None


def _negate(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    value = _value(node.args[0], known) if node.args else None
    return None if value is None else scaled(value, -1.0)


def _function(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """``exp``, ``log`` and ``log1p``."""
    value = _value(node.args[0], known) if len(node.args) == 1 and not node.kwargs else None
    number = _number(value)
    if number is not None:
        try:
            return {ONE: _NUMBERS[node.target](number)}
        except (ValueError, OverflowError):  # the logarithm of a share that is zero
            return None
    if value is None or node.target in (torch.log1p, "log1p"):
        return None
    return exponential(value) if node.target in (torch.exp, "exp") else logarithm(value)


def _tensor(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """``torch.tensor(0.5)``: a number."""
    return _value(node.args[0], known) if node.args and not shape_of(node) else None


def _same(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    before = node.args[0] if node.args else None
    value = _value(before, known)
    if value is None or not traced(node).dtype.is_floating_point:
        return None
    return value if traced(loosely(before)).device == traced(node).device else None


def _log_add_exp(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    sides = _operands(node, known)
    return _log_sum(sides) if sides else None


def _log_sum_exp(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """``logsumexp(stack([a, b]), 0)``."""
    outer = arguments(node, "input dim keepdim")
    stack = outer.get("input")
    if not isinstance(stack, fx.Node) or stack.target is not torch.stack:
        return None
    inner = arguments(stack, "tensors dim")
    first = outer.get("dim") in (0, (0,), [0]) and inner.get("dim", 0) == 0
    if not first or outer.get("keepdim"):
        return None
    sides = [_value(side, known) for side in inner["tensors"]]
    return _log_sum([s for s in sides if s is not None]) if None not in sides else None


def _log_sum(sides: list[Terms]) -> Terms | None:
    total: Terms = {}
    for side in sides:
        own = exponential(side)
        if own is None:
            return None
        total = added(total, own)
    return logarithm(total)


def _softmax(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    distribution = _distribution(node)
    return None if distribution is None else {(distribution, None): 1.0}


def _log_softmax(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    distribution = _distribution(node)
    return None if distribution is None else {(None, distribution): 1.0}


def _distribution(node: fx.Node) -> Softmax | None:
    """What a softmax over the last dimension is of."""
    base = node.args[0] if node.args else node.kwargs.get("input")
    dim = loosely(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    rank = len(shape_of(node))
    if not isinstance(base, fx.Node) or not isinstance(dim, int) or not rank:
        return None
    if dim % rank != rank - 1:
        return None
    head, logits = _source(base)
    trained = bool(traced(base).requires_grad)
    return Softmax(head.node, logits.values, trained, head, logits)


def _source(base: fx.Node) -> tuple[Head, Logits]:
    """The head that logits come from and the way; or the logits, at hand as early as possible."""
    head = source_of(base)
    found = follow(head)[0].get(base) if head is not None else None
    if head is not None and found is not None and _is_plain(found):
        return head, found
    root = base
    while (before := _before(root)) is not None:
        root = before
    members, readers = follow(at_hand(root))
    found = members.get(base)
    if found is not None and _is_plain(found) and not any(map(overwrites, dict(readers))):
        return at_hand(root), found
    return at_hand(base), Logits(base)


def _is_plain(logits: Logits) -> bool:
    return logits.classes_at == -1 and not logits.normalised


def _before(node: fx.Node) -> fx.Node | None:
    """The logits that a node changes by a number, a cast or their shape, into a new tensor."""
    tensors = [a for a in node.args[:2] if isinstance(a, fx.Node) and shape_of(a)]
    if len(tensors) != 1 or overwrites(node):
        return None
    found = step(node, Logits(tensors[0]), at_hand(tensors[0]))
    moved = found is not None and found.path and shaped(node, Logits(tensors[0]), None) is None
    return None if found is None or moved or not _is_plain(found) else tensors[0]


def _shape_step(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """A step that leaves rows whole may as well be taken by the logits."""
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or before not in known:
        return None
    if shaped(node, Logits(before), None) is None:
        return None

    def moved(softmax: Softmax) -> Softmax:
        logits = replace(softmax.logits, path=(*softmax.logits.path, node))
        return replace(softmax, logits=logits, values=logits.values)

    return mapped(known[before], moved)


def _kl_div(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """Elementwise, whatever the reduction."""
    return divergence_of(node, known) if shape_of(node) else None


def divergence_of(node: fx.Node, known: Mapping[fx.Node, Terms]) -> Terms | None:
    """What ``kl_div`` reduces, if both its inputs are understood."""
    a = arguments(node, "input target size_average reduce reduction log_target")
    given, target = (known.get(loosely(a.get(name))) for name in ("input", "target"))
    if given is None or target is None or {"size_average", "reduce"} & {k for k in a if a[k]}:
        return None
    if not same_shape(shape_of(a["input"]), shape_of(a["target"])):
        return None
    return divergence_terms(given, target, log_target=bool(a.get("log_target", False)))


_Rule = Callable[[fx.Node, Mapping[fx.Node, Terms]], Terms | None]
_RULES: Mapping[Any, _Rule] = {
    target: rule
    for targets, rule in (
        ((operator.add, torch.add, "add"), _add),
        ((operator.sub, torch.sub, "sub"), _subtract),
        ((operator.mul, torch.mul, "mul"), _multiply),
        ((operator.truediv, torch.div, torch.true_divide, "div"), _divide),
        ((operator.neg, torch.neg, "neg"), _negate),
        (tuple(_NUMBERS), _function),
        ((torch.tensor,), _tensor),
        (tuple(_SAME), _same),
        ((torch.logaddexp, "logaddexp"), _log_add_exp),
        ((torch.logsumexp, "logsumexp"), _log_sum_exp),
        ((F.softmax, torch.softmax, "softmax"), _softmax),
        ((F.log_softmax, torch.log_softmax, "log_softmax"), _log_softmax),
        ((F.kl_div,), _kl_div),
    )
    for target in targets
}
