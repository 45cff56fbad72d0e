"""Compute gradients in the forward where a loss by rows only goes into a weighted sum.

A loss by rows makes its logits twice, because the upstream gradients of its rows are not known
before the backward. Up to one factor they are, where a scalar is all that depends on the values
and is linear in them: ``(loss * mask).sum() / mask.sum()``, ``kl[mask].mean()``, in whatever
steps; see ``memopt.passes.linear_steps``. Then the weights of the rows are computed before the
loss, and the operator makes its gradients with its values. The scalar is computed as ever, of
values without gradient, and a zero that has the gradients is added to it. This is done where

(1) all that reads the values and has a gradient leads to one scalar, by steps that are linear;
(2) the weights do not depend on the values;
(3) nothing needs the values before the weights are there, and nothing that either is computed
    from is overwritten in between.

Pays: always. The logits are made once.

Source: see ``memopt.kernels.weighted_rows``.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from memopt.emit import emit, extent, shape_of, traced
from memopt.graph import source_line
from memopt.kernels import cross_entropy_rows, divergence
from memopt.kernels.weighted_rows import CROSS_ENTROPY, DIVERGENCE, VALUES
from memopt.passes.coefficients import Coefficients, Writer, picks
from memopt.passes.heads import loosely, overwriter
from memopt.passes.linear_steps import (
    Transpose,
    factors_only,
    read_by_transpose,
    transpose_of,
)
from memopt.passes.steps import name_of
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_WEIGHTED: Mapping[Any, Any] = {
    cross_entropy_rows.ROWS: CROSS_ENTROPY,
    divergence.ROWS: DIVERGENCE,
}
# Readers that may as well read later.
_SHAPES = frozenset({"zeros_like", "ones_like", "detach", "size", "numel", "sym_size.int"})


@dataclass
class Region:
    """What lies between values by rows and the scalar.

    Attributes:
        scalar: the scalar.
        steps: each node's inputs in the region, with the transposes of the steps from them; the
            values come first and have none.
        weights: everything else that the steps read.
        picked: nodes that hold rows that a mask picked.
    """

    scalar: fx.Node
    steps: dict[fx.Node, dict[fx.Node, Transpose]] = field(default_factory=dict)
    weights: set[fx.Node] = field(default_factory=set)
    picked: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class WeighRows:
    """``sum(g * rows(x, w))`` -> values, and gradients that are there already."""

    name: ClassVar[str] = "weigh_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"losses_chunked"})
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        for node in [n for n in graph.nodes if n.target in _WEIGHTED]:
            values = _values(node)
            if not any(traced(v).requires_grad for v in values):
                continue
            reason = _weigh(graph, node, values)
            kind = RemarkKind.MISSED if reason else RemarkKind.APPLIED
            text = "the rows' weights are known before the loss: gradients in the forward"
            if reason:
                text = f"the logits are made again in the backward: {reason}"
            ctx.remark(self.name, kind, text, node.name, source_line(node))
            rewrites += not reason
        return rewrites


def _values(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold values, and log-sum-exps, of a loss by rows."""
    return [node] if node.target is divergence.ROWS else sorted(node.users)


def _weigh(graph: fx.Graph, node: fx.Node, values: list[fx.Node]) -> str:
    """Put the form with weights in the place of a loss by rows; the reason where it cannot be."""
    region = _region(values)
    if isinstance(region, str):
        return region
    late = _descendants(node)
    if not late.isdisjoint(region.weights):
        return "the weights depend on the values"  # (2)
    last = max([node, *region.weights])
    early = sorted(n for n in late if n < last)
    known = [n for n in early if n in region.steps or name_of(n) in _SHAPES]
    if reader := next((n for n in early if n not in known), None):
        return f"{reader.name} reads the values before the weights are known"  # (3)
    read = {*node.all_input_nodes, *region.weights}
    if writer := overwriter(read, node, region.scalar, besides=region.steps):
        return f"{writer.name} overwrites what the values or the weights are computed from"
    place = last.next
    for step in early:
        place.prepend(step)
    with graph.inserting_before(early[0] if early else place):
        _replace(graph, node, values, region)
    return ""


