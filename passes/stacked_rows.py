"""Makes one reader of logits out of readers of one row each, whose results are stacked.

``stack([f(z[0]), f(z[1]), ...])`` over all rows of ``z`` is ``f(z)``, if ``f`` works on the last
dimensions. Training loops write it so to hold the log-softmax of one sequence at a time. With an
operator for each, every sequence would make a gradient of the whole weight.

Pays: where operators by chunks take the readers' place. Does not otherwise: run it only there.
"""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import emit, same_shape, shape_of
from memopt.passes.heads import loosely
from memopt.passes.steps import PLAIN

_BY_DIMENSION = frozenset(
    {torch.logsumexp, "logsumexp", F.log_softmax, torch.log_softmax, "log_softmax"}
    | {torch.gather, "gather", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"}
)
_POINTWISE = frozenset({"float", "double", "long", "detach", *PLAIN})


def unstack(graph: fx.Graph, logits: set[fx.Node]) -> bool:
    """Rewrite all stacks of readers of these logits; False where there are none."""
    found = False
    for stack in graph.find_nodes(op="call_function", target=torch.stack):
        items = _items(stack)
        sources = _sources(items)
        if sources is None or logits.isdisjoint(sources):
            continue
        with graph.inserting_before(stack):
            stack.replace_all_uses_with(_whole(graph, items, stack))
        graph.erase_node(stack)
        _erase(items)
        found = True
    return found


def _items(stack: fx.Node) -> Sequence[fx.Node]:
    """What is stacked along a new first dimension."""
    items = loosely(stack.args[0] if stack.args else stack.kwargs.get("tensors"))
    dim = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    return items if dim == 0 and not set(stack.kwargs) - {"tensors", "dim"} else ()


def _sources(items: Sequence[fx.Node]) -> set[fx.Node] | None:
    """The tensors whose rows, all and in order, go through the same calls to make the items."""
    source = _source(items)
    if source is not None:
        return {source}
    if not items or len({_call(item) for item in items}) > 1 or not _is_rowwise(items[0]):
        return None
    found = set[fx.Node]()
    for column in _columns(items):
        own = _sources(column)
        if own is None:
            return None
        found |= own
    return found


def _source(items: Sequence[fx.Node]) -> fx.Node | None:
    """``z`` of all of ``z[0]``, ``z[1]`` and so on."""
    indexed = all(i.op == "call_function" and i.target is getitem and i.args for i in items)
    source = loosely(items[0].args[0]) if items and indexed else None
    if source is None or not same_shape(shape_of(source)[:1], (len(items),)):
        return None
    rows = [tuple(item.args) for item in items]
    return source if rows == [(source, i) for i in range(len(items))] else None


def _columns(items: Sequence[fx.Node]) -> list[Sequence[fx.Node]]:
    """The first input of all items, the second of all, and so on."""
    return list(zip(*(item.all_input_nodes for item in items), strict=True))


def _call(node: fx.Node) -> Any:
    """What a node does to its inputs, to be compared."""
    places = {own: i for i, own in enumerate(node.all_input_nodes)}
    constants = fx.map_arg((node.args, node.kwargs), lambda n: ("input", places[n]))
    return node.op, str(node.target), len(places), repr(constants)


def _is_rowwise(node: fx.Node) -> bool:
    """Whether a call treats every entry of one more dimension, the first, alike."""
    numbers = [a for a in (*node.args[1:], *node.kwargs.values()) if type(a) is int]
    if node.target in _BY_DIMENSION:
        return bool(numbers) and max(numbers) < 0  # counted from the last
    return node.target in _POINTWISE and len(node.args) == 1 and not node.kwargs


def _whole(graph: fx.Graph, items: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    """The same calls, on the sources."""
    source, first = _source(items), items[0]
    if source is not None:
        return source
    wholes = [_whole(graph, column, like) for column in _columns(items)]
    inputs = dict(zip(first.all_input_nodes, wholes, strict=True))
    args, kwargs = fx.map_arg((first.args, first.kwargs), lambda n: inputs[n])
    return emit(graph, loosely(first.target), args, kwargs, like=like)


def _erase(items: Sequence[fx.Node]) -> None:
    """Drop calls that nothing reads any more, and then what they read."""
    source = _source(items)
    columns = [] if source is not None else _columns(items)
    for item in items:
        if not item.users:
            item.graph.erase_node(item)
    for column in columns:
        _erase(column)
