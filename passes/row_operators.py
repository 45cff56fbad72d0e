"""Writes the row operators that take the place of a head's losses."""

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from memopt._torch import size_hint
from memopt.emit import constant, emit, extent, shape_of, traced
from memopt.kernels.blocks import default_chunk_rows
from memopt.kernels.choice import Size, fastest_chunk_rows
from memopt.kernels.chunks import has_row_kernel
from memopt.kernels.cross_entropy_rows import ROWS
from memopt.kernels.linear_cross_entropy import REDUCED
from memopt.kernels.rows import IndexTargets
from memopt.passes.class_shards import ClassShards, is_distributed
from memopt.passes.heads import Head
from memopt.passes.logits import Logits, rows_of
from memopt.passes.row_losses import NOTHING, Loss
from memopt.passes.steps import is_one


class RowOperators:
    """One head's operators; losses on the same rows and targets share one.

    Attributes:
        rows: the hidden state along the paths that were taken so far.
        chunk_rows: rows whose logits exist at a time.
        like: the node whose place is taken.
        reduced: the operator that reduces the one loss there is, or None.
    """

    def __init__(
        self, graph: fx.Graph, head: Head, chunk_rows: int, shards: ClassShards | None = None
    ) -> None:
        self.graph, self.head, self._shards = graph, head, shards
        self.rows: dict[Any, fx.Node] = {}
        self._asked = chunk_rows
        self.chunk_rows = chunk_rows or self._default()
        self._shared: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.like = head.node
        self.reduced: fx.Node | None = None

    def replace_all(self, losses: list[Loss], *, alone: bool) -> None:
        """Put operators in the places of all losses, which are in the order of the graph.

        Args:
            losses: the losses.
            alone: whether nothing else reads the logits than one loss.
        """
        if self._shards is not None:
            losses = self._of_this_rank(self._shards, losses)
        if not self._asked:
            self.chunk_rows = self._fastest(losses)
        for loss in losses:
            self._replace(loss, losses, alone=alone)

    def _of_this_rank(self, shards: ClassShards, losses: list[Loss]) -> list[Loss]:
        """The losses of the rank's own classes, with a head of its own."""
        with self.graph.inserting_before(losses[0].node):
            self.head = shards.local(self.graph)
        local = []
        for loss in losses:
            with self.graph.inserting_before(loss.node):
                local.append(shards.local_loss(self.graph, loss, self.head))
        return local

    def _default(self) -> int:
        z = traced(self.head.node)
        return default_chunk_rows(self._rows_of_head(), size_hint(self.head.classes), z.device)

    def _rows_of_head(self) -> int:
        return math.prod(size_hint(size) for size in shape_of(self.head.hidden)[:-1])

    def _fastest(self, losses: list[Loss]) -> int:
        """Rows of a chunk, or 0 where it is faster to have no logits in memory at all."""
        z, head = traced(self.head.node), self.head
        targets = [traced(loss.target) for loss in losses if loss.target is not None]
        soft = any(target.is_floating_point() for target in targets)
        if soft or not has_row_kernel(IndexTargets, z):
            return self._default()
        width, classes = size_hint(shape_of(head.hidden)[-1]), size_hint(head.classes)
        return fastest_chunk_rows(Size(self._rows_of_head(), width, classes, z.dtype, z.device))

    def _replace(self, loss: Loss, losses: list[Loss], *, alone: bool) -> None:
        node = loss.node
        self.like = node
        with self.graph.inserting_before(node):
            if self._reduces(loss) and alone:
                mean = loss.reduction == "mean"
                self.reduced = self._op(REDUCED, loss, mean)
                result = self._item(self.reduced, 0)
            elif loss.kind == "cross_entropy":
                result = self._reduced(loss)
            elif loss.kind == "log_sum_exp":
                _, result = self._rows(_with_target(loss, losses))
            elif loss.target is None:
                result = self._summed(loss, losses)
            else:
                result = self._picked(loss)
            result = self._as(result, loss)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def inputs(self, logits: Logits, *, trained: bool) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """Hidden states `(N, H)` in the order of some logits' rows, weight and bias.

        Args:
            logits: how they come from the head.
            trained: whether gradients are to flow back through them.
        """
        head, dtype = self.head, traced(self.head.node).dtype
        x = self._call(
            "reshape",
            self._typed(rows_of(self.graph, head, logits, self.rows), dtype),
            -1,
            extent(self.graph, head.hidden, -1),
        )
        weight = self._typed(head.weight, dtype)
        if head.transposed:
            weight = self._call("t", weight)
        bias = self._bias(logits.biases, dtype)
        if not trained:
            x, weight = (constant(self.graph, node, like=self.like) for node in (x, weight))
            bias = bias and constant(self.graph, bias, like=self.like)
        return x, weight, bias

    def _bias(self, biases: tuple[fx.Node, ...], dtype: torch.dtype) -> fx.Node | None:
        """The sum of all biases, `(V,)`."""
        total = None
        for node in biases:
            bias = self._call("reshape", self._typed(node, dtype), -1)
            total = bias if total is None else self._call("add", total, bias)
        if total is None or not all(map(is_one, biases)):
            return total
        at = 1 if self.head.transposed else 0
        return self._call("expand", total, extent(self.graph, self.head.weight, at))

    def _op(self, op: Any, loss: Loss, *more: Any) -> fx.Node:
        """Call a row operator on the loss's rows."""
        logits = loss.logits
        x, weight, bias = self.inputs(logits, trained=bool(traced(loss.node).requires_grad))
        wanted = [n is not None and bool(traced(n).requires_grad) for n in (x, weight, bias)]
        target = self._target(loss, x)
        return self._call(
            op, x, weight, bias, target, loss.weight, loss.ignore_index, loss.label_smoothing,
            logits.scale, logits.softcap, self.chunk_rows, wanted, *more,
        )  # fmt: skip

    def _target(self, loss: Loss, x: fx.Node) -> fx.Node:
        if loss.target is None:
            rows = extent(self.graph, x, 0)
            return self._call("new_zeros", x, rows, dtype=torch.int64)
        if traced(loss.target).is_floating_point():
            target = loss.target
            if loss.logits.classes_at == 1:
                target = self._call("movedim", target, 1, -1)
            classes = extent(self.graph, target, -1)
            return self._call("reshape", target, -1, classes)
        target = self._call("reshape", loss.target, -1)
        if not loss.wraps:
            return target
        last = self._call("add", target, self._classes())
        return self._call(torch.where, self._call("lt", target, 0), last, target)

    def _classes(self) -> int | fx.Node:
        """``V``, of all ranks."""
        if self._shards is not None:
            return self._shards.classes
        return extent(self.graph, self.head.weight, 1 if self.head.transposed else 0)

    def _reduces(self, loss: Loss) -> bool:
        """Whether an operator may reduce a loss: of classes that one rank has."""
        whole = self._shards is None and loss.kind == "cross_entropy"
        return whole and loss.reduction != "none"

    def _rows(self, loss: Loss) -> tuple[fx.Node, fx.Node]:
        """Values and log-sum-exps by rows; readers of the same rows and targets share them."""
        options = loss.weight, loss.ignore_index, loss.label_smoothing
        differentiable = bool(traced(loss.node).requires_grad)
        key = loss.logits.values, loss.target, loss.wraps, options, differentiable
        if key not in self._shared:
            whole = self._shards is None
            self._shared[key] = self._pair(loss) if whole else self._of_shards(loss)
        return self._shared[key]

    def _pair(self, loss: Loss) -> tuple[fx.Node, fx.Node]:
        rows = self._op(ROWS, loss)
        return self._item(rows, 0), self._item(rows, 1)

    def _of_shards(self, loss: Loss) -> tuple[fx.Node, fx.Node]:
        """Values and log-sum-exps of all classes, of which this rank has some."""
        shards = self._shards
        assert shards is not None
        if loss.target is None:
            return shards.joined(self._call, *self._pair(loss), None)
        target = self._typed(self._target(loss, self.head.hidden), torch.int64)
        own, elsewhere = shards.own_targets(self._call, target, loss.ignore_index)
        part = replace(loss, target=own, weight=None, ignore_index=NOTHING, wraps=False)
        values, lse = shards.joined(self._call, *self._pair(part), elsewhere)
        ignored = self._call("eq", target, loss.ignore_index)
        if loss.weight is not None:
            known = self._call("masked_fill", target, ignored, 0)
            weights = self._call("index_select", loss.weight, 0, known)
            values = self._call("mul", values, weights)
        return self._call("masked_fill", values, ignored, 0.0), lse

    def _reduced(self, loss: Loss) -> fx.Node:
        values, _ = self._rows(loss)
        if loss.reduction == "none":
            return values
        total = self._call("sum", values)
        if loss.reduction == "sum":
            return total
        assert loss.target is not None
        if traced(loss.target).is_floating_point():
            return self._call("div", total, extent(self.graph, values, 0))
        target = self._target(loss, values)
        valid = self._call("ne", target, loss.ignore_index)
        if loss.weight is None:
            return self._call("div", total, self._call("sum", valid))
        known = self._call("mul", target, valid)
        weights = self._call("index_select", loss.weight, 0, known)
        return self._call("div", total, self._call("sum", self._call("mul", weights, valid)))

    def _picked(self, loss: Loss) -> fx.Node:
        """Log-probabilities of the targets, or their logits."""
        values, lse = self._rows(loss)
        if not loss.logits.negated:
            values = self._call("neg", values)
        return values if loss.kind == "log_prob" else self._call("add", values, lse)

    def _summed(self, loss: Loss, losses: list[Loss]) -> fx.Node:
        """Log-probabilities of all classes: ``sum(z) - V * lse``.

        The sum of a row's logits is a product with the sum of the weight's rows, `(H,)`.
        """
        _, lse = self._rows(_with_target(loss, losses))
        wide = traced(lse).dtype
        trained = bool(traced(loss.node).requires_grad)
        x, weight, bias = self.inputs(loss.logits, trained=trained)
        classes = extent(self.graph, weight, 0)
        column = self._call("sum", weight, 0, dtype=wide)
        # Not a matrix product, which autocast would round.
        total = self._call("sum", self._call("mul", self._typed(x, wide), column), -1)
        if bias is not None:
            total = self._call("add", total, self._call("sum", bias, dtype=wide))
        if loss.logits.scale != 1.0:
            total = self._call("mul", total, loss.logits.scale)
        total = self._call("sub", total, self._call("mul", lse, classes))
        if loss.kind == "class_mean":
            total = self._call("div", total, classes)
        return self._call("neg", total) if loss.logits.negated else total

    def _as(self, result: fx.Node, loss: Loss) -> fx.Node:
        """In the dtype and shape of what it replaces."""
        result = self._shaped(self._typed(result, traced(loss.node).dtype), loss)
        if self._shards is not None and is_distributed(loss.node):
            return self._shards.shared(self._call, result)
        return result

    def _shaped(self, result: fx.Node, loss: Loss) -> fx.Node:
        if not shape_of(result) or len(shape_of(loss.node)) == 1:
            return result
        if loss.target is not None:
            rows = loss.target
            if loss.kind == "cross_entropy" and traced(rows).is_floating_point():
                rows = self._call("select", rows, 1, 0)
            return self._call("view_as", result, rows)
        rows = self._call("select", rows_of(self.graph, self.head, loss.logits, self.rows), -1, 0)
        result = self._call("view_as", result, rows)
        kept = len(shape_of(loss.node)) > len(shape_of(rows))
        return self._call("unsqueeze", result, -1) if kept else result

    def _typed(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if traced(node).dtype == dtype else self._call("to", node, dtype)

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self._call(operator.getitem, node, index)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, target, args, kwargs, like=self.like)


def _with_target(loss: Loss, losses: list[Loss]) -> Loss:
    """A log-sum-exp with the target of a loss on the same rows, so that they share an operator."""
    for other in losses:
        known = other.target is not None and other.target < loss.node
        alike = other.logits.values == loss.logits.values
        alike = alike and traced(other.node).requires_grad == traced(loss.node).requires_grad
        if known and alike:
            return replace(other, node=loss.node)
    return loss
