"""The losses on logits that one row operator can serve, in the spellings of plain PyTorch."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.counting import is_arange
from memopt.passes.heads import Head, loosely, source_of
from memopt.passes.logits import Logits
from memopt.passes.steps import name_of

_ENTROPY = "input target weight size_average ignore_index reduce reduction label_smoothing"
NOTHING = -(2**62)  # an index that no target has


@dataclass(frozen=True)
class Loss:
    """One reader of logits that a row operator can serve.

    Attributes:
        node: the reader.
        logits: what it reads.
        kind: ``"cross_entropy"``, ``"log_sum_exp"``, ``"gather"``, ``"log_prob"``, or of all
            classes' log-probabilities ``"class_sum"`` or ``"class_mean"``.
        target: classes or distributions, or None.
        weight: of the classes, or None.
        reduction: of a cross-entropy.
        ignore_index: the class that does not count.
        label_smoothing: in ``[0, 1]``.
        wraps: whether negative classes count from the last.
    """

    node: fx.Node
    logits: Logits
    kind: str
    target: fx.Node | None = None
    weight: fx.Node | None = None
    reduction: str = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    wraps: bool = False

    @property
    def inputs(self) -> tuple[fx.Node | None, ...]:
        """What it reads besides the logits."""
        return self.target, self.weight, *self.logits.biases


def find_heads(graph: fx.Graph) -> list[Head]:
    """The linear layers whose product goes to something that may be a loss, in order."""
    starts = [
        arguments(node, "input").get("input")
        for node in graph.nodes
        if node.op in ("call_function", "call_method")
        and (node.target in _STARTS or _row_and_class(node) is not None)
    ]
    heads = [source_of(start) for start in starts if isinstance(start, fx.Node)]
    return list(dict.fromkeys(head for head in heads if head is not None))


def find_loss(reader: fx.Node, logits: Logits) -> Loss | None:
    """What a reader of logits computes, if it is one of the losses here."""
    return next((loss for rule in _RULES if (loss := rule(reader, logits))), None)


def why_not(reader: fx.Node, logits: Logits) -> str:
    """Why a reader of logits is no loss that can be served, or else what it is."""
    if reader.target not in (F.cross_entropy, F.nll_loss):
        return name_of(reader)
    a = arguments(reader, _ENTROPY)
    others = [n for n in (a.get("target"), a.get("weight")) if isinstance(n, fx.Node)]
    if logits.node in others:
        return "as its targets or weights"
    if any(traced(n).requires_grad for n in others):
        return "whose targets or weights have a gradient"
    if isinstance(a.get("label_smoothing"), fx.Node):
        return "whose label smoothing changes from call to call"
    if logits.detached and traced(reader).requires_grad:
        return "a part of what makes them has no gradient"
    return name_of(reader)


def arguments(node: fx.Node, names: str) -> dict[str, Any]:
    """Positional and keyword arguments by name."""
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _cross_entropy(node: fx.Node, logits: Logits) -> Loss | None:
    """Of logits, or of their log-softmax, which has the same."""
    if node.target is not F.cross_entropy:
        return None
    a = arguments(node, _ENTROPY)
    smoothing = a.get("label_smoothing", 0.0)
    return None if isinstance(smoothing, fx.Node) else _entropy(node, logits, a, float(smoothing))


def _nll(node: fx.Node, logits: Logits) -> Loss | None:
    if node.target not in (F.nll_loss,) or not logits.normalised:
        return None
    return _entropy(node, logits, arguments(node, _ENTROPY), 0.0)


def _entropy(node: fx.Node, logits: Logits, a: dict[str, Any], smoothing: float) -> Loss | None:
    target, weight = a.get("target"), a.get("weight")
    if logits.negated or (logits.detached and traced(node).requires_grad):
        return None
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
    a = arguments(node, "input dim keepdim")
    if set(a) - {"input", "dim", "keepdim"} or (logits.detached and traced(node).requires_grad):
        return None
    dim, rank = a.get("dim"), len(shape_of(logits.node))
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    last = isinstance(dim, int) and dim % rank == rank - 1 and logits.classes_at == -1
    return Loss(node, logits, "log_sum_exp") if last else None


def _class_sum(node: fx.Node, logits: Logits) -> Loss | None:
    """``log_p.sum(-1)`` and ``log_p.mean(-1)``, as label smoothing by hand has them."""
    kind = _CLASS_SUMS.get(node.target)
    if kind is None or not logits.normalised or logits.softcap or logits.classes_at != -1:
        return None
    a = arguments(node, "input dim keepdim")
    if set(a) - {"input", "dim", "keepdim", "dtype"}:
        return None
    if logits.detached and traced(node).requires_grad:
        return None
    dims, rank = a.get("dim"), len(shape_of(logits.node))
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    last = all(isinstance(d, int) and d % rank == rank - 1 for d in dims) and len(dims) == 1
    return Loss(node, logits, kind) if last else None


def _gather(node: fx.Node, logits: Logits) -> Loss | None:
    """``gather(z, -1, y[..., None])``, of logits or of log-probabilities."""
    if node.target in (torch.gather, "gather"):
        a = arguments(node, "input dim index")
    elif node.target in (torch.take_along_dim, "take_along_dim"):
        a = arguments(node, "input index dim")
        a["index"] = a.pop("indices", a.get("index"))
    else:
        return None
    if a.get("input") is not logits.node or set(a) - {"input", "dim", "index"}:
        return None
    if logits.detached and traced(node).requires_grad:
        return None
    dim, index, rank = a.get("dim"), a.get("index"), len(shape_of(logits.node))
    if not (isinstance(dim, int) and dim % rank == rank - 1 and isinstance(index, fx.Node)):
        return None
    rows = shape_of(logits.node)[:-1]
    if not same_shape(shape_of(index), (*rows, 1)) or logits.classes_at != -1:
        return None
    return Loss(
        node, logits, "log_prob" if logits.normalised else "gather", index, ignore_index=NOTHING
    )


def _indexed(node: fx.Node, logits: Logits) -> Loss | None:
    """``z[arange(N), y]``, of logits or of log-probabilities."""
    index = _row_and_class(node)
    if index is None or node.args[0] is not logits.node or logits.classes_at != -1:
        return None
    rows, target = index
    if logits.detached and traced(node).requires_grad:
        return None
    if not is_arange(rows, shape_of(logits.node)[0], node):
        return None
    kind = "log_prob" if logits.normalised else "gather"
    return Loss(node, logits, kind, target, ignore_index=NOTHING, wraps=True)


def _row_and_class(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The rows and the classes by which a node picks one entry of each row of a matrix."""
    if node.target is not operator.getitem:
        return None
    matrix, index = loosely(node.args)
    if len(shape_of(matrix)) != 2 or not isinstance(index, tuple) or len(index) != 2:
        return None
    rows, target = index
    if not (isinstance(rows, fx.Node) and isinstance(target, fx.Node)):
        return None
    alike = len(shape_of(target)) == 1 and same_shape(shape_of(rows), shape_of(target))
    return (rows, target) if alike and traced(target).dtype == torch.int64 else None


_RULES: tuple[Callable[[fx.Node, Logits], Loss | None], ...] = (
    _cross_entropy,
    _nll,
    _log_sum_exp,
    _class_sum,
    _gather,
    _indexed,
)
_CLASS_SUMS = {
    torch.sum: "class_sum",
    "sum": "class_sum",
    torch.mean: "class_mean",
    "mean": "class_mean",
}
_STARTS = frozenset(
    {F.cross_entropy, F.nll_loss, torch.gather, "gather", torch.logsumexp, "logsumexp"}
    | {torch.take_along_dim, "take_along_dim"}
)
