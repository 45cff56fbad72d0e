"""Put one operator in the place of a rotary embedding, and one for queries and keys together.

The patterns are those of one tensor, whose heads and positions are told apart by the tables'
shape. Two operators that turn tensors of the same positions by the same tables become one
afterwards. Whatever is rounded on the way, the operator computes in float32 and rounds once.

Pays: on a GPU; see ``memopt.kernels.rotary``. Does not: on the CPU, where the pass leaves the
graph alone unless it is told otherwise.

Source: see ``memopt.kernels.rotary``.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from memopt.emit import emit, same_shape, shape_of, traced
from memopt.kernels.rotary import ROTARY
from memopt.passes.arithmetic import Product, Sum, difference, negated
from memopt.passes.fusing import (
    Family,
    Found,
    FusePass,
    Rule,
    Written,
    as_result,
    as_wide,
    converts,
)
from memopt.passes.halves import EVEN, FIRST, ODD, SECOND, HalfOf, PartOf
from memopt.passes.heads import loosely
from memopt.passes.logits import RESHAPES
from memopt.passes.patterns import (
    Call,
    Items,
    Pattern,
    Value,
    Where,
    call,
)
from memopt.passes.rotary_pairs import pair_up
from memopt.passes.row_losses import arguments
from memopt.pipeline import PassContext

_CATS = frozenset({torch.cat, torch.concat, torch.concatenate})
_STACKS = frozenset({torch.stack})
_FLATTENS = RESHAPES | {torch.flatten, "flatten", torch.reshape}
_REALS = frozenset({torch.view_as_real})

_ANY = Where(lambda value: True)
_COS, _SIN = Value("cos"), Value("sin")
_FLATTEN = "input start_dim end_dim"
_DIMS: dict[str, Pattern] = {"start_dim": _ANY, "end_dim": _ANY}


def _along_last(node: fx.Node) -> bool:
    """Whether tensors are put together along the last dimension of the result."""
    dim, rank = arguments(node, "tensors dim").get("dim", 0), len(shape_of(node))
    return isinstance(dim, int) and dim % rank == rank - 1


def _merges_last(node: fx.Node) -> bool:
    """Whether the last two dimensions become one."""
    before, after = shape_of(loosely(node.args[0])), shape_of(node)
    if len(before) != len(after) + 1 or not all(isinstance(n, int) for n in before[-2:]):
        return False
    return same_shape(after, (*before[:-2], before[-2] * before[-1]))


def _splits_last(node: fx.Node) -> bool:
    """Whether the last dimension becomes pairs of neighbours."""
    before, after = shape_of(loosely(node.args[0])), shape_of(node)
    pairs = after[-1:] == (2,) and len(after) == len(before) + 1
    return pairs and same_shape(after[:-2], before[:-1])


def _is_complex(node: fx.Node) -> bool:
    return bool(traced(node).is_complex())


def _complex(x: Pattern) -> Pattern:
    """Each pair of neighbours as one number."""
    pairs = call(RESHAPES | {torch.reshape}, "input", _splits_last, input=x)
    return call(frozenset({torch.view_as_complex}), "input", input=pairs)


def _put_together(targets: frozenset[Any], *patterns: Pattern) -> Call:
    return call(targets, "tensors dim", _along_last, tensors=Items(patterns), dim=_ANY)


def _halves(first: Pattern, second: Pattern) -> Pattern:
    """One behind the other."""
    return _put_together(_CATS, first, second)


def _pairs(first: Pattern, second: Pattern) -> Pattern:
    """Entry by entry, side by side."""
    together = _put_together(_STACKS, first, second)
    return call(_FLATTENS, _FLATTEN, _merges_last, input=together, **_DIMS)


def _turned(x: Pattern, *, interleaved: bool, back: bool = False) -> Pattern:
    """``x * cos + rotate(x) * sin``; ``back`` is the other way round."""
    kinds = (EVEN, ODD) if interleaved else (FIRST, SECOND)
    a, b = (HalfOf(x, kind) for kind in kinds)
    join = _pairs if interleaved else _halves
    rotated = join(b, negated(a)) if back else join(negated(b), a)
    return Sum(Product((x, _COS)), Product((rotated, _SIN)))


def _by_halves(
    x: Pattern, kinds: tuple[str, str], join: Callable[[Pattern, Pattern], Pattern]
) -> Pattern:
    """Both halves of the result, each from both halves of ``x``."""
    a, b = (HalfOf(x, kind) for kind in kinds)
    first = difference(Product((a, _COS)), Product((b, _SIN)))
    return join(first, Sum(Product((b, _COS)), Product((a, _SIN))))


def _order(x: fx.Node, table: fx.Node) -> str:
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


def _tables(found: Found) -> tuple[fx.Node, fx.Node]:
    """Cosines and sines, or twice the complex numbers that hold both."""
    angles = found["angles"]
    return (found["cos"], found["sin"]) if angles is None else (angles, angles)


def _width(found: Found) -> int:
    """``R``."""
    taken = found["taken"]
    return int(shape_of(found["x"])[-1] if taken is None else len(taken))


def _guard(found: Found) -> str:
    """Why the operator does not compute what was found, or ``""``."""
    x, (cos, sin) = found["x"], _tables(found)
    size = shape_of(x)[-1] if shape_of(x) else None
    if not isinstance(size, int) or not same_shape(shape_of(found.last), shape_of(x)):
        return "the result has another shape than what is turned"
    width, taken, rest = _width(found), found["taken"], found["rest"]
    if taken is not None and (taken != range(width) or rest != range(width, size)):
        return "what is turned is not the beginning of a head, with the rest behind it"
    if not same_shape(shape_of(cos), shape_of(sin)) or not _order(x, cos):
        return (
            f"tables of {_sizes(cos)} and {_sizes(sin)} are not one row for each position of "
            f"{_sizes(x)}"
        )
    if shape_of(cos)[-1] not in (width, width // 2):
        return f"tables have {shape_of(cos)[-1]} entries for {width}"
    if any(traced(n).requires_grad for n in (cos, sin)):
        return "the tables have a gradient"
    return f"{traced(x).dtype} becomes {found.dtype}" if converts(found, x) else ""


def _sizes(node: fx.Node) -> str:
    return "x".join(map(str, shape_of(node)))


def _write(
    graph: fx.Graph, found: Found, *, interleaved: bool = False, back: bool = False
) -> Written:
    """The operator for one tensor, and no keys beside it."""
    last, x = found.last, found["x"]
    tables = _tables(found)
    first = _order(x, tables[0])

    def call(target: Any, *args: Any) -> fx.Node:
        return _once(graph, target, args, last)

    cos, sin = (call(operator.getitem, t, _rows(t, first)) for t in tables)
    if found["angles"] is not None:
        both = call(torch.view_as_real, cos)
        cos, sin = (call(operator.getitem, both, (Ellipsis, place)) for place in (0, 1))
    if back:
        sin = call(operator.neg, sin)
    heads, flat = as_wide(found, x), len(shape_of(x)) == 3
    heads = call("unsqueeze", heads, 0) if flat else heads
    heads = call("transpose", heads, 1, 2) if first == "positions" else heads
    nothing = call(operator.getitem, heads, (slice(None), slice(0, 0)))
    args = heads, nothing, cos, sin, _width(found), interleaved, False
    result = emit(graph, operator.getitem, (emit(graph, ROTARY, args, like=last), 0), like=last)
    if first == "positions":
        result = emit(graph, "transpose", (result, 1, 2), like=last)
    if flat:
        result = emit(graph, "squeeze", (result, 0), like=last)
    return Written("one operator", {last: as_result(found, result)})


def _rows(table: fx.Node, first: str) -> tuple[Any, ...]:
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


def _once(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call that may stand in the graph already, before another node."""
    node: fx.Node = args[0]
    for user in node.users:
        if user.target == target and user.args == args and not user.kwargs and user < like:
            return user
    return emit(graph, target, args, like=like)


