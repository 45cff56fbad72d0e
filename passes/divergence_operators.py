"""Writes the operators that take the place of divergences."""

import operator
from dataclasses import replace
from typing import Any

from torch import fx

from memopt.emit import constant, emit, extent, shape_of, traced
from memopt.kernels.divergence import REDUCED, ROWS
from memopt.passes.distributions import at_hand, is_at_hand
from memopt.passes.divergences import Divergence
from memopt.passes.logits import RESHAPES, Logits, follow, rows_of
from memopt.passes.row_operators import RowOperators
from memopt.passes.row_sums import Replay
from memopt.passes.terms import Softmax


def left_whole(teacher: Softmax) -> Softmax:
    """A head's distribution as that of its logits, which exist whole."""
    base = teacher.logits.node
    taken = len(follow(teacher.head)[0][base].path)
    logits = Logits(base, path=teacher.logits.path[taken:])
    return replace(teacher, head=at_hand(base), logits=logits)


def write_divergence(
    graph: fx.Graph, divergence: Divergence, teacher: Softmax, chunk_rows: int, *, alone: bool
) -> None:
    """Replace what a divergence comes to in the end; its own nodes are left without readers.

    Args:
        graph: the graph.
        divergence: the divergence.
        teacher: its teacher, or that ``left_whole``.
        chunk_rows: rows whose logits exist at a time.
        alone: whether nothing else reads the student's logits.
    """
    writer = _Writer(graph, divergence, teacher, chunk_rows)
    with graph.inserting_before(divergence.node):
        if divergence.result is not None and alone:
            reduction, size = writer.whole_size()
            value = writer.call(operator.getitem, writer.operator(REDUCED, reduction), 0)
        elif divergence.result is not None:
            rows = writer.operator(ROWS)
            value, size = writer.call("sum", rows), writer.row_size()
        else:
            column = writer.scaled(writer.column())
            classes = writer.classes()
    if divergence.result is None:
        Replay(graph, divergence.node, column).run(divergence.tail, classes)
        return
    with graph.inserting_before(divergence.result):
        for count in size:
            value = writer.call(operator.truediv, value, count)
        value = writer.typed(writer.scaled(value), traced(divergence.result).dtype)
    divergence.result.replace_all_uses_with(value)


class _Writer:
    """Writes one divergence's nodes, all like its own."""

    def __init__(
        self, graph: fx.Graph, divergence: Divergence, teacher: Softmax, chunk_rows: int
    ) -> None:
        self.graph, self.divergence, self.teacher = graph, divergence, teacher
        self.student = RowOperators(graph, divergence.student.head, chunk_rows)
        self.fixed = RowOperators(graph, teacher.head, chunk_rows)
        self.student.like = self.fixed.like = divergence.node

    def operator(self, op: Any, *more: Any) -> fx.Node:
        """Call an operator on the student's rows and the teacher's."""
        own, logits = self.divergence, self.divergence.student.logits
        trained = bool(traced(own.node).requires_grad)
        student = self.student.inputs(logits, trained=trained)
        fixed: tuple[fx.Node, fx.Node | None, fx.Node | None]
        if is_at_hand(self.teacher.head):
            fixed = self._logits_at_hand(), None, None
        else:
            fixed = self.fixed.inputs(self.teacher.logits, trained=False)
        wanted = [n is not None and bool(traced(n).requires_grad) for n in student]
        scale = [logits.scale, self.teacher.logits.scale]
        softcap = [logits.softcap, self.teacher.logits.softcap]
        return self.call(
            op, *student, *fixed, None, -100, own.beta, own.cross,
            scale, softcap, self.student.chunk_rows, wanted, *more,
        )  # fmt: skip

    def _logits_at_hand(self) -> fx.Node:
        """The teacher's, in the order of the rows; a view where the steps to them are views."""
        logits, path = self.teacher.logits, self.teacher.logits.path
        while path and path[-1].target in RESHAPES:
            path = path[:-1]
        x = rows_of(self.graph, self.teacher.head, replace(logits, path=path), self.fixed.rows)
        return constant(self.graph, x, like=self.divergence.node)

    def column(self) -> fx.Node:
        """Divergences of rows in the shape of the elementwise values, with one class."""
        values = self.operator(ROWS)
        rows = self.call("select", self._hidden(), -1, 0)
        return self.call("unsqueeze", self.call("view_as", values, rows), -1)

    def whole_size(self) -> tuple[str, list[Any]]:
        """The operator's own reduction that serves, and what is left to divide by."""
        hidden, reduction = self._hidden(), self.divergence.reduction
        if reduction == "batchmean" and len(shape_of(hidden)) != 2:
            return "sum", [extent(self.graph, hidden, 0)]
        return {"rowmean": "batchmean"}.get(reduction, reduction), []

    def row_size(self) -> list[Any]:
        """What the sum over rows is to be divided by."""
        hidden, reduction = self._hidden(), self.divergence.reduction
        if reduction == "batchmean":
            return [extent(self.graph, hidden, 0)]
        if reduction == "sum":
            return []
        sizes = [extent(self.graph, hidden, d) for d in range(len(shape_of(hidden)) - 1)]
        if reduction == "mean":
            sizes.append(self.classes())
        return sizes

    def classes(self) -> Any:
        """How many there are, read off the weight: the product is to go."""
        head = self.divergence.student.head
        return extent(self.graph, head.weight, 1 if head.transposed else 0)

    def scaled(self, value: fx.Node) -> fx.Node:
        factor = self.divergence.factor
        return value if factor == 1.0 else self.call(operator.mul, value, factor)

    def typed(self, value: fx.Node, dtype: Any) -> fx.Node:
        return value if traced(value).dtype == dtype else self.call("to", value, dtype)

    def call(self, target: Any, *args: Any) -> fx.Node:
        return emit(self.graph, target, args, like=self.divergence.node)

    def _hidden(self) -> fx.Node:
        """The student's hidden states in the shape of the logits that are compared."""
        own = self.divergence.student
        return rows_of(self.graph, own.head, own.logits, self.student.rows)
