"""Compute losses on a head's logits by chunks of rows, so that the logits never exist.

The pass finds ``linear -> (factor, softcap, bias, cast, views) -> loss`` in whatever model it
stands and puts one operator in its place, which computes loss and gradients chunk by chunk. Logits
that the graph returns as well are returned as ``LazyLogits``, computed when they are used.

Pays: wherever the logits are large, which is every language model: forward and backward hold one
chunk of them, and eager's log-softmax, its gradient and the copies between are gone. Does not: in
a classifier with a few classes; there the pass leaves the graph alone.

Source: see ``memopt.kernels.linear_cross_entropy``; logits that exist on demand are memopt's own.
"""

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import size_hint
from memopt.emit import emit, extent, same_shape, shape_of, traced
from memopt.errors import ConfigError
from memopt.graph import source_line
from memopt.kernels.head import default_chunk_rows
from memopt.kernels.linear_cross_entropy import REDUCED, ROWS
from memopt.passes.logits import Head, Logits, follow, rows_of, source_of
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind
from memopt.returned import ReturnedLogits

MODES = ("lazy", "none", "keep", "full")
_MIN_CLASSES = 256
_NOTHING = -(2**62)  # an index that no target has


@dataclass(frozen=True)
class ChunkLosses:
    """``cross_entropy(linear(x, w), y)`` -> ``linear_cross_entropy(x, w, y)``.

    Attributes:
        logits: what becomes of logits that the graph returns: ``"lazy"`` computes them when they
            are used, ``"none"`` returns None, ``"keep"`` computes them once, without gradient,
            ``"full"`` leaves such graphs alone.
        chunk_rows: rows whose logits exist at a time; 0 to choose.
    """

    logits: str = "lazy"
    chunk_rows: int = 0

    name: ClassVar[str] = "chunk_losses"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset({"losses_chunked"})

    def __post_init__(self) -> None:
        if self.logits not in MODES:
            allowed = ", ".join(map(repr, MODES))
            raise ConfigError(f"chunk_losses: logits={self.logits!r}: allowed are {allowed}")
        if not isinstance(self.chunk_rows, int) or self.chunk_rows < 0:
            raise ConfigError(
                f"chunk_losses: chunk_rows={self.chunk_rows!r}: allowed is a number of rows, or 0 "
                f"to choose it"
            )

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        heads = dict.fromkeys(h for n in graph.nodes if _is_loss(n) for h in _heads_of(n))
        for head in heads:
            reason = self._rewrite(graph, head, ctx)
            if reason:
                source = source_line(head.node)
                ctx.remark(self.name, RemarkKind.MISSED, reason, head.node.name, source)
            else:
                rewrites += 1
        return rewrites

    def _rewrite(self, graph: fx.Graph, head: Head, ctx: PassContext) -> str:
        """Replace every reader of one head's logits; the reason where that cannot be done."""
        if isinstance(head.classes, int) and head.classes < _MIN_CLASSES:
            return f"{head.classes} classes: too few to pay"
        members, readers = follow(head)
        losses, returned = [], []
        for reader, logits in readers:
            if reader.op == "output":
                returned.append(logits)
                continue
            loss = next((found for rule in _LOSSES if (found := rule(reader, logits))), None)
            if loss is None:
                return f"the logits are also read by {reader.name} ({reader.target})"
            losses.append(loss)
        if not losses:
            return "no loss reads the logits"
        if reason := self._refusal(head, returned):
            return reason
        emitter = _Emitter(graph, head, self.chunk_rows)
        (output,) = graph.find_nodes(op="output")
        for loss in losses:
            emitter.replace(loss, alone=len(losses) == 1)
        for logits in dict.fromkeys(returned):
            self._return(graph, head, logits, emitter, output, ctx)
        for node in reversed([n for n in graph.nodes if n in members]):
            if not node.users:  # in-place ones too, which count as impure elsewhere
                graph.erase_node(node)
        count = f"{len(losses)} losses" if len(losses) > 1 else losses[0].node.name
        text = f"{count} by chunks of {emitter.chunk_rows} rows; {head.classes} classes each"
        if returned:
            text += f"; returned logits: {self.logits}"
        ctx.remark(
            self.name, RemarkKind.APPLIED, text, head.node.name, source_line(losses[0].node)
        )
        return ""

    def _refusal(self, head: Head, returned: list[Logits]) -> str:
        """Why logits that are returned cannot be given up."""
        if not returned or self.logits in ("none", "keep"):
            return ""
        if self.logits == "full":
            return "the logits are returned, and the option logits='full' keeps them whole"
        if any(r.normalised or r.classes_at != -1 for r in returned):
            return "the graph returns the logits normalised or transposed"
        sources = [head.weight, *{r.bias for r in returned if r.bias is not None}]
        if any(node.op != "placeholder" for node in sources) or head.transposed:
            return "the logits are returned, and their weight is computed in the graph"
        return ""

    def _return(
        self,
        graph: fx.Graph,
        head: Head,
        logits: Logits,
        emitter: "_Emitter",
        output: fx.Node,
        ctx: PassContext,
    ) -> None:
        """Put something else into the places where the output has these logits."""
        if self.logits == "keep":
            with graph.inserting_before(output):
                kept = emit(graph, "detach", (logits.node,), like=logits.node)
            output.replace_input_with(logits.node, kept)
            return
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        places = [i for i, node in enumerate(results) if node is logits.node]
        if self.logits == "none":
            changed = [None if i in places else node for i, node in enumerate(results)]
            output.args = (tuple(changed),)
            return
        with graph.inserting_before(output):
            hidden = rows_of(graph, head, logits, emitter.rows)
        output.replace_input_with(logits.node, hidden)
        inputs = graph.find_nodes(op="placeholder")
        ctx.wrappers.append(
            ReturnedLogits(
                places=tuple(places),
                weight=inputs.index(head.weight),
                bias=None if logits.bias is None else inputs.index(logits.bias),
                product_dtype=traced(head.node).dtype,
                dtype=logits.dtype,
                scale=logits.scale,
                softcap=logits.softcap,
                detached=logits.detached,
            ).wrap
        )


