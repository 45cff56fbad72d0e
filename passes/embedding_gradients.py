"""Make the gradient of an embedding without a second tensor of the weight's size.

(1) A low-precision weight: Inductor adds its gradient up in float32 and converts it; one operator
adds up the rows that occur. (2) A weight that is used elsewhere too, such as a tied head: its
other gradient is added to afterwards; the rows are added to that gradient instead, which Inductor
does in place. (3) A low-precision weight with another gradient: the same, and rows are added up in
float32. Each token then writes its whole row, so that several write the same numbers.

Pays: (1) four bytes and (2) the item size per entry of the weight, at the peak of many steps.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from memopt._torch import pytree
from memopt.graph import aten, prims
from memopt.kernels.embedding_gradient import EMBEDDING_GRADIENT, EMBEDDING_ROWS
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_SCATTER = aten._unsafe_masked_index_put_accumulate.default


@dataclass(frozen=True)
class EmbeddingGradients:
    """``scatter(zeros, i, v)`` -> rows that occur, or straight onto the other gradient."""

    name: ClassVar[str] = "embedding_gradients"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        scatters = [n for n in graph.find_nodes(op="call_function", target=_SCATTER) if _plain(n)]
        return sum(_narrow(n, graph, ctx) or _onto(n, graph, ctx) for n in scatters)


def _plain(node: fx.Node) -> bool:
    """Rows scattered over zeros, read once."""
    arguments: Any = node.args
    base, _, indices, values = arguments
    zeros = base.target is aten.full.default and base.args[1] == 0
    rank = values.meta["val"].dim() - 1
    one = isinstance(indices, (list, tuple)) and len(indices) == 1
    return zeros and one and indices[0].meta["val"].dim() == rank and len(node.users) == 1


def _narrow(node: fx.Node, graph: fx.Graph, ctx: PassContext) -> int:
    """Clause (1)."""
    (user,) = node.users
    arguments: Any = node.args
    _, mask, (index,), values = arguments
    if user.target is not prims.convert_element_type.default:
        return 0
    dtype = user.meta["val"].dtype
    source = values.args[0] if values.target is prims.convert_element_type.default else None
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != dtype:
        return 0
    if dtype not in (torch.bfloat16, torch.float16) or values.meta["val"].dtype != torch.float32:
        return 0
    if total := _total(user):
        _replace_rows(total, user, (index, mask, source), graph, ctx)
        return 1
    with graph.inserting_before(user):
        args = (index, mask, source, node.meta["val"].shape[0])
        gradient = graph.call_function(EMBEDDING_GRADIENT, args)
    gradient.meta.update(user.meta)
    user.replace_all_uses_with(gradient)
    _tell(user, "its float32 sums are kept for rows that occur alone", ctx)
    return 1


def _onto(node: fx.Node, graph: fx.Graph, ctx: PassContext) -> int:
    """Clause (2)."""
    user = _total(node)
    if user is None:
        return 0
    other = _other(user, node)
    with graph.inserting_before(user):
        total = graph.call_function(_SCATTER, (other, *node.args[1:]))
    total.meta.update(user.meta)
    user.replace_all_uses_with(total)
    _tell(user, "its rows are added to the weight's other gradient", ctx)
    return 1


def _replace_rows(
    total: fx.Node, own: fx.Node, tokens: tuple[fx.Node, ...], graph: fx.Graph, ctx: PassContext
) -> None:
    """Clause (3): ``total`` is the sum of ``own``, made from ``tokens``, and another gradient."""
    other = _other(total, own)
    index, mask, values = tokens

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        seen = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], args)
        made.meta.update(total.meta, val=target(*seen))
        return made

    with graph.inserting_before(total):
        place = call(aten.remainder.Scalar, index, total.meta["val"].shape[0])
        rows = call(aten.index.Tensor, other, [place])
        rows = call(EMBEDDING_ROWS, rows, place, mask, values)
        result = call(aten.index_put.default, other, [place], rows)
    total.replace_all_uses_with(result)
    _tell(total, "its rows are added to the weight's other gradient, in float32", ctx)


def _total(node: fx.Node) -> fx.Node | None:
    """The plain sum that alone reads the node, with a gradient that nothing else reads."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target is not aten.add.Tensor or user.kwargs or len(set(user.all_input_nodes)) != 2:
        return None
    value, own = user.meta["val"], _other(user, node).meta["val"]
    alone = len(_other(user, node).users) == 1
    return user if alone and own.dtype == value.dtype and own.shape == value.shape else None


def _other(total: fx.Node, node: fx.Node) -> fx.Node:
    (other,) = (n for n in total.all_input_nodes if n is not node)
    return other


def _tell(node: fx.Node, text: str, ctx: PassContext) -> None:
    ctx.remark("embedding_gradients", RemarkKind.APPLIED, text, node.name)
