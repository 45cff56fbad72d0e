"""Rotate queries and keys, or their gradients, in their own memory, where nothing else reads it.

Done in each half behind the partition, so that nothing before Inductor sees an operator that
writes to its inputs. An operator's queries and keys are overwritten where

(1) nothing else reads an element of them, later or earlier: Inductor may compute an earlier
    reader later. What lies beside them in a packed product may be read: only they are written;
(2) their memory is new in this half, in whatever lowering: no input, which may be saved, and no
    copy that is left out;
(3) the entries of a head lie side by side, and no two elements in one place;
(4) the results would lie in memory in the same way, or all that read them take them in any;
(5) what is saved or returned holds no more memory than it would.

Pays: queries and keys are in memory once and not twice; of a packed product whose values are
saved, to the end of the step. Costs nothing.

Source: memopt's own. One kernel that turns both in their own memory, whatever reads them, is Hsu
et al. (2024), "Liger Kernel", arXiv:2410.10989.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx

from memopt._torch import size_expr
from memopt.emit import same_shape
from memopt.graph import OpKind, aten, is_scatter, is_view, op_kind, packet_name, source_line
from memopt.kernels.norm import NORM
from memopt.kernels.rotary import ROTARY, ROTARY_IN_PLACE, fits_in_place
from memopt.passes.overwrite_hidden_states import is_arithmetic
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
_ATTENTION = "aten._scaled_dot_product_"
# What takes an input as it lies in memory, and views that every layout has.
_ANY_LAYOUT = frozenset("aten.clone aten.cat aten.sym_size".split())
_MOVES = frozenset(
    "aten.transpose aten.permute aten.expand aten.unsqueeze aten.slice aten.select".split()
)
_ENDLESS = 2**62  # elements, more than a storage has


@dataclass(frozen=True)
class OverwriteRotary:
    """``a, b = rotary(q, k, ...)`` -> ``rotary_(q, k, ...); a = q; b = k``."""

    name: ClassVar[str] = "overwrite_rotary"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        chosen = []
        for node in graph.find_nodes(op="call_function", target=ROTARY):
            parts = [part for part in _parts(node) if not _is_empty(part.given)]
            reasons = (_obstacle(part, fixed=ctx.config.lowering == "eager") for part in parts)
            if reason := next(filter(None, reasons), ""):
                ctx.remark(self.name, RemarkKind.MISSED, reason, node.name, source_line(node))
            else:
                chosen.append(node)
        for node in chosen:  # all are decided on the graph as it was
            text = "what is turned is overwritten"
            ctx.remark(self.name, RemarkKind.APPLIED, text, node.name, source_line(node))
            _replace(graph, node)
        return len(chosen)


class _Part(NamedTuple):
    """The queries or the keys of an operator.

    Attributes:
        node: the operator.
        given: what is turned.
        results: the nodes that take the result.
    """

    node: fx.Node
    given: fx.Node
    results: tuple[fx.Node, ...]


def _parts(node: fx.Node) -> Iterator[_Part]:
    for place, given in enumerate(node.args[:2]):
        assert isinstance(given, fx.Node)
        yield _Part(node, given, tuple(n for n in node.users if n.args[1] == place))


def _obstacle(part: _Part, *, fixed: bool) -> str:
    """Why a part may not be overwritten, if it may not.

    Args:
        part: which.
        fixed: whether the backward takes what is saved in the layout that was traced alone.
    """
    given = _value(part.given)
    if not fits_in_place(given):
        return f"{part.given.name} has entries apart, or two in one place"  # (3)
    bases = _bases(part.given)
    if not _is_new(bases[0]):
        return f"{part.given.name} is in the memory of an input or a copy: {bases[0].name}"  # (2)
    beside = []
    for value, reader in _reads(*bases):
        own = reader is part.node and value is part.given and reader.args.count(value) == 1
        if not own and not _are_apart(_value(value), given):
            return f"{part.given.name} is also read by {reader.name}"  # (1)
        beside += [] if own else [reader]
    kept = any(reader.op == "output" for _, reader in _reads(*part.results))
    moved = any(not same_shape(_value(n).stride(), given.stride()) for n in part.results)
    if moved and not (all(map(_takes_any_layout, part.results)) and not (kept and fixed)):
        return f"{part.given.name} has gaps, and what reads the result takes none"  # (4)
    nbytes = size_expr(given.numel() * given.element_size())
    alone = size_expr(given.untyped_storage().nbytes()) == nbytes
    if kept and not alone and not any(reader.op == "output" for reader in beside):
        return f"the result is kept, and {bases[0].name} would be with it"  # (5)
    return ""


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _is_empty(node: fx.Node) -> bool:
    return bool(size_expr(_value(node).numel()) == 0)


def _bases(node: fx.Node) -> list[fx.Node]:
    """What a value is a view of; the results of an operator with several are no views of it."""
    while is_view(node):
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and not is_view(source):
            return [n for n in source.users if n.args == node.args]
        node = source
    return [node]


def _is_new(base: fx.Node) -> bool:
    """Whether the node's result is sure to be a new storage in whatever lowering."""
    if is_arithmetic(base) or base.target in _PRODUCTS:
        return True
    if base.target is operator.getitem:
        source = base.all_input_nodes[0]
        attention = packet_name(source.target).startswith(_ATTENTION)
        return attention or source.target in (ROTARY, NORM)
    return op_kind(base) is OpKind.REDUCTION and not is_scatter(base)