@dataclass(frozen=True)
class Loss:
    """One reader of logits that a row operator can serve.

    Attributes:
        node: the reader.
        logits: what it reads.
        kind: ``"cross_entropy"``, ``"log_sum_exp"``, ``"gather"`` or ``"log_prob"``.
        target: classes or distributions, or None.
        options: of the cross-entropy.
    """

    node: fx.Node
    logits: Logits
    kind: str
    target: fx.Node | None = None
    weight: fx.Node | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0


def _is_loss(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _STARTS


def _heads_of(node: fx.Node) -> Iterator[Head]:
    if node.args and isinstance(node.args[0], fx.Node):
        head = source_of(node.args[0])
        if head is not None:
            yield head


def _arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """Positional and keyword arguments by name."""
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _cross_entropy(node: fx.Node, logits: Logits) -> Loss | None:
    if node.target is not F.cross_entropy or logits.normalised:
        return None
    a = _arguments(
        node,
        "input target weight size_average ignore_index reduce reduction label_smoothing",
    )
    return _entropy(node, logits, a, float(a.get("label_smoothing", 0.0)))


def _nll(node: fx.Node, logits: Logits) -> Loss | None:
    if node.target not in (F.nll_loss,) or not logits.normalised:
        return None
    a = _arguments(node, "input target weight size_average ignore_index reduce reduction")
    return _entropy(node, logits, a, 0.0)


def _entropy(node: fx.Node, logits: Logits, a: dict[str, Any], smoothing: float) -> Loss | None:
    target, weight = a.get("target"), a.get("weight")
    if a.get("input") is not logits.node or not isinstance(target, fx.Node):
        return None
    if a.get("size_average") is not None or a.get("reduce") is not None:
        return None
    if any(isinstance(n, fx.Node) and traced(n).requires_grad for n in (target, weight)):
        return None
    rank = len(shape_of(logits.node))
    if (logits.classes_at == -1) != (rank == 2):
        return None
    ignored = a.get("ignore_index", -100)
    return Loss(
        node,
        logits,
        "cross_entropy",
        target,
        weight,
        a.get("reduction", "mean"),
        ignored,
        smoothing,
    )


def _log_sum_exp(node: fx.Node, logits: Logits) -> Loss | None:
    if node.target not in (torch.logsumexp, "logsumexp") or logits.normalised:
        return None
    a = _arguments(node, "input dim keepdim")
    dim, rank = a.get("dim"), len(shape_of(logits.node))
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    last = isinstance(dim, int) and dim % rank == rank - 1 and logits.classes_at == -1
    return Loss(node, logits, "log_sum_exp") if last else None


def _gather(node: fx.Node, logits: Logits) -> Loss | None:
    """``gather(z, -1, y[..., None])``, of logits or of log-probabilities."""
    if node.target not in (torch.gather, "gather") or node.args[:1] != (logits.node,):
        return None
    a = _arguments(node, "input dim index")
    dim, index, rank = a.get("dim"), a.get("index"), len(shape_of(logits.node))
    if not (isinstance(dim, int) and dim % rank == rank - 1 and isinstance(index, fx.Node)):
        return None
    rows = shape_of(logits.node)[:-1]
    if not same_shape(shape_of(index), (*rows, 1)) or logits.classes_at != -1:
        return None
    return Loss(
        node, logits, "log_prob" if logits.normalised else "gather", index, ignore_index=_NOTHING
    )


_LOSSES: tuple[Callable[[fx.Node, Logits], Loss | None], ...] = (
    _cross_entropy,
    _nll,
    _log_sum_exp,
    _gather,
)
_STARTS = frozenset(
    {F.cross_entropy, F.nll_loss, torch.gather, "gather", torch.logsumexp, "logsumexp"}
)


class _Emitter:
    """Writes the operators that take the place of one head's losses."""

    def __init__(self, graph: fx.Graph, head: Head, chunk_rows: int) -> None:
        self.graph, self.head = graph, head
        self.rows: dict[Any, fx.Node] = {}
        device = traced(head.node).device
        rows = math.prod(size_hint(size) for size in shape_of(head.node)[:-1])
        self.chunk_rows = chunk_rows or default_chunk_rows(rows, size_hint(head.classes), device)
        self._shared: dict[Any, fx.Node] = {}

    def replace(self, loss: Loss, *, alone: bool) -> None:
        """Put an operator in the loss's place."""
        node = loss.node
        self.like = node
        with self.graph.inserting_before(node):
            if loss.kind == "cross_entropy" and alone and loss.reduction != "none":
                mean = loss.reduction == "mean"
                result = self._item(self._op(REDUCED, loss, mean), 0)
            elif loss.kind == "cross_entropy":
                result = self._reduced(loss)
            elif loss.kind == "log_sum_exp":
                result = self._item(self._rows(loss), 1)
            else:
                result = self._picked(loss)
            result = self._as(result, loss)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _op(self, op: Any, loss: Loss, *more: Any) -> fx.Node:
        """Call a row operator on the loss's rows."""
        head, logits = self.head, loss.logits
        dtype = traced(head.node).dtype
        differentiable = traced(loss.node).requires_grad
        inputs = (head.hidden, head.weight, logits.bias)
        wanted = [
            differentiable and n is not None and bool(traced(n).requires_grad) for n in inputs
        ]
        width = extent(self.graph, head.hidden, -1)
        hidden = rows_of(self.graph, head, logits, self.rows)
        x = self._call("reshape", self._typed(hidden, dtype), -1, width)
        weight = self._typed(head.weight, dtype)
        if head.transposed:
            weight = self._call("t", weight)
        bias = None
        if logits.bias is not None:
            bias = self._call("reshape", self._typed(logits.bias, dtype), -1)
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
        return self._call("reshape", loss.target, -1)

    def _rows(self, loss: Loss) -> fx.Node:
        """The operator on rows; readers of the same rows and targets share it."""
        key = (loss.logits.path, loss.target, loss.weight, loss.ignore_index, loss.label_smoothing)
        if key not in self._shared:
            self._shared[key] = self._op(ROWS, loss)
        return self._shared[key]

    def _reduced(self, loss: Loss) -> fx.Node:
        values = self._item(self._rows(loss), 0)
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
        rows = self._rows(loss)
        values = self._call("neg", self._item(rows, 0))
        return (
            values if loss.kind == "log_prob" else self._call("add", values, self._item(rows, 1))
        )

    def _as(self, result: fx.Node, loss: Loss) -> fx.Node:
        """In the dtype and shape of what it replaces."""
        result = self._typed(result, traced(loss.node).dtype)
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
