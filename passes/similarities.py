"""Finds the cross-entropies of one matrix of similarities that are taken in both directions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import find_head, loosely, untransposed
from memopt.passes.logits import Logits
from memopt.passes.row_losses import Loss, find_loss
from memopt.passes.steps import (
    FACTORS,
    PLAIN,
    SUMS,
    cast_of,
    divides,
    is_one,
    is_symbolic,
    overwrites,
)


@dataclass(frozen=True)
class Scale:
    """``number * tensor``, or ``number / tensor``.

    Attributes:
        number: product of all constant factors.
        tensor: with one element, or a number that changes from call to call; None for 1.
        divides: whether the tensor is below the line.
    """

    number: float = 1.0
    tensor: fx.Node | None = None
    divides: bool = False

    def times(self, factor: Any, step: fx.Node) -> "Scale | None":
        """With the factor of one more step; None for a second tensor."""
        if not isinstance(factor, fx.Node):
            number = self.number * FACTORS[step.target](float(factor))
            return Scale(number, self.tensor, self.divides) if math.isfinite(number) else None
        fits = is_symbolic(factor) or _is_float_beside(factor, step)
        return Scale(self.number, factor, divides(step)) if fits and not self.tensor else None


class Product(NamedTuple):
    """``scale * x @ y.T``.

    Attributes:
        x, y: embeddings `(N, D)`.
        scale: every factor between them and the similarities.
        scaled: the nodes that scale embeddings.
        similarities: the nodes that hold the `(N, N)` similarities, the product last.
        shifts: what is added to all similarities alike: it changes no softmax, and has no gradient
            but zeros.
    """

    x: fx.Node
    y: fx.Node
    scale: Scale
    scaled: tuple[fx.Node, ...]
    similarities: tuple[fx.Node, ...]
    shifts: tuple[fx.Node, ...] = ()


class Direction(NamedTuple):
    """One cross-entropy of similarities, or of their transpose."""

    loss: Loss
    product: Product


@dataclass(frozen=True)
class Pair:
    """Both directions of one loss, the first in the graph first."""

    a: Direction
    b: Direction

    @property
    def size(self) -> Any:
        """``N``."""
        return shape_of(self.a.product.x)[0]

    @property
    def losses(self) -> tuple[fx.Node, fx.Node]:
        return self.a.loss.node, self.b.loss.node

    @cached_property
    def similarities(self) -> set[fx.Node]:
        """Every node that holds them, and those that are nothing but their transpose or cast."""
        found = {*self.a.product.similarities, *self.b.product.similarities}
        todo = list(found)
        while todo:
            for user in todo.pop().users:
                if user not in found and (untransposed(user) or _converted(user)):
                    found.add(user)
                    todo.append(user)
        return found


def find_pairs(graph: fx.Graph) -> list[Pair]:
    """The losses in both directions, in order."""
    directions = list(_directions(graph))
    pairs, used = [], set[fx.Node]()
    for a, b in combinations(directions, 2):
        p, q = a.product, b.product
        opposite = (p.x, p.y, p.scale) == (q.y, q.x, q.scale)
        if opposite and used.isdisjoint(own := {a.loss.node, b.loss.node}):
            pairs.append(Pair(a, b))
            used |= own
    return pairs


def find_sigmoids(graph: fx.Graph) -> Iterator[tuple[fx.Node, Product]]:
    """The pairwise losses ``logsigmoid(labels * z)`` of square similarities ``z``, as SigLIP's."""
    for node in graph.find_nodes(op="call_function", target=F.logsigmoid):
        seen, todo = set[fx.Node](), list(node.all_input_nodes)
        while todo:
            at = todo.pop()
            if at in seen or not same_shape(shape_of(at), shape_of(node)):
                continue
            seen.add(at)
            product = product_of(at)
            if product is not None:
                yield node, product
                break
            todo += at.all_input_nodes


def _directions(graph: fx.Graph) -> Iterator[Direction]:
    for node in graph.find_nodes(op="call_function", target=F.cross_entropy):
        source = loosely(node.args[0] if node.args else node.kwargs.get("input"))
        if isinstance(source, fx.Node) and len(shape_of(source)) == 2:
            loss = find_loss(node, Logits(source))
            direction = None if loss is None else _direction(loss)
            if direction is not None:
                yield direction


def _direction(loss: Loss) -> Direction | None:
    product = product_of(loss.logits.node)
    return None if product is None else Direction(loss, product)


def product_of(node: fx.Node) -> Product | None:
    """Walk from similarities back to the product, and on to the embeddings."""
    scale, flips = Scale(), False
    nodes, shifts = list[fx.Node](), list[fx.Node]()
    while (head := find_head(node)) is None:
        nodes.append(node)
        if (found := _unscaled(node, scale)) is not None:
            node, scale = found
        elif (inner := untransposed(node)) is not None:
            node, flips = inner, not flips
        elif (inner := _converted(node)) is not None:
            node = inner
        elif (shifted := _unshifted(node)) is not None:
            node, shift = shifted
            shifts.append(shift)
        else:
            return None
    nodes.append(node)
    if any(overwrites(n) and not _are_alone(nodes[i + 1 :]) for i, n in enumerate(nodes)):
        return None
    ends, scaled = [], list[fx.Node]()
    for end in (head.hidden, head.weight):
        while (found := _unscaled(end, scale)) is not None:
            scaled.append(end)
            end, scale = found
        ends.append(end)
    x, y = reversed(ends) if flips else ends
    plain = head.bias is None and not head.transposed and len(shape_of(x)) == 2
    if not plain or not same_shape(shape_of(x), shape_of(y)):
        return None
    return Product(x, y, scale, tuple(scaled), tuple(nodes), tuple(shifts))


def _converted(node: fx.Node) -> fx.Node | None:
    """What a node copies or casts."""
    if node.target in PLAIN and node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return cast_of(node)


def _unscaled(node: fx.Node, scale: Scale) -> tuple[fx.Node, Scale] | None:
    """What ``c * z`` or ``z / c`` scales, and the scale with ``c``; ``c`` has one element."""
    if node.target not in FACTORS or node.kwargs or len(node.args) != 2 or overwrites(node):
        return None
    left, right = loosely(node.args)
    if not divides(node) and (not isinstance(left, fx.Node) or is_one(left)):
        left, right = right, left
    constant = is_one(right) if isinstance(right, fx.Node) else isinstance(right, (int, float))
    if not (constant and isinstance(left, fx.Node)) or len(shape_of(left)) != 2:
        return None
    after = scale.times(right, node)
    return None if after is None else (left, after)


def _unshifted(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``z`` and ``b`` of ``z + b``, in place too; ``b`` has one element."""
    if node.target not in SUMS or node.kwargs or len(node.args) != 2:
        return None
    left, right = loosely(node.args)
    if isinstance(left, fx.Node) and is_one(left) and not overwrites(node):
        left, right = right, left
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or not is_one(right):
        return None
    fits = _is_float_beside(right, left) and len(shape_of(left)) == 2
    return (left, right) if fits else None


def _is_float_beside(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node is a floating-point tensor on the device of another."""
    value = traced(node)
    tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
    return tensor and bool(value.device == traced(other).device)


def _are_alone(nodes: list[fx.Node]) -> bool:
    """Whether each node has one reader, so that what it holds may as well be overwritten."""
    return all(len(node.users) == 1 for node in nodes)
