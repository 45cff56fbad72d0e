"""Both directions of a contrastive loss, written as two cross-entropies, in one operator.

With ``z = scale * x @ y.T`` the search is for ``cross_entropy(z, arange(N))`` and
``cross_entropy(z.T, arange(N))`` whose sum is read: CLIP's loss, whether the second direction is
the transpose of the first or a product of its own. One operator computes both with four matrix
products; one operator each would take six. Where that is safe:

(1) both are plain means over classes that are ``arange(N)`` in the graph;
(2) only their sum is read, so both get the same gradient;
(3) nothing else reads the similarities but the graph's output, which takes lazy ones;
(4) the embeddings are what they were when the product was taken, gradients included.

Pays: always. One direction alone costs three products either way, and is left as it is.

Source: see ``memopt.kernels.contrastive``.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memopt._torch import size_hint
from memopt.emit import constant, emit, shape_of, traced
from memopt.graph import source_line
from memopt.kernels.blocks import default_chunk_rows
from memopt.kernels.contrastive import CONTRASTIVE
from memopt.passes.counting import is_arange
from memopt.passes.heads import Head, loosely, stops_gradient, unsafe
from memopt.passes.returned_similarities import refusal, replace_returned, scale_tensor
from memopt.passes.similarities import Direction, Pair, find_pairs, find_sigmoids
from memopt.passes.steps import FACTORS, SUMS, divides, name_of, overwrites
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_MEANS = frozenset({torch.mean, "mean"})


@dataclass(frozen=True)
class Sum:
    """The only reader of two losses.

    Attributes:
        node: their sum, or their mean.
        own: what it reads of the first: the loss, or the loss times a constant.
        nodes: the reader, and all nodes between it and the losses.
        mean: whether it is the mean.
    """

    node: fx.Node
    own: fx.Node
    nodes: tuple[fx.Node, ...]
    mean: bool = False


def fuse_pairs(
    graph: fx.Graph, ctx: PassContext, name: str, *, least: int, chunk_rows: int, logits: str
) -> int:
    """Put one operator in the place of every two losses that are both directions of one.

    Args:
        graph: a Dynamo graph.
        ctx: takes the remarks.
        name: of the pass.
        least: pairs from which on it pays.
        chunk_rows: rows whose similarities exist at a time; 0 to choose.
        logits: what becomes of similarities that the graph returns; see ``ChunkLosses``.

    Returns:
        the number of operators.
    """
    fused, seen = 0, set[fx.Node]()
    while pair := next((p for p in find_pairs(graph) if seen.isdisjoint(p.losses)), None):
        seen.update(pair.losses)
        if size_hint(pair.size) < least:
            continue
        loss, total = pair.losses[0], _find_sum(pair)
        place = loss.name, source_line(loss)
        text = "a contrastive loss in both directions"
        reason = _refusal(pair, total, logits)
        if total is None or reason:
            ctx.remark(name, RemarkKind.MISSED, f"{text}, not in one operator: {reason}", *place)
            continue
        rows = _fuse(graph, pair, total, chunk_rows, logits, ctx)
        text += f" by chunks of {rows} rows; {pair.size} pairs"
        ctx.remark(name, RemarkKind.APPLIED, text, *place)
        fused += 1
    for sigmoid, product in find_sigmoids(graph):
        if size_hint(shape_of(product.x)[0]) >= least:
            text = "a sigmoid loss of every pair: the similarities stay whole"
            ctx.remark(name, RemarkKind.MISSED, text, sigmoid.name, source_line(sigmoid))
    return fused


def _find_sum(pair: Pair) -> Sum | None:
    """The only reader of a pair's losses, if it is their sum, or of both times one factor."""
    a, b = pair.losses
    between: list[fx.Node] = []
    while len(a.users) == len(b.users) == 1:
        (p,), (q,) = a.users, b.users
        args = loosely(p.args)
        if p is q and p.target is torch.stack:
            mean = next(iter(p.users))
            plain = mean.target in _MEANS and len(p.users) == len(mean.args) == 1
            plain = plain and len(args) == 1 and not p.kwargs and not mean.kwargs
            return Sum(mean, a, (*between, p, mean), mean=True) if plain else None
        if p is q:
            plain = p.target in SUMS and len(args) == 2 and not p.kwargs
            return Sum(p, a, (*between, p)) if plain else None
        linear = p.target in FACTORS and not overwrites(p) and args.count(a) == 1
        linear = linear and (args[0] is a or not divides(p))
        if not linear or _call(p, a) != _call(q, b):
            return None
        between += [p, q]
        a, b = p, q
    return None


