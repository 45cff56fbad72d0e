"""Attention that is written out: scores, masks, a softmax and a weighted sum, step by step.

From a softmax the steps are followed back to the product of queries and keys, and on to the one
with the values: casts, numbers that scale, masks that are added or that fill in a number, shapes
with batch and heads in one dimension, and dropout that drops nothing. Anything else is no
spelling that is known, and is named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, same_shape, shape_of, traced
from memopt.passes.contractions import Contraction, Operand, contraction_of
from memopt.passes.heads import loosely
from memopt.passes.row_losses import arguments
from memopt.passes.steps import FACTORS, PLAIN, SUMS, cast_of, divides, name_of

_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})
_MANY = 12


@dataclass(frozen=True)
class Mask:
    """What scores meet between their product and the softmax.

    Attributes:
        node: numbers that are added, or booleans.
        step: the node that adds it, or fills in.
        fill: what is filled in; None where the mask is added.
        hides: whether it fills in where it is true, not where it is false.
    """

    node: fx.Node
    step: fx.Node
    fill: float | None = None
    hides: bool = True


@dataclass(frozen=True)
class Scores:
    """What the softmax is of.

    Attributes:
        product: of queries and keys.
        scale: its factor.
        masks: from the last one on.
        inner: the steps.
        leads: the dimensions before the last two, as they are at each step.
    """

    product: Contraction
    scale: float
    masks: tuple[Mask, ...]
    inner: frozenset[fx.Node]
    leads: tuple[tuple[Any, ...], ...] = ()


@dataclass(frozen=True)
class WrittenOut:
    """One attention.

    Attributes:
        softmax: of the scores.
        scores: how they are made.
        sum: the product of probabilities and values.
        value: the values, as `(batch, keys, width)`.
        inner: every step but the last.
    """

    softmax: fx.Node
    scores: Scores
    sum: Contraction
    value: Operand
    inner: frozenset[fx.Node]

    @property
    def last(self) -> fx.Node:
        """The weighted sum."""
        return self.sum.node

    @property
    def heads(self) -> tuple[Any, ...]:
        """Batch and heads where some step has both; else the only such dimension."""
        return max(self.scores.leads, key=len)

    def with_heads(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Four dimensions: batch, heads, rows, columns; the graph is positioned."""
        if len(shape_of(node)) == 4:
            return node
        if len(self.heads) == 1:
            return emit(graph, "unsqueeze", (node, 1), like=self.last)
        return emit(graph, "unflatten", (node, 0, (-1, self.heads[1])), like=self.last)


def written_out(softmax: fx.Node) -> WrittenOut | str:
    """The attention around a softmax; why its spelling is not known; ``""`` where it is none."""
    source = arguments(softmax, "input dim").get("input", None)
    found = _weighed(softmax)
    if not isinstance(source, fx.Node):
        return ""
    scores = _scores(source)
    if isinstance(scores, str) or isinstance(found, str):
        if isinstance(scores, str) and isinstance(found, str):
            return ""  # a softmax of something else
        return scores if isinstance(scores, str) else str(found)
    dim = arguments(softmax, "input dim").get("dim")
    if dim not in (-1, len(shape_of(softmax)) - 1):
        return f"the softmax is over dimension {dim}"
    weighted, steps = found
    inner = scores.inner | steps | {softmax}
    return WrittenOut(softmax, scores, weighted, _values(weighted), inner)


def _values(weighted: Contraction) -> Operand:
    """The values as `(batch, keys, width)`."""
    *batch, width, keys = weighted.right.order
    return Operand(weighted.right.node, (*batch, keys, width))


def _scores(value: fx.Node, most: int = _MANY) -> Scores | str:
    """How scores are made; or which step is none that is known."""
    scale, masks, inner, leads = 1.0, list[Mask](), set[fx.Node](), [shape_of(value)[:-2]]
    for _ in range(most):
        product = contraction_of(value)
        if product is not None:
            break
        inner.add(value)
        step = _step(value, most)
        if isinstance(step, str):
            return step
        value, factor, mask = step
        leads.append(shape_of(value)[:-2])
        if mask is not None:
            if scale != 1:
                return "masks are scaled, too"
            masks.append(mask)
        scale *= factor
    else:
        return "there are too many steps"
    product = product if product.in_order else product.swapped()
    if not product.in_order:
        return f"{value.name} has another order of dimensions than batch, queries, keys"
    if product.added is not None:
        if product.beta != 1 or scale != 1:
            return "masks are scaled, too"
        masks.append(Mask(product.added, value))
    scale *= product.alpha
    return Scores(product, scale, tuple(masks), frozenset({value, *inner}), tuple(leads))


