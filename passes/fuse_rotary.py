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
from memopt.passes.fusing import Family, FusePass
from memopt.passes.halves import (
    CATS,
    EVEN,
    FIRST,
    FLATTENS,
    ODD,
    SECOND,
    STACKS,
    HalfOf,
    PartOf,
    flattened,
    joined,
    side_by_side,
)
from memopt.passes.heads import loosely
from memopt.passes.logits import RESHAPES
from memopt.passes.patterns import Pattern, Value, call
from memopt.passes.rotary_pairs import pair_up
from memopt.passes.rotary_tables import halved, once, order, rows
from memopt.passes.rules import Found, Rule, Written, as_result, as_wide, converts
from memopt.pipeline import PassContext

_REALS = frozenset({torch.view_as_real})

_COS, _SIN = Value("cos"), Value("sin")


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


def _turned(x: Pattern, *, interleaved: bool, back: bool = False) -> Pattern:
    """``x * cos + rotate(x) * sin``; ``back`` is the other way round."""
    kinds = (EVEN, ODD) if interleaved else (FIRST, SECOND)
    a, b = (HalfOf(x, kind) for kind in kinds)
    join = side_by_side if interleaved else joined
    rotated = join(b, negated(a)) if back else join(negated(b), a)
    return Sum(Product((x, _COS)), Product((rotated, _SIN)))


def _by_halves(
    x: Pattern, kinds: tuple[str, str], join: Callable[[Pattern, Pattern], Pattern]
) -> Pattern:
    """Both halves of the result, each from both halves of ``x``."""
    a, b = (HalfOf(x, kind) for kind in kinds)
    first = difference(Product((a, _COS)), Product((b, _SIN)))
    return join(first, Sum(Product((b, _COS)), Product((a, _SIN))))


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
    if not same_shape(shape_of(cos), shape_of(sin)) or not order(x, cos):
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
    graph: fx.Graph,
    found: Found,
    *,
    interleaved: bool = False,
    back: bool = False,
    apart: bool = False,
) -> Written:
    """The operator for one tensor, and no keys beside it.

    Args:
        graph: the graph.
        found: what it stands for.
        interleaved: whether the entries of a pair lie side by side.
        back: whether it turns the other way round.
        apart: whether pairs lie side by side before, and half a head apart behind.
    """
    last, x, width = found.last, found["x"], _width(found)
    tables = whole = _tables(found)
    first = order(x, whole[0])
    if found["angles"] is None and shape_of(whole[0])[-1] == width:
        tables = halved(graph, whole, interleaved=interleaved, like=last)

    def call(target: Any, *args: Any) -> fx.Node:
        return once(graph, target, args, like=last)

    cos, sin = (call(operator.getitem, t, rows(t, first)) for t in tables)
    if found["angles"] is not None:
        both = call(torch.view_as_real, cos)
        cos, sin = (call(operator.getitem, both, (Ellipsis, place)) for place in (0, 1))
    if back:
        sin = call(operator.neg, sin)
    heads, flat = as_wide(found, x), len(shape_of(x)) == 3
    heads = call("unsqueeze", heads, 0) if flat else heads
    heads = call("transpose", heads, 1, 2) if first == "positions" else heads
    if apart:
        pairs = call("unflatten", heads, -1, (width // 2, 2))
        heads = call("flatten", call("transpose", pairs, -1, -2), -2)
    nothing = call(operator.getitem, heads, (slice(None), slice(0, 0)))
    args = heads, nothing, cos, sin, width, interleaved, False
    result = emit(graph, operator.getitem, (emit(graph, ROTARY, args, like=last), 0), like=last)
    if first == "positions":
        result = emit(graph, "transpose", (result, 1, 2), like=last)
    if flat:
        result = emit(graph, "squeeze", (result, 0), like=last)
    said = "one operator" if tables is whole else "one operator, with each angle once"
    return Written(said, {last: as_result(found, result)})


def _rules() -> Iterator[Rule]:
    whole = Value("x")
    part = PartOf(whole, "taken")
    for form, x in ((" of a part", part), ("", whole)):

        def rule(name: str, pattern: Pattern, why: str, form: str = form, **options: bool) -> Rule:
            if form:
                pattern = joined(pattern, PartOf(whole, "rest"))
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
        yield rule("rotary by halves", _by_halves(x, (FIRST, SECOND), joined), "GPT-OSS")
        by_pairs = _by_halves(x, (EVEN, ODD), side_by_side)
        yield rule("rotary of pairs by halves", by_pairs, "RoFormer", interleaved=True)
    yield Rule(
        "rotary of pairs that come apart",
        _by_halves(whole, (EVEN, ODD), joined),
        "DeepSeek-V3: one copy takes them apart",
        _guard,
        lambda graph, found: _write(graph, found, apart=True),
    )
    product = Product((_complex(whole), Value("angles", _is_complex)))
    yield Rule(
        "rotary of complex numbers",
        flattened(call(_REALS, "input", input=product)),
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
    lambda node: node.target in CATS | STACKS | _REALS,
    steps=CATS | FLATTENS,
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