def _region(values: list[fx.Node]) -> Region | str:
    """What reads values and has a gradient, up to one scalar; or what is in the way. See (1)."""
    region = Region(values[0], {v: {} for v in values})
    scalars, todo = dict[fx.Node, None](), list(values)
    while todo:
        before = todo.pop()
        for user in _differentiable(before):
            step = transpose_of(user, before)
            picked = before in region.picked
            if step is None or (picked and not factors_only(user, before)):
                return f"{user.name} ({name_of(user)}) is not seen to be linear in {before.name}"
            new = user not in region.steps
            region.steps.setdefault(user, {})[before] = step
            region.weights.update(read_by_transpose(user, before))
            region.picked |= {user} if picked or picks(user) else set()
            if new and (shape_of(user) or _goes_on(user)):
                todo.append(user)
            elif new:
                scalars[user] = None
    if len(scalars) != 1:
        return f"{len(scalars)} scalars depend on the values"
    (region.scalar,) = scalars
    region.weights -= region.steps.keys()
    return region


def _replace(graph: fx.Graph, node: fx.Node, values: list[fx.Node], region: Region) -> None:
    """Write the weights, the operator, and the zero that brings the scalar its gradients."""
    like, dtype = values[0], traced(values[0]).dtype

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(graph, target, args, kwargs, like=like)

    def zeros() -> fx.Node:
        x: Any = node.args[0]
        return call("new_zeros", x, extent(graph, x, 0), dtype=dtype)

    inputs = {n: next(iter(steps), None) for n, steps in region.steps.items()}
    writer = Writer(graph, inputs, zeros, dtype, like)
    known: dict[fx.Node, Coefficients] = {region.scalar: 1.0}
    for n in sorted(region.steps, reverse=True):
        for before, transpose in region.steps[n].items():
            c = transpose(writer, known[n])
            known[before] = writer.scaled(known[before], c, operator.add) if before in known else c
    weights: list[Coefficients | None] = [0.0, None]  # of losses and of log-sum-exps
    for value in values:
        i = _position(value)
        if value in known:
            c, earlier = known[value], weights[i]
            weights[i] = writer.scaled(earlier, c, operator.add) if earlier else c
    own = [None if c is None else writer.tensor(c, values[0]) for c in weights]
    op = _WEIGHTED[node.target]
    result = call(op, *node.args, *(own if op is CROSS_ENTROPY else own[:1]))
    zero = call(operator.getitem, result, 0)
    for value in values:
        value.replace_all_uses_with(call(operator.getitem, result, VALUES + _position(value)))
    with graph.inserting_before(region.scalar.next):
        scalar = region.scalar
        if traced(scalar).dtype != dtype:
            zero = call("to", zero, traced(scalar).dtype)
        total = call(operator.add, scalar, zero)
    scalar.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    for dead in dict.fromkeys((*values, node)):
        graph.erase_node(dead)


def _position(value: fx.Node) -> int:
    """0 for values, 1 for log-sum-exps."""
    return int(loosely(value.args[1])) if value.target is operator.getitem else 0


def _differentiable(node: fx.Node) -> list[fx.Node]:
    """The readers of a node that gradients may come back from."""
    return [u for u in node.users if u.op == "output" or _has_gradient(u)]


def _has_gradient(node: fx.Node) -> bool:
    value = traced(node)
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return value is None or isinstance(value, (tuple, list))  # nobody knows


def _goes_on(scalar: fx.Node) -> bool:
    """Whether nothing is made of a scalar but its product with a constant.

    The factor is then one of the weights. That matters where it is infinite and no row counts.
    """
    users = _differentiable(scalar)
    if len(users) != 1 or not factors_only(users[0], scalar):
        return False
    return transpose_of(users[0], scalar) is not None


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, todo = set[fx.Node](), [node]
    while todo:
        new = [user for user in todo.pop().users if user not in found]
        found.update(new)
        todo += new
    return found