def _reads(*values: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads elements of these values: through which of their views, and the reader."""
    for value in values:
        for user in value.users:
            if user.op == "call_function" and is_view(user):
                yield from _reads(user)
            elif op_kind(user) is not OpKind.SYMBOL:
                yield value, user


def _takes_any_layout(value: fx.Node) -> bool:
    """Whether all that read a value do the same whatever its strides are."""
    for user in value.users:
        name = packet_name(user.target)
        if name in _MOVES:
            if not _takes_any_layout(user):
                return False
        elif not (user.op == "output" or name in _ANY_LAYOUT or name.startswith(_ATTENTION)):
            return False
    return True


def _are_apart(one: Tensor, other: Tensor) -> bool:
    """Whether two views of one storage are sure to share no element.

    They are if, in rows of some width, they keep to columns of their own, as slices do.
    """
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    if 0 in (size_expr(one.numel()), size_expr(other.numel())):
        return True
    strides = map(size_expr, (*one.stride(), *other.stride()))
    widths = {stride for stride in strides if isinstance(stride, int) and stride} | {_ENDLESS}
    for width in widths:
        a, b = _columns(one, width), _columns(other, width)
        if a and b and (a.stop <= b.start or b.stop <= a.start):
            return True
    return False


def _columns(t: Tensor, width: int) -> range | None:
    """Between which columns of rows of some width a view lies; None where that is not known."""
    first = reach = size_expr(t.storage_offset()) % width
    for size, stride in zip(map(size_expr, t.shape), map(size_expr, t.stride()), strict=True):
        if stride % width != 0:
            reach += (size - 1) * stride
    known = isinstance(first, int) and isinstance(reach, int) and reach < width
    return range(first, reach + 1) if known else None


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """Put the operator in place that writes to its inputs."""
    with graph.inserting_before(node):
        changed = graph.call_function(ROTARY_IN_PLACE, node.args)
    changed.meta.update(node.meta, val=None)
    for part in _parts(node):
        for result in part.results:
            result.replace_all_uses_with(part.given)
            graph.erase_node(result)
        _settle(part.given)
    graph.erase_node(node)


def _settle(value: fx.Node) -> None:
    """Let the views of a value say whose memory they are in: AOTAutograd goes by that."""
    for user in value.users:
        if user.op == "call_function" and is_view(user):
            args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: n.meta["val"])
            target: Any = user.target
            user.meta["val"] = target(*args, **kwargs)
            _settle(user)
