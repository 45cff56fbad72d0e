"""Follows the logits of a head through a Dynamo graph: who holds them, and who reads them.

Starting at a linear layer, logits are followed through whatever changes their shape row by row,
their dtype, or their values by a constant factor and a softcap. Each such step commutes with the
linear layer's rows, so that a reader of the result can be served from the hidden state instead.
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import size_hint
from memopt.emit import emit, extent, same_shape, shape_of, traced
from memopt.passes.heads import Head, loosely, stops_gradient, swapped, untransposed
from memopt.passes.steps import (
    FACTORS,
    PLAIN,
    SUMS,
    TRANSPOSES,
    cast_of,
    divides,
    gathers,
    is_one,
    overwrites,
)

_TANH = frozenset({torch.tanh, "tanh", F.tanh})
_LOG_SOFTMAX = frozenset({F.log_softmax, torch.log_softmax, "log_softmax"})
_NEGATIVES = frozenset({operator.neg, torch.neg, "neg"})
_PERMUTES = frozenset({torch.permute, "permute", torch.movedim, "movedim"})
RESHAPES = frozenset({"view", "reshape"})


@dataclass(frozen=True)
class Logits:
    """One node that holds logits, and how to come there from the hidden state.

    Attributes:
        node: the node.
        path: the shape operators on the way, which act on rows alone.
        scale: factor on the product.
        softcap: bound by a hyperbolic tangent; 0 for none.
        biases: added to the product: one number per class, or one for all.
        open_tanh: whether the values are a bare ``tanh(scale * product)``, to be scaled.
        classes_at: 1 where the classes are the second dimension, else -1.
        normalised: whether the values are log-softmax of the logits.
        negated: whether they are that with the other sign.
        detached: whether no gradient flows back from here.
    """

    node: fx.Node
    path: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    biases: tuple[fx.Node, ...] = ()
    classes_at: int = -1
    normalised: bool = False
    negated: bool = False
    detached: bool = False

    @property
    def values(self) -> tuple[object, ...]:
        """Equal where the values are, row by row: the same rows in order, changed alike."""
        order = (*RESHAPES, "flatten", torch.flatten, "unsqueeze", torch.unsqueeze)
        rows = tuple(step for step in self.path if step.target not in order)
        return rows, self.scale, self.softcap, self.biases

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        dtype: torch.dtype = traced(self.node).dtype
        return dtype


def follow(head: Head) -> tuple[dict[fx.Node, Logits], list[tuple[fx.Node, Logits]]]:
    """Every node that holds the head's logits, and every reader that does something else."""
    start = Logits(
        head.node,
        biases=() if head.bias is None else (head.bias,),
        path=head.path,
        classes_at=head.classes_at,
        detached=stops_gradient(head.node),
    )
    members = {head.node: start}
    readers: list[tuple[fx.Node, Logits]] = []
    todo = [head.node]
    while todo:
        logits = members[todo.pop()]
        for user in logits.node.users:
            found = step(user, logits, head)
            if found is None:
                readers.append((user, logits))
            elif user not in members:
                members[user] = found
                todo.append(user)
    order = {node: i for i, node in enumerate(head.node.graph.nodes)}
    return members, sorted(readers, key=lambda reader: order[reader[0]])


def flipped(user: fx.Node, logits: Logits, head: Head) -> Head | None:
    """The head whose logits are the transpose of these: hidden state and weight change places.

    A contrastive loss reads its similarities in both directions.
    """
    plain = logits.scale == 1.0 and not logits.softcap and not logits.biases
    factors = all(step.target in FACTORS for step in logits.path)
    if not (plain and factors) or logits.normalised or head.transposed:
        return None
    square = len(shape_of(head.hidden)) == len(shape_of(user)) == 2
    if not square or untransposed(user) is not logits.node:
        return None
    return Head(user, head.weight, head.hidden, None, path=logits.path)


