"""Which rows of its inputs an operator on maps needs for some of its own, and what makes those."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memopt._torch import OpOverload
from memopt.graph import aten, prims
from memopt.passes.joint_nodes import call
from memopt.passes.map_attention import ATTENTIONS, of_attention
from memopt.passes.map_reads import (
    Given,
    Read,
    Rows,
    Rule,
    again,
    narrowed,
    same,
    shape_of,
    source_of,
)
from memopt.passes.map_windows import of_convolution, of_gather, of_pool

_COPIES = (aten.clone.default, aten._to_copy.default, prims.convert_element_type.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_GATHERS = (aten.index.Tensor, aten._unsafe_index.Tensor)
REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.var_mean.correction,
    aten.var.correction,
)
_SUMS = (aten.addmm.default, aten.baddbmm.default)
_ACROSS = (
    aten.glu.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
)
_ONES = (aten.select.int, aten.squeeze.dim, aten.unbind.int)


def rule_of(node: fx.Node, dims: Mapping[fx.Node, int], along: int) -> Rule | None:
    """How to compute a node by rows; None where it needs its inputs whole.

    Args:
        node: of a graph of functional operators.
        dims: the dimension of the rows of each value before it that is computed by rows.
        along: the dimension of the rows of a convolution's result.
    """
    target: Any = node.target
    if node.op != "call_function" or not isinstance(shape_of(node), torch.Size):
        return None
    if target is aten.convolution.default:
        return of_convolution(node, dims, along)
    if dims.keys().isdisjoint(node.all_input_nodes):
        return None
    return _RULES.get(target, _of_loop)(node, dims)


def _of_loop(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Each entry is of entries in the same place."""
    target: Any = node.target
    tags = target.tags if isinstance(target, OpOverload) else ()
    if not (torch.Tag.pointwise in tags or target in _COPIES):
        return None
    if torch.Tag.nondeterministic_seeded in tags or not isinstance(node.meta["val"], torch.Tensor):
        return None
    shape = node.meta["val"].shape
    own = {n: len(shape) - len(shape_of(n) or ()) for n in node.all_input_nodes}
    places = {dims[n] + own[n] for n in node.all_input_nodes if n in dims}
    if len(places) != 1:
        return None
    (dim,) = places
    reads = []
    for source in node.all_input_nodes:
        theirs, at = shape_of(source) or (), dim - own[source]
        if 0 <= at < len(theirs) and theirs[at] == shape[dim] != 1:
            reads.append(Read(source, at, same))
        elif source in dims:
            return None
    return Rule(dim, tuple(reads), again(node))