def _rules() -> Iterator[Rule]:
    whole = Value("x")
    part = PartOf(whole, "taken")
    for form, x in ((" of a part", part), ("", whole)):

        def rule(name: str, pattern: Pattern, why: str, form: str = form, **options: bool) -> Rule:
            if form:
                pattern = _halves(pattern, PartOf(whole, "rest"))
            return Rule(
                f"{name}{form}",
                pattern,
                why,
                _guard,
                lambda graph, found: _write(graph, found, **options),
            )

        yield rule("rotary", _turned(x, interleaved=False), "GPT-NeoX, Llama")
        yield rule("rotary of pairs", _turned(x, interleaved=True), "GPT-J, GLM", interleaved=True)
        turned_back = _turned(x, interleaved=False, back=True)
        yield rule("rotary the other way round", turned_back, "nanochat", back=True)
        yield rule("rotary by halves", _by_halves(x, (FIRST, SECOND), _halves), "GPT-OSS")
        by_pairs = _by_halves(x, (EVEN, ODD), _pairs)
        yield rule("rotary of pairs by halves", by_pairs, "RoFormer", interleaved=True)
    yield Rule(
        "rotary of pairs that come apart",
        _by_halves(whole, (EVEN, ODD), _halves),
        "pairs lie side by side before, and half a head apart behind",
    )
    product = Product((_complex(whole), Value("angles", _is_complex)))
    yield Rule(
        "rotary of complex numbers",
        call(
            _FLATTENS, _FLATTEN, _merges_last, input=call(_REALS, "input", input=product), **_DIMS
        ),
        "Meta's Llama, torchtitan",
        _guard,
        lambda graph, found: _write(graph, found, interleaved=True),
    )
    yield Rule(
        "complex numbers",
        call(_REALS, "input", input=Product((Value("some"), Value("others")))),
        "no spelling of a rotary embedding that is known",
    )


_FAMILY = Family(
    "fuse_rotary",
    tuple(_rules()),
    lambda node: node.target in _CATS | _STACKS | _REALS,
    steps=_CATS | _FLATTENS,
)


class FuseRotary(FusePass):
    """``q * cos + rotate_half(q) * sin``, and of ``k`` -> ``rotary(q, k, cos, sin)``."""

    name = "fuse_rotary"
    family = _FAMILY

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = super().__call__(graph, ctx)
        if rewrites:
            pair_up(graph)
        return rewrites