def step(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    """What ``user`` makes of the logits, if it still holds them."""
    if user.op not in ("call_function", "call_method"):
        return None
    for rule in (_same, _detached, _cast, _valued, _normalised, _negated, shaped, _swapped):
        found = rule(user, logits, head)
        if found is not None:
            return replace(found, node=user, detached=found.detached or stops_gradient(user))
    return None


def _is_input(user: fx.Node, logits: Logits) -> bool:
    """Whether the logits are the first argument, and the only one."""
    rest = [a for a in user.all_input_nodes if a is not logits.node]
    first = bool(user.args) and user.args[0] is logits.node
    return first and all(not shape_of(a) for a in rest)


def _same(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    plain = user.target in PLAIN or gathers(user)
    return logits if plain and _is_input(user, logits) else None


def _detached(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    detaches = user.target in ("detach", torch.detach) and _is_input(user, logits)
    return replace(logits, detached=True) if detaches else None


def _cast(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    return logits if cast_of(user) is logits.node else None


def _valued(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    """``c * z``, ``z / c``, ``tanh(z)`` and ``z + buffer``."""
    if logits.normalised or not user.args or len(user.args) > 2 or user.kwargs:
        return None
    if overwrites(user) and not _alone(logits.node, head):
        return None
    if user.target in _TANH:
        if logits.softcap:
            return None
        return replace(logits, softcap=1.0)
    if len(user.args) != 2:
        return None
    left, right = loosely(user.args)
    constant = right if left is logits.node else left
    if user.target in FACTORS and isinstance(constant, (int, float)):
        if divides(user) and left is not logits.node:
            return None
        return _scaled(logits, FACTORS[user.target](float(constant)))
    if user.target in FACTORS and isinstance(constant, fx.Node):
        # One factor for all classes may as well go to the hidden state.
        plain = left is logits.node or not divides(user)
        plain = plain and not logits.biases and not logits.softcap
        return replace(logits, path=(*logits.path, user)) if plain and is_one(constant) else None
    if user.target in SUMS and isinstance(constant, fx.Node):
        plain = logits.scale == 1.0 and not logits.softcap
        plain = plain and _is_bias(constant, logits, head)
        return replace(logits, biases=(*logits.biases, constant)) if plain else None
    return None


def _is_bias(node: fx.Node, logits: Logits, head: Head) -> bool:
    """Whether a node has one number per class, or one for all, in the dtype of the product."""
    shape, value = shape_of(node), traced(node)
    if not isinstance(value, torch.Tensor) or value.dtype != traced(head.node).dtype:
        return False
    one_row = math.prod(map(size_hint, shape)) == size_hint(head.classes)
    wide = same_shape(shape[-1:], (head.classes,)) and one_row
    wide = wide and len(shape) <= len(shape_of(logits.node)) and logits.classes_at == -1
    return wide or is_one(node)


def _scaled(logits: Logits, factor: float) -> Logits | None:
    """``factor * softcap * tanh(scale * z / softcap)`` is of the same form again."""
    if not math.isfinite(factor) or factor <= 0:
        return None
    cap = logits.softcap * factor
    return replace(logits, scale=logits.scale * factor, softcap=cap)


def _alone(node: fx.Node, head: Head) -> bool:
    """Whether nothing but the next step reads a node or what it is a view of, up to the head."""
    while len(node.users) == 1 and node is not head.node:
        node = next(a for a in node.all_input_nodes if shape_of(a))
    return len(node.users) == 1


def _normalised(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    if user.target not in _LOG_SOFTMAX or logits.node is not user.args[0] or logits.normalised:
        return None
    dim = loosely(user.args[1] if len(user.args) > 1 else user.kwargs.get("dim"))
    rank = len(shape_of(logits.node))
    by_class = isinstance(dim, int) and dim % rank == logits.classes_at % rank
    return replace(logits, normalised=True) if by_class else None


def _negated(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    """``-log_softmax(z)``."""
    minus = user.target in _NEGATIVES and _is_input(user, logits) and logits.normalised
    return replace(logits, negated=not logits.negated) if minus else None


def shaped(user: fx.Node, logits: Logits, head: Head | None) -> Logits | None:
    """Views and slices that leave every row whole."""
    before, after = shape_of(logits.node), shape_of(user)
    if logits.classes_at != -1 or not _is_input(user, logits):
        return None
    if not after or not before or not same_shape(after[-1:], before[-1:]):
        return None
    rank = len(before)
    target, args = user.target, loosely(user.args[1:])
    if any(isinstance(a, torch.dtype) for a in args):  # the same memory, read as other numbers
        return None
    whole = (
        target in RESHAPES
        or (target in ("flatten", torch.flatten) and _flattens_rows(args, rank))
        or (target is operator.getitem and _keeps_last(args[0], rank))
        or (target in ("squeeze", torch.squeeze, "select", "narrow") and _dims_of(args[:1], rank))
        or (target in ("unsqueeze", torch.unsqueeze) and _dims_of(args[:1], rank + 1))
        or (target in TRANSPOSES and len(args) == 2 and _dims_of(args, rank))
    )
    return replace(logits, path=(*logits.path, user)) if whole and not user.kwargs else None


def _dims_of(dims: Any, rank: int) -> bool:
    """Whether dimensions are given, and none of them is the last."""
    known = [d % rank for d in dims if isinstance(d, int)]
    return bool(known) and len(known) == len(dims) and rank - 1 not in known


def _flattens_rows(args: Any, rank: int) -> bool:
    start, end = list(args) + [0, -1][len(args) :]
    return isinstance(start, int) and isinstance(end, int) and end % rank < rank - 1


def _keeps_last(index: Any, rank: int) -> bool:
    """Whether an index leaves the last dimension as it is."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, fx.Node) and shape_of(item) for item in items):
        return False
    taken = [item for item in items if item is not None and item is not Ellipsis]
    if len(taken) == rank:
        return bool(taken[-1] == slice(None))
    return Ellipsis not in items or items[-1] is Ellipsis or items[-1] == slice(None)


def _swapped(user: fx.Node, logits: Logits, head: Head) -> Logits | None:
    """Classes moved to the second place, as ``cross_entropy`` wants them in more dimensions."""
    before, after = shape_of(logits.node), shape_of(user)
    rank = len(before)
    if rank < 3 or not _is_input(user, logits):
        return None
    if swapped(user) is logits.node:
        return replace(logits, classes_at=-1 if logits.classes_at == 1 else 1)
    if logits.classes_at != -1:
        return None
    if not same_shape(after, (before[0], before[-1], *before[1:-1])):
        return None
    args = loosely(user.args[1:])
    dims = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if not all(isinstance(d, int) for d in dims):
        return None
    if user.target in ("movedim", torch.movedim):
        moved = [d % rank for d in dims] == [rank - 1, 1]
    else:
        order = [0, rank - 1, *range(1, rank - 1)]
        moved = user.target in _PERMUTES and [d % rank for d in dims] == order
    return replace(logits, classes_at=1) if moved else None


def rows_of(graph: fx.Graph, head: Head, logits: Logits, cache: dict[Any, fx.Node]) -> fx.Node:
    """The hidden state brought to the shape of some logits: ``path`` replayed on it."""
    node = head.hidden
    width = extent(graph, node, -1) if logits.path else -1
    for i, step in enumerate(logits.path):
        key = logits.path[: i + 1]
        if key not in cache:
            if step.target in FACTORS:
                target = operator.truediv if divides(step) else operator.mul
                factor = next(n for n in reversed(step.all_input_nodes) if is_one(n))
                cache[key] = emit(graph, target, (node, factor), like=step)
            elif step.target in RESHAPES:
                sizes = loosely(step.args[1:])
                sizes = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
                cache[key] = emit(graph, "reshape", (node, *sizes[:-1], width), like=step)
            else:
                cache[key] = emit(graph, step.target, (node, *step.args[1:]), like=step)
        node = cache[key]
    return node
