"""The tables of a rotary embedding: how they are broadcast, and half of them where that is all.

Models make a table of ``R`` entries from ``R / 2`` angles, each of them twice: one half behind the
other, or side by side. Where a graph shows that, the same steps are taken of the angles alone, to
the same bits, and the operator reads half as much for each position. What is left of the longer
table is dead.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, same_shape, shape_of
from memopt.passes.halves import joined, side_by_side
from memopt.passes.heads import loosely, overwriter
from memopt.passes.patterns import (
    PRODUCTS,
    QUOTIENTS,
    Either,
    Literal,
    Match,
    Pattern,
    Value,
    Where,
    call,
)
from memopt.passes.row_losses import arguments
from memopt.passes.steps import cast_of

_POINTWISE = PRODUCTS | QUOTIENTS
_POINTWISE |= {torch.cos, "cos", torch.sin, "sin", operator.neg, torch.neg, "neg"}
_UNSQUEEZES = frozenset({torch.unsqueeze, "unsqueeze"})
_WHOLE = (None, Ellipsis, slice(None))


def order(x: fx.Node, table: fx.Node) -> str:
    """Which comes first in ``x``, heads or positions, by what a table is broadcast over."""
    shape, own = shape_of(x), shape_of(table)
    if len(shape) not in (3, 4) or not 1 < len(own) <= len(shape):
        return ""
    batch, one, two, _ = (1,) * (4 - len(shape)) + shape
    rows, by_one, by_two, _ = (1,) * (4 - len(own)) + own
    if not any(same_shape((rows,), (size,)) for size in (1, batch)):
        return ""
    if same_shape((by_one, by_two), (1, two)):
        return "heads"
    return "positions" if same_shape((by_one, by_two), (one, 1)) else ""


def rows(table: fx.Node, first: str) -> tuple[Any, ...]:
    """The index that makes `(1 or B, S, W)` of a table."""
    everything = slice(None)
    by_rank = {
        ("heads", 4): (everything, 0),
        ("heads", 3): (everything,),
        ("heads", 2): (None,),
        ("positions", 4): (everything, everything, 0),
        ("positions", 3): (None, everything, 0),
    }
    return by_rank[first, len(shape_of(table))]


def once(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
) -> fx.Node:
    """A call that may stand in the graph already, before another node."""
    source = next(a for a in args if isinstance(a, fx.Node))
    wanted = target, args, dict(kwargs or {})
    for user in source.users:
        same = user < like and (user.target, user.args, user.kwargs) == wanted
        if same and overwriter([user], user, like) is None:
            return user
    return emit(graph, *wanted, like=like)


def halved(
    graph: fx.Graph, tables: tuple[fx.Node, fx.Node], *, interleaved: bool, like: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Each angle of both tables once, if their nodes show that each is there twice.

    Args:
        graph: the graph, positioned before ``like``.
        tables: cosines and sines, `(..., R)`.
        interleaved: whether the two are side by side, and not half a table apart.
        like: the node that the operator takes the place of.

    Returns:
        `(..., R / 2)` of both; the tables themselves where that is not shown.
    """
    cos, sin = (_half(graph, table, interleaved, like) for table in tables)
    return tables if cos is None or sin is None else (cos, sin)


def _half(graph: fx.Graph, table: fx.Node, interleaved: bool, like: fx.Node) -> fx.Node | None:
    steps, node = list[fx.Node](), table
    while (angles := _doubled(node, interleaved)) is None:
        inner = _input_of(node)
        if inner is None:
            return None
        steps.append(node)
        node = inner
    if overwriter([angles, node, *steps], angles, like):
        return None
    for step in reversed(steps):
        args, kwargs = _given(step, {node: angles})
        node, angles = step, once(graph, step.target, args, kwargs, like=like)
    return angles


def _given(step: fx.Node, others: Mapping[fx.Node, fx.Node]) -> Any:
    """The arguments of a node, with others in the place of some."""
    return fx.map_arg((step.args, step.kwargs), lambda n: others.get(n, n))


def _doubled(node: fx.Node, interleaved: bool) -> fx.Node | None:
    """What a node puts beside itself; nothing is rounded on the way."""
    for match in _TWICE[interleaved].find(node, Match()):
        if not match.casts and all(cast_of(inner) is None for inner in match.inner):
            source: fx.Node = match.bound["angles"]
            return source
    return None


def _input_of(node: fx.Node) -> fx.Node | None:
    """The input whose entries become those of a row, each in its place and all in the same way."""
    source = cast_of(node)
    if source is None:
        items = loosely(node.args[1:])
        index = items[0] if items and isinstance(items[0], tuple) else items
        inserts = node.target is operator.getitem and all(i in _WHOLE for i in index)
        if not inserts and node.target not in _POINTWISE | _UNSQUEEZES:
            return None
        wide = [n for n in node.all_input_nodes if shape_of(n)[-1:] not in ((), (1,))]
        source = wide[0] if len(wide) == 1 else None
    kept = source is not None and same_shape(shape_of(source)[-1:], shape_of(node)[-1:])
    return source if kept else None


def _is_tiled(node: fx.Node) -> bool:
    """``x.repeat(1, 1, 2)``."""
    sizes = loosely(node.args[1:])
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return tuple(sizes) == (*(1,) * (len(shape_of(node)) - 1), 2)


def _is_repeated(node: fx.Node) -> bool:
    """``x.repeat_interleave(2, -1)``."""
    dim, rank = arguments(node, "input repeats dim").get("dim"), len(shape_of(node))
    return isinstance(dim, int) and dim % rank == rank - 1


def _twice() -> dict[bool, Pattern]:
    """Spellings of a tensor beside itself along the last dimension, by whether entry by entry."""
    angles = Value("angles")
    tiled = call(frozenset({"repeat", "tile", torch.tile}), "input", _is_tiled, input=angles)
    repeated = call(
        frozenset({"repeat_interleave", torch.repeat_interleave}),
        "input repeats dim",
        _is_repeated,
        input=angles,
        repeats=Literal(2),
        dim=Where(lambda dim: True),
    )
    return {
        False: Either((joined(angles, angles), tiled)),
        True: Either((side_by_side(angles, angles), repeated)),
    }


_TWICE = _twice()