def _call(node: fx.Node, own: fx.Node) -> Any:
    """What a node does to one of its arguments."""
    return node.target, [None if a is own else a for a in loosely(node.args)], node.kwargs


def _refusal(pair: Pair, total: Sum | None, mode: str) -> str:
    """Why a pair cannot be one operator; or ``""``."""
    last = max(pair.losses)
    for direction in (pair.a, pair.b):  # (1)
        loss = direction.loss
        if loss.weight is not None or loss.label_smoothing or loss.reduction != "mean":
            return "the cross-entropies have weights, smoothing or another reduction than mean"
        known = isinstance(loss.ignore_index, int) and loss.ignore_index < 0
        if not known or not is_arange(loss.target, pair.size, last):
            return "the classes are not seen to be arange(N)"
    if total is None:  # (2)
        return "the losses are not only read as their sum"
    readers = {user for node in pair.similarities for user in node.users}
    for reader in sorted(readers - pair.similarities - set(pair.losses)):  # (3)
        if reader.op != "output":
            return f"the similarities are also read by {reader.name} ({name_of(reader)})"
        last = reader
        returned = {n for n in reader.all_input_nodes if n in pair.similarities}
        if reason := refusal(pair, mode, returned):
            return reason
    return _changed(pair, last)


def _changed(pair: Pair, last: fx.Node) -> str:
    """Why the product may not be taken again, later, from the same embeddings. See (4)."""
    a, b = pair.a.product, pair.b.product
    nodes = [*pair.similarities, *a.scaled, *b.scaled]
    if traced(a.similarities[-1]).dtype != traced(b.similarities[-1]).dtype:
        return "the products have different dtypes"
    if len({traced(loss).requires_grad for loss in pair.losses}) > 1:
        return "one direction has a gradient and the other none"
    stopped = any(map(stops_gradient, nodes))
    if stopped and traced(pair.losses[0]).requires_grad:
        return "a part of the product has no gradient"
    return unsafe(Head(min(nodes), a.x, a.y, a.scale.tensor), last)


def _fuse(
    graph: fx.Graph, pair: Pair, total: Sum, chunk_rows: int, mode: str, ctx: PassContext
) -> int:
    """Put one operator in the place of both losses; returns the rows of its chunks."""
    loss, size = pair.losses[0], size_hint(pair.size)
    rows = chunk_rows or default_chunk_rows(size, size, traced(loss).device)
    with graph.inserting_before(loss):
        both = _operator(graph, pair.a, rows)
        both = _with_zeros(graph, both, pair)
    with graph.inserting_before(total.node):
        own = both if total.own is loss else total.own
        loss.replace_all_uses_with(both)
        own = emit(graph, operator.mul, (own, 0.5), like=total.node) if total.mean else own
    total.node.replace_all_uses_with(own)
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        replace_returned(output, pair, mode, ctx)
    done = {*total.nodes, *pair.losses, *pair.similarities}
    for node in reversed([n for n in graph.nodes if n in done]):
        if not node.users:
            graph.erase_node(node)
    return rows


def _operator(graph: fx.Graph, a: Direction, rows: int) -> fx.Node:
    """The sum of the losses in both directions, in the dtype of one."""
    like, (x, y, scale, *_) = a.loss.node, a.product
    dtype, result = traced(a.product.similarities[-1]).dtype, traced(like)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(graph, target, args, kwargs, like=like)

    def typed(node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if traced(node).dtype == dtype else call("to", node, dtype)

    inputs = [typed(x, dtype), typed(y, dtype), scale_tensor(graph, scale, x, dtype, like)]
    if not result.requires_grad:
        inputs = [constant(graph, node, like=like) for node in inputs]
    wanted = [bool(traced(node).requires_grad) for node in inputs]
    mean = call(operator.getitem, call(CONTRASTIVE, *inputs, rows, wanted, True), 0)
    return typed(call(operator.mul, mean, 2.0), result.dtype)


def _with_zeros(graph: fx.Graph, value: fx.Node, pair: Pair) -> fx.Node:
    """The same value, with the gradients of what was added to all similarities: zeros."""
    for shift in dict.fromkeys((*pair.a.product.shifts, *pair.b.product.shifts)):
        if not (traced(shift).requires_grad and traced(value).requires_grad):
            continue
        zero = emit(graph, operator.mul, (shift, 0.0), like=pair.a.loss.node)
        for step in (("reshape", ()), ("to", traced(value).dtype)):
            zero = emit(graph, step[0], (zero, step[1]), like=pair.a.loss.node)
        value = emit(graph, operator.add, (value, zero), like=pair.a.loss.node)
    return value
