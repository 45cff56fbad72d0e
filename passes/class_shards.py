"""Heads of which each rank holds the weight of some classes, by DTensor's ``ColwiseParallel``.

A rank runs the losses by rows on its own classes: of each row, their log-sum-exp, and the logit of
the target where it is among them. One gather of these two numbers per row gives every rank what a
loss by rows of all classes would have. Neither a row's logits of all classes nor, but for a chunk,
those of the rank exist. The gradient of the hidden states is a sum over ranks, as it was before.

Whether this is done must depend on nothing that differs between ranks: they meet at the gather.

Source: the vocabulary-parallel cross-entropy of Megatron-LM (Shoeybi et al., 2019,
arXiv:1909.08053), which has the logits of a rank in memory and takes three reductions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import DTensor, Partial, Replicate, Shard
from memopt.emit import emit, shape_of, traced
from memopt.passes.heads import Head
from memopt.passes.row_losses import NOTHING, Loss
from memopt.passes.steps import FACTORS

Call = Callable[..., fx.Node]
_SERVED = frozenset({"cross_entropy", "log_sum_exp", "gather", "log_prob"})


@dataclass(frozen=True)
class ClassShards:
    """The classes of a head over the ranks of a mesh with one dimension.

    Attributes:
        whole: the head, of distributed tensors.
        first: the first class of this rank.
        count: how many classes this rank has.
        classes: how many there are.
    """

    whole: Head
    first: int
    count: int
    classes: int

    def why_not(self, losses: Iterable[Loss]) -> str:
        """Why losses cannot be computed of shards; the same on each rank."""
        for loss in losses:
            others = [traced(n) for n in (loss.node, loss.target, loss.weight) if n is not None]
            classes = loss.target is None or not traced(loss.target).is_floating_point()
            if loss.kind not in _SERVED or loss.label_smoothing or not classes:
                return "the head is distributed, and a loss reads more than its targets' logits"
            if any(step.target in FACTORS for step in loss.logits.path):
                return "the head is distributed, and a factor of its logits is a tensor"
            if loss.logits.biases != (() if self.whole.bias is None else (self.whole.bias,)):
                return "the head is distributed, and something is added to its logits"
            if any(isinstance(t, DTensor) and not _replicated(t) for t in others):
                return "the head is distributed, and so are the rows of its loss"
        return ""

    def local(self, graph: fx.Graph) -> Head:
        """The head of the rank's own classes; the graph is positioned."""
        head, like = self.whole, self.whole.node
        sums = {"grad_placements": (Partial(),)}
        hidden = emit(graph, "to_local", (head.hidden,), sums, like=like)
        weight = emit(graph, "to_local", (head.weight,), like=like)
        bias = head.bias and emit(graph, "to_local", (head.bias,), like=like)
        rows = emit(graph, "t", (weight,), like=like) if head.transposed else weight
        product = emit(graph, F.linear, (hidden, rows, bias), like=like)
        return replace(head, node=product, hidden=hidden, weight=weight, bias=bias, classes_at=-1)

    def local_loss(self, graph: fx.Graph, loss: Loss, own: Head) -> Loss:
        """A loss with tensors of this rank as what it reads; the graph is positioned."""
        target, weight = (
            emit(graph, "to_local", (n,), like=loss.node) if n and is_distributed(n) else n
            for n in (loss.target, loss.weight)
        )
        biases = () if own.bias is None else (own.bias,)
        logits = replace(loss.logits, biases=biases)
        return replace(loss, target=target, weight=weight, logits=logits)

    def own_targets(self, call: Call, target: fx.Node, ignored: int) -> tuple[fx.Node, fx.Node]:
        """Targets by the rank's own numbers, ``NOTHING`` where they are not here; and where so.

        What is no class at all stays outside of the rank's classes, for its operator to refuse.

        Args:
            call: inserts a node.
            target: classes, `(N,)`, int64.
            ignored: the class that does not count.
        """
        own = call("sub", target, self.first)
        here = call("eq", call("clamp", own, 0, self.count - 1), own)
        known = call("eq", call("clamp", target, 0, self.classes - 1), target)
        elsewhere = call("logical_or", call("ne", known, here), call("eq", target, ignored))
        return call("masked_fill", own, elsewhere, NOTHING), elsewhere

    def joined(
        self, call: Call, values: fx.Node, lse: fx.Node, elsewhere: fx.Node | None
    ) -> tuple[fx.Node, fx.Node]:
        """Cross-entropies and log-sum-exps of all classes.

        Args:
            call: inserts a node.
            values: cross-entropies of the rank's own classes, `(N,)`.
            lse: log-sum-exps of them.
            elsewhere: where the target is not among them; None without targets.
        """
        picked = call("sub", lse, values)
        if elsewhere is not None:
            picked = call("masked_fill", picked, elsewhere, 0.0)
        own = call("unsqueeze", call(torch.stack, (lse, picked)), 0)
        shards = call(DTensor.from_local, own, self._mesh(call), (Shard(0),), run_check=False)
        everyones = call("to_local", call("redistribute", shards, placements=(Replicate(),)))
        total = call("logsumexp", call("select", everyones, 1, 0), 0)
        logit = call("sum", call("select", everyones, 1, 1), 0)
        return call("sub", total, logit), total

    def shared(self, call: Call, result: fx.Node) -> fx.Node:
        """A tensor that every rank has, as a distributed one."""
        return call(DTensor.from_local, result, self._mesh(call), (Replicate(),), run_check=False)

    def _mesh(self, call: Call) -> fx.Node:
        return call(getattr, self.whole.weight, "device_mesh")


def is_distributed(node: fx.Node) -> bool:
    """Whether a node's value is a distributed tensor."""
    return isinstance(traced(node), DTensor)


def class_shards(head: Head) -> ClassShards | None:
    """How the classes of a head are shared out; None where they are not, or in another way."""
    given = [traced(n) for n in (head.hidden, head.weight, head.bias) if n is not None]
    if not all(isinstance(t, DTensor) for t in (*given, traced(head.node))):
        return None
    hidden, weight, *bias = given
    rows, classes = (1 if head.transposed else 0), head.classes
    sharded = _sharded(weight, rows) and all(_sharded(b, 0) for b in bias)
    if not sharded or not _replicated(hidden) or not isinstance(classes, int):
        return None
    mesh, rank = weight.device_mesh, len(shape_of(head.node))
    size = -(-classes // mesh.size())
    everywhere = size * (mesh.size() - 1) < classes  # no rank is without classes
    if not everywhere or not _sharded(traced(head.node), head.classes_at % rank):
        return None
    first = mesh.get_local_rank() * size
    return ClassShards(head, first, min(size, classes - first), classes)


def _sharded(tensor: Any, dim: int) -> bool:
    """Whether a distributed tensor is cut along one dimension, over ranks in one row."""
    (placement, *more) = tensor.placements
    return not more and type(placement) is Shard and placement.dim == dim


def _replicated(tensor: Any) -> bool:
    """Whether every rank has all of a distributed tensor."""
    return all(placement.is_replicate() for placement in tensor.placements)
