"""Finds products of a head's size that reach a loss by a way that no pass follows.

Logits that a pass follows end in a rewrite or in a reason of their own. These do not even get that
far: between the product and the loss stands something else, or the product is of another kind.
"""

import math
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import size_hint
from memopt.emit import shape_of, traced
from memopt.passes.heads import find_head
from memopt.passes.logits import follow
from memopt.passes.row_losses import arguments
from memopt.passes.steps import name_of

_PRODUCTS = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "inner", "tensordot"}
    | {"conv1d", "conv2d"}
)
_LOSSES = frozenset(
    {F.cross_entropy, F.nll_loss, torch.logsumexp, "logsumexp"}
    | {F.log_softmax, torch.log_softmax, "log_softmax"}
)
_EXP, _SUM, _LOG = ({name, getattr(torch, name)} for name in ("exp", "sum", "log"))
_SMALLEST_PART = 8  # of the logits that a loss reads


class Unfollowed(NamedTuple):
    """One product that reaches a loss.

    Attributes:
        node: what is not followed: the product, or what stands behind it.
        product: the product.
        loss: what reads it in the end.
    """

    node: fx.Node
    product: fx.Node
    loss: fx.Node

    @property
    def reason(self) -> str:
        """For a remark."""
        shape = "x".join(map(str, shape_of(self.product)))
        loss = f"{self.loss.name} ({name_of(self.loss)})"
        text = f"a product, {shape}, reaches {loss} and stays whole: "
        name = f"{self.node.name} ({name_of(self.node)})"
        if self.node is self.product:
            return f"{text}{name} is no linear layer that is known"
        return f"{text}{name} stands between and is not followed"


def find_unfollowed(graph: fx.Graph, seen: Container[fx.Node], least: int) -> Iterator[Unfollowed]:
    """Such products, each once, in the order of the losses.

    Args:
        graph: a Dynamo graph whose losses have been replaced where that could be done.
        seen: products about which all is said.
        least: classes from which on a product has a head's size.
    """
    told = set[fx.Node]()
    for loss in graph.nodes:
        source = _logits(loss)
        if source is None or size_hint(_classes(loss, source)) < least:
            continue
        for way in _ways(source):
            product = way[-1]
            written_out = loss.target in _LOG
            if written_out and all(node.target not in _EXP for node in way):
                continue
            if product in seen or product in told or _widest(product) < least:
                continue
            told.add(product)
            yield Unfollowed(_obstacle([*reversed(way), loss]), product, loss)


def _logits(loss: fx.Node) -> fx.Node | None:
    """What a loss reads, and what is summed in ``z.exp().sum(-1).log()``."""
    if loss.op not in ("call_function", "call_method"):
        return None
    source = arguments(loss, "input").get("input")
    if loss.target in _LOG and isinstance(source, fx.Node):
        total = next((n for n in (source, *source.all_input_nodes) if n.target in _SUM), None)
        source = arguments(total, "input").get("input") if total is not None else None
    elif loss.target not in _LOSSES:
        return None
    return source if isinstance(source, fx.Node) and len(shape_of(source)) > 1 else None


def _classes(loss: fx.Node, source: fx.Node) -> Any:
    """How many classes a loss reads."""
    return shape_of(source)[1 if loss.target in (F.cross_entropy, F.nll_loss) else -1]


def _ways(source: fx.Node) -> Iterator[list[fx.Node]]:
    """From what a loss reads back to every large product, by nodes that are large themselves."""
    least = _size(source) / _SMALLEST_PART
    ways, known = [[source]], {source}
    while ways:
        way = ways.pop(0)
        if name_of(way[-1]) in _PRODUCTS:
            yield way
            continue
        for node in way[-1].all_input_nodes:
            if node not in known and _size(node) >= least and node.op != "placeholder":
                known.add(node)
                ways.append([*way, node])


def _size(node: fx.Node) -> int:
    """Elements of a tensor, or of several together."""
    value = traced(node)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    shapes = [t.shape for t in tensors if isinstance(t, torch.Tensor)]
    return sum(math.prod(map(size_hint, shape)) for shape in shapes)


def _widest(product: fx.Node) -> int:
    return max(map(size_hint, shape_of(product)), default=0)


def _obstacle(way: list[fx.Node]) -> fx.Node:
    """The first node on the way from a product that does not hold its logits any more."""
    head = find_head(way[0])
    if head is None:
        return way[0]
    members = follow(head)[0]
    return next(node for node in way if node not in members)