def _of_concatenation(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Of maps, along another dimension than that of the rows."""
    parts: Any = node.args[0]
    across: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    places = {dims[part] for part in parts if part in dims}
    if len(places) != 1 or across % node.meta["val"].dim() in places:
        return None
    (dim,) = places
    return Rule(dim, tuple(Read(p, dim, same) for p in dict.fromkeys(parts)), again(node))


def _of_permutation(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule:
    source, order = source_of(node), _argument(node, "dims")
    dim = [d % len(order) for d in order].index(dims[source])
    return Rule(dim, (Read(source, dims[source], same),), again(node))


def _of_reduction(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Over other dimensions than that of the rows."""
    source = source_of(node)
    rank, own, named = source.meta["val"].dim(), dims[source], node.args[1:2]
    if not named or not isinstance(named[0], Sequence) or not named[0]:
        return None
    over = {int(d) % rank for d in named[0]}  # type: ignore[arg-type]
    if own in over:
        return None
    kept = len(shape_of(node) or ()) == rank
    dim = own if kept else own - sum(d < own for d in over)
    return Rule(dim, (Read(source, own, same),), again(node))


def _of_view(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """A row stays a row, becomes several, or is one of several that become one."""
    source = source_of(node)
    before, after, own = source.meta["val"].shape, node.meta["val"].shape, dims[source]
    ahead = before[:own].numel()
    places = [d for d, n in enumerate(after) if n != 1 and after[:d].numel() == ahead]
    if not places or before[own] == 1:
        return None
    dim = places[0]
    many, few = after[dim] // before[own], before[own] // after[dim]  # rows of one, for one
    if many * before[own] != after[dim] and few * after[dim] != before[own]:
        return None

    def window(a: int, b: int) -> tuple[int, int]:
        return (a // many, -(-b // many)) if many else (a * few, b * few)

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece = given[source]
        first, last = rows.start, rows.end
        if many:
            first, last = piece.start * many, piece.end * many
        shape = [*after[:dim], last - first, *after[dim + 1 :]]
        made = call(graph, aten.reshape.default, piece.node, shape, like=node)
        return narrowed(graph, Rows(made, first, last), dim, rows.start, rows.end).node

    return Rule(dim, (Read(source, own, window),), make)


def _across(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Parts of every row: `glu`, `slice`, `split`."""
    source, dim = source_of(node), dims[source_of(node)]
    if _named_dim(node) == dim:
        return None
    return Rule(dim, (Read(source, dim, same),), again(node))


def _of_one(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """An entry of every row, in a dimension that goes: `select`, `squeeze`, `unbind`."""
    source, dim = source_of(node), dims[source_of(node)]
    gone = _named_dim(node)
    if gone == dim:
        return None
    less = source.meta["val"].dim() - len(shape_of(node) or ())  # 0 for a squeeze of more than one
    return Rule(dim - less * (gone < dim), (Read(source, dim, same),), again(node))


def _of_dimension(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule:
    """The same entries, with a dimension of one more."""
    source, dim = source_of(node), dims[source_of(node)]
    more = _argument(node, "dim") % node.meta["val"].dim() <= dim
    return Rule(dim + more, (Read(source, dim, same),), again(node))


def _named_dim(node: fx.Node) -> int:
    """The dimension that an operator goes along, of its first argument's."""
    rank: int = source_of(node).meta["val"].dim()
    return int(_argument(node, "dim")) % rank


def _argument(node: fx.Node, name: str) -> Any:
    """An argument, whether it is given by its place, by its name or not at all."""
    target = node.target
    assert isinstance(target, OpOverload)
    given: dict[str, Any] = {a.name: a.default_value for a in target._schema.arguments}
    given.update(zip(given, node.args, strict=False), **node.kwargs)
    return given[name]


def _of_expansion(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule:
    """The same entries, some of them several times."""
    source, shape = source_of(node), node.meta["val"].shape
    own = dims[source]
    dim = own + len(shape) - source.meta["val"].dim()

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        sizes = [*shape[:dim], rows.end - rows.start, *shape[dim + 1 :]]
        return call(graph, aten.expand.default, given[source].node, sizes, like=node)

    return Rule(dim, (Read(source, own, same),), make)


def _of_product(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """Rows of the first factor, last but one, and all of the second; or products of a batch."""
    arguments: tuple[Any, ...] = node.args
    *addend, first, second = arguments[:3] if node.target in _SUMS else arguments
    dim = node.meta["val"].dim() - 2
    batch = [dims.get(factor, 0) for factor in (first, second)]
    if node.target is aten.bmm.default and batch == [0, 0] and first is not second:
        reads = Read(first, 0, same), Read(second, 0, same)
        return Rule(0, reads, again(node))
    if dims.get(first) != dim or first is second or any(a in dims for a in addend):
        return None
    if any(_rows_from_right(a) != 1 for a in addend):
        return None
    return Rule(dim, (Read(first, dim, same),), again(node))


def _rows_from_right(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[-2]) if len(shape) > 1 else 1


def _of_part(node: fx.Node, dims: Mapping[fx.Node, int]) -> Rule | None:
    """One of several results, all with the same rows."""
    source, dim = source_of(node), dims[source_of(node)]

    def make(graph: fx.Graph, rows: Rows, given: Given) -> fx.Node:
        piece = given[source]
        part = call(graph, operator.getitem, piece.node, node.args[1], like=node)
        whole = Rows(part, piece.start, piece.end)
        return narrowed(graph, whole, dim, rows.start, rows.end).node

    return Rule(dim, (Read(source, dim, same),), make)


_RULES: dict[Any, Callable[[fx.Node, Mapping[fx.Node, int]], Rule | None]] = {
    **dict.fromkeys(VIEWS, _of_view),
    **dict.fromkeys(_GATHERS, of_gather),
    **dict.fromkeys(REDUCTIONS, _of_reduction),
    **dict.fromkeys(_ACROSS, _across),
    **dict.fromkeys(_ONES, _of_one),
    **dict.fromkeys((*_SUMS, aten.mm.default, aten.bmm.default), _of_product),
    **dict.fromkeys(ATTENTIONS, of_attention),
    aten.cat.default: _of_concatenation,
    aten.permute.default: _of_permutation,
    prims._low_memory_max_pool_with_offsets.default: of_pool,
    aten.expand.default: _of_expansion,
    aten.unsqueeze.default: _of_dimension,
    operator.getitem: _of_part,
}