def _step(node: fx.Node, most: int) -> tuple[fx.Node, float, Mask | None] | str:
    """What one step is of, by what it scales that, and what mask it brings."""
    name, args = name_of(node), loosely(node.args)
    if (source := cast_of(node)) is not None:
        return source, 1.0, None
    if name in PLAIN or (name in _RESHAPES and _keeps_matrices(node)):
        return args[0], 1.0, None
    if node.target in FACTORS and len(args) == 2 and not node.kwargs:
        factors = [a for a in args if isinstance(a, (int, float))]
        tensor = next((a for a in args if isinstance(a, fx.Node)), None)
        scale = FACTORS[node.target](float(factors[0])) if len(factors) == 1 else math.nan
        if (
            tensor is not None
            and (tensor is args[0] or not divides(node))
            and math.isfinite(scale)
        ):
            return tensor, scale, None
        return f"{node.name} scales scores by what is no number"
    if node.target in SUMS and len(args) == 2 and not node.kwargs:
        for one, other in (args, args[::-1]):
            both = isinstance(one, fx.Node) and isinstance(other, fx.Node)
            whole = both and same_shape(shape_of(one), shape_of(node))
            if whole and not isinstance(_scores(one, most - 1), str):
                return one, 1.0, Mask(other, node)
    if filled := _filled(node):
        return filled
    return f"{node.name} ({name}) is between the scores and the softmax"


def _filled(node: fx.Node) -> tuple[fx.Node, float, Mask] | None:
    """``scores.masked_fill(mask, number)``, and as ``where``."""
    name = name_of(node)
    if name in ("masked_fill", "masked_fill_"):
        own = arguments(node, "input mask value")
        source, mask, fill, hides = own.get("input"), own.get("mask"), own.get("value"), True
    elif name == "where":
        own = arguments(node, "condition input other")
        mask, source, fill, hides = own.get("condition"), own.get("input"), own.get("other"), False
        if node.op == "call_method":
            mask, source = source, mask  # ``scores.where(mask, number)``
        if number_of(source) is not None:
            source, fill, hides = fill, source, True
    else:
        return None
    number = number_of(fill)
    if number is None or not isinstance(source, fx.Node) or not isinstance(mask, fx.Node):
        return None
    boolean = traced(mask).dtype == torch.bool and same_shape(shape_of(source), shape_of(node))
    return (source, 1.0, Mask(mask, node, number, hides)) if boolean else None


def number_of(value: Any) -> float | None:
    """A Python number, or the one that a tensor without dimensions is made of."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or shape_of(value) or value.op == "placeholder":
        return None
    if cast_of(value) is not None or name_of(value) in ("to", "type"):
        return number_of(value.args[0])
    name = name_of(value)
    if name in ("zeros", "new_zeros"):
        return 0.0
    place = {"full": 1, "tensor": 0, "scalar_tensor": 0, "new_full": 2}.get(name)
    named = {"full": "fill_value", "new_full": "fill_value", "tensor": "data"}.get(name, "")
    if place is None:
        return None
    own = loosely(value.args)
    given = own[place] if len(own) > place else value.kwargs.get(named)
    return float(given) if isinstance(given, (int, float)) else None


def _weighed(softmax: fx.Node) -> tuple[Contraction, frozenset[fx.Node]] | str:
    """The product with the values, and the steps before it; or what else reads probabilities."""
    node, steps = softmax, set[fx.Node]()
    for _ in range(_MANY):
        if len(node.users) != 1:
            readers = sorted(user.name for user in node.users)
            return f"its probabilities are read by {' and '.join(readers) or 'nothing'}"
        (user,) = node.users
        product = contraction_of(user)
        if product is not None:
            weighted = _with_probabilities(product, node)
            return (weighted, frozenset(steps)) if weighted else f"{user.name} reads them turned"
        dropped = _dropped(user)
        if dropped:
            return f"{user.name} drops some of them at random"
        passes = dropped == 0 or cast_of(user) is node or name_of(user) in PLAIN
        if not passes and not (name_of(user) in _RESHAPES and _keeps_matrices(user)):
            return f"its probabilities are read by {user.name} ({name_of(user)})"
        steps.add(user)
        node = user
    return "there are too many steps"


def _with_probabilities(product: Contraction, node: fx.Node) -> Contraction | None:
    """The product with probabilities on the left, as `(batch, queries, keys)`."""
    if product.left.node is not node:
        product = product.swapped()
    plain = tuple(range(len(product.order)))
    alone = product.right.node is not node and product.added is None and product.alpha == 1
    return product if alone and product.left.order == plain else None


def _dropped(node: fx.Node) -> float | None:
    """The share that a dropout drops, 1 where that is known at run time; None of another node."""
    if name_of(node) not in ("dropout", "dropout_"):
        return None
    own = {"p": 0.5, "training": True} | arguments(node, "input p training inplace")
    share = own["p"] if own["training"] else 0.0
    return float(share) if isinstance(share, (int, float)) else 1.0


def _keeps_matrices(node: fx.Node) -> bool:
    """Whether a change of shape leaves the last two dimensions as they are."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    before, after = shape_of(source), shape_of(node)
    return min(len(before), len(after)) >= 3 and same_shape(before[-2:], after[-2:])


def softmaxes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Every softmax in a graph that has a traced value."""
    for node in graph.nodes:
        called = node.op in ("call_function", "call_method") and name_of(node) == "softmax"
        if called and len(shape_of(node)) >= 3:
            yield node
