"""Run what of the backward needs nothing later right after what it needs.

A loss that is a sum of several, as of micro-batches that one step goes through or of blocks with
losses of their own, has a backward in parts, and each part reads one of them only. Autograd runs
all parts after the whole forward, so what all of them read is alive at once. But gradients are
linear in the gradient of the loss: with 1 in its place a part can run as soon as what it reads is
there, and what it returns is multiplied by the loss's gradient later. Sums of such gradients are
put together as they come. The planner then holds gradients, which are as large as weights,
instead of activations.

Runs where the options name it. Pays: the activations of all parts but one. Does not: one
multiplication for each gradient. Exact where the loss's gradient is 1 or a power of two, and where
one part's gradients are not added to another's; else off by the rounding of one product, and of
sums in another order.

Source: blocks whose gradients are isolated are those of local learning: Ma et al. (2024),
"Scaling Supervised Local Learning with Augmented Auxiliary Networks", arXiv:2402.17318.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt._torch import pytree
from memopt.graph import (
    OpKind,
    aten,
    backward_nodes,
    is_recomputable,
    op_kind,
    prims,
    tensors,
)
from memopt.passes.joint_nodes import call
from memopt.passes.linear_nodes import is_linear
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


@dataclass(frozen=True)
class EarlyBackward:
    """``dw1 = x1.t() @ (t * d1); ...`` -> ``u = x1.t() @ d1`` after ``x1``; ``dw1 = u * t``."""

    name: ClassVar[str] = "early_backward"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    default: ClassVar[bool] = False

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if not ctx.config.enabled(self.name, default=self.default):
            return 0
        parts = _Parts(graph)
        for node in graph.nodes:
            parts.consider(node)
        calls = sum(op_kind(node) is OpKind.EXTERN for node in parts.ready)
        if not calls:
            text = "left alone: all of the backward needs the end of the forward"
            ctx.remark(self.name, RemarkKind.MISSED, text)
            return 0
        _Move(graph, parts).run()
        text = f"{calls} library calls of the backward may run amid the forward"
        ctx.remark(self.name, RemarkKind.APPLIED, text)
        return calls


_ANYWHERE = -1  # the place of what needs nothing of the forward


class _Parts:
    """What of a joint graph's backward may run before the forward has ended.

    Args:
        graph: the joint graph.

    Attributes:
        nodes: of the graph.
        losses: the incoming gradients that are one number each.
        loss: for each node that may run early, whose gradient it is a multiple of.
        ready: the place behind which it may run; never the last, where it gains nothing.
        place: behind which anything else is there, or may be: autograd takes views and
            derivatives of the forward's values amid the backward.
        sums: the last addition of each sum of gradients, with what is added up, in order.
        inside: the other additions.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.late = backward_nodes(graph)
        self.losses = [n for n in self.nodes if n.op == "placeholder" and self._is_loss(n)]
        self.loss = {loss: loss for loss in self.losses}
        self.ready: dict[fx.Node, int] = {}
        self.place: dict[fx.Node, int] = {}
        self.turn = min((self.order[n] for n in self.late if n.op == "call_function"), default=0)
        additions = {n for n in self.nodes if _is_sum(n) and self.late.issuperset(n.args)}
        inside = {n for n in additions if len(n.users) == 1 and additions.issuperset(n.users)}
        self.sums = {n: _terms(n, inside) for n in additions - inside}
        self.inside = inside
        work = (n for n in self.nodes[: self.turn] if op_kind(n) is OpKind.EXTERN)
        self._end = max((self.order[n] for n in work), default=_ANYWHERE)

    def _is_loss(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        number = isinstance(value, torch.Tensor) and value.dim() == 0
        return number and node in self.late and not _is_half(node)

    def consider(self, node: fx.Node) -> None:
        """Note when a node may run; what it reads has been considered."""
        if node not in self.late:
            self.place[node] = self._place(node)
        if node not in self.late or node.op != "call_function" or node in self.inside:
            return
        read = self.sums.get(node) or [n for n in node.all_input_nodes if n in self.late]
        losses = {self.loss.get(n) for n in read}
        (loss,) = losses if len(losses) == 1 else (None,)
        if loss is None or not (node in self.sums or is_linear(node, read)) or _is_half(node):
            return
        places = [self.place[n] for n in node.all_input_nodes if n not in self.late]
        ready = max([*places, *(self.ready.get(n, _ANYWHERE) for n in read)], default=_ANYWHERE)
        if ready < self._end:
            self.loss[node], self.ready[node] = loss, ready

    def moves(self, node: fx.Node) -> bool:
        """Whether a node has a place amid the forward."""
        return self.ready.get(node, _ANYWHERE) > _ANYWHERE

    def _place(self, node: fx.Node) -> int:
        if self.order[node] < self.turn or not is_recomputable(node):
            return self.order[node]
        return max((self.place[n] for n in node.all_input_nodes), default=_ANYWHERE)


class _Move:
    """Puts what may run early where it may, and multiplies what the rest reads.

    Args:
        graph: the joint graph; changed by ``run``.
        parts: what may run early.
    """

    def __init__(self, graph: fx.Graph, parts: _Parts) -> None:
        self._graph, self._parts = graph, parts
        self._early: dict[fx.Node, fx.Node] = {}
        self._scaled: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[fx.Node, int], fx.Node] = {}
        self._totals: dict[fx.Node, fx.Node] = {}  # by the sum that they take the place of
        self._behind: dict[int, fx.Node] = {}  # the last node at a place

    def run(self) -> None:
        """Rewrite the graph; what is no longer read stays."""
        parts = self._parts
        for loss in parts.losses:
            self._early[loss] = self._one(loss)
        for node in parts.nodes:
            if node in parts.sums:
                self._add_up(node)
            elif parts.moves(node):
                self._early[node] = self._at(parts.ready[node], node, node.args)
            elif node not in parts.inside:
                for read in filter(parts.moves, node.all_input_nodes):
                    node.replace_input_with(read, self._multiple(self._early[read], read, node))

    def _one(self, loss: fx.Node) -> fx.Node:
        """In place of a loss's gradient."""
        value: Any = loss.meta["val"]
        first = next(n for n in self._parts.nodes if n.op != "placeholder")
        with self._graph.inserting_before(first):
            one = self._graph.call_function(
                aten.full.default, ([], 1), {"dtype": value.dtype, "device": value.device}
            )
        one.meta["val"] = torch.ones_like(value)
        self._behind[_ANYWHERE] = one
        return one

    def _at(self, place: int, like: fx.Node, args: Any) -> fx.Node:
        """A copy behind a place of the graph, and behind what was put there."""
        parts = self._parts
        if place != _ANYWHERE and parts.nodes[place].op == "placeholder":
            place = _ANYWHERE
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda n: self._there(n, place), (args, like.kwargs)
        )
        with self._graph.inserting_after(self._behind.get(place, parts.nodes[place])):
            copy = call(self._graph, like.target, *args, like=like, **kwargs)
        copy.meta.pop("partitioner_tag", None)
        self._behind[place] = copy
        return copy

    def _there(self, node: fx.Node, place: int) -> fx.Node:
        """What stands for a node where something at a place reads it."""
        parts = self._parts
        if node in self._early or node not in parts.order:
            return self._early.get(node, node)
        if node in parts.ready:  # a constant times the loss's gradient: made where it is read
            if (node, place) not in self._made:
                self._made[node, place] = self._at(place, node, node.args)
            return self._made[node, place]
        if parts.place[node] < parts.order[node]:
            self._early[node] = self._at(parts.place[node], node, node.args)
        return self._early.get(node, node)

    def _multiple(self, early: fx.Node, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The gradient that something late reads in the place of ``node``."""
        if early not in self._scaled:
            with self._graph.inserting_before(reader):
                loss, dtype = self._parts.loss[node], node.meta["val"].dtype
                product = call(self._graph, aten.mul.Tensor, early, loss, like=node)
                if product.meta["val"].dtype != dtype:
                    convert = prims.convert_element_type.default
                    product = call(self._graph, convert, product, dtype, like=node)
            self._scaled[early] = product
        return self._scaled[early]

    def _add_up(self, root: fx.Node) -> None:
        """Add what comes early as it comes, by loss, and the rest to that."""
        parts = self._parts
        late = [term for term in parts.sums[root] if not parts.moves(term)]
        rest = [self._totals.get(term, term) for term in late]
        own: dict[fx.Node, list[fx.Node]] = {}
        for term in sorted(
            filter(parts.moves, parts.sums[root]),
            key=lambda n: (parts.ready[n], parts.order[n]),
        ):
            own.setdefault(parts.loss[term], []).append(term)
        for terms in own.values():
            total = self._early[terms[0]]
            for term in terms[1:]:
                total = self._at(parts.ready[term], root, (total, term))
            if parts.moves(root):
                self._early[root] = total
                return
            rest.append(self._multiple(total, terms[0], root))
        if own:
            total = rest[0]
            for term in rest[1:]:
                with self._graph.inserting_before(root):
                    total = call(self._graph, root.target, total, term, like=root)
            root.replace_all_uses_with(total)
            self._totals[root] = total


def _is_half(node: fx.Node) -> bool:
    """Whether a value is so narrow that losses are scaled for it: 1 could be too little."""
    return any(value.dtype == torch.float16 for value in tensors(node.meta.get("val")))


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two values of one shape."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    shapes = [n.meta["val"].shape if isinstance(n, fx.Node) else None for n in node.args]
    return bool(shapes[0] == shapes[1] == node.meta["val"].shape)


def _terms(root: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """What a sum adds up, in order."""
    terms: list[fx.Node] = []
    stack: list[Any] = [root]
    while stack:
        term = stack.pop()
        if term is root or term in inside:
            stack.extend(reversed(term.args))
        else:
            terms.append(term)
    return terms
