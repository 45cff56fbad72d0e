"""Put one operator in the place of an activation of one tensor times another, in any spelling.

Gate and up may be two tensors or the halves of one. Whatever is rounded on the way, the operator
computes in float32 and rounds once, so that it is no further from the truth.

Pays: on a GPU; see ``memopt.kernels.gated``. Does not: on the CPU, where the pass leaves the graph
alone unless it is told otherwise; where gate or up is made by a loop of its own, which would fuse
with the product and would have to be written for an operator.

Source: see ``memopt.kernels.gated``.
"""

import math

import torch
import torch.nn.functional as F
from torch import fx

from memopt.emit import emit, same_shape, shape_of, traced
from memopt.kernels.gated import GATED
from memopt.kernels.gated_packed import GATED_PACKED
from memopt.passes.arithmetic import Product, Sum, squared
from memopt.passes.fusing import Family, FusePass
from memopt.passes.halves import EVEN, FIRST, ODD, SECOND, part_of
from memopt.passes.heads import loosely
from memopt.passes.patterns import (
    POWERS,
    SQUARES,
    Call,
    Either,
    Literal,
    Maybe,
    Number,
    Pattern,
    Such,
    Value,
    Where,
    call,
)
from memopt.passes.rules import Found, Rule, Written, as_result, widens
from memopt.passes.steps import cast_of, name_of

_SILUS = frozenset({F.silu})
_GELUS = frozenset({F.gelu})
_SIGMOIDS = frozenset({torch.sigmoid, F.sigmoid, "sigmoid"})
_RELUS = frozenset({F.relu, torch.relu, "relu"})
_TANHS = frozenset({torch.tanh, F.tanh, "tanh"})
_ERFS = frozenset({torch.erf, "erf"})
_GLUS = frozenset({F.glu})
_OTHERS = frozenset({F.mish, F.elu, F.selu, F.leaky_relu, F.hardswish, F.softplus}) | _TANHS
_LOOPS = frozenset(
    "mul add sub truediv div neg clamp clip minimum maximum where masked_fill pow square sqrt "
    "rsqrt exp log tanh sigmoid silu gelu relu softplus abs dropout".split()
)
_VIEWS = frozenset("view reshape transpose permute getitem chunk split unsqueeze squeeze".split())

_ANY = Where(lambda value: True)
_GATE, _UP = Value("gate"), Value("up")
_OFF = Maybe(Literal(False))


def _sigmoid(pattern: Pattern) -> Pattern:
    return call(_SIGMOIDS, "input", input=pattern)


def _tanh(pattern: Pattern) -> Pattern:
    return call(_TANHS, "input", input=pattern)


def _gelu(approximate: Pattern) -> Pattern:
    return call(_GELUS, "input approximate", input=_GATE, approximate=approximate)


_RELU = call(_RELUS, "input inplace", input=_GATE, inplace=_OFF)
_ERF = call(_ERFS, "input", input=Product((_GATE, Number(math.sqrt(0.5)))))
_CUBE = call(POWERS, "input exponent", input=_GATE, exponent=Number(3))
_ROOT, _CUBIC = Number(math.sqrt(2 / math.pi)), Number(0.044715)
_INNER = Either(
    (
        Product((_ROOT, Sum(_GATE, Product((_CUBIC, _CUBE))))),
        Product((_ROOT, _GATE, Sum(Number(1), Product((_CUBIC, _GATE, _GATE))))),
    )
)
_HALF, _ONE = Number(0.5), Number(1)


def _times_up(*factors: Pattern) -> Pattern:
    """A product with a tensor that is not the gate."""
    return Such(Product((*factors, _UP)), lambda bound: bound["gate"] is not bound["up"])


def _guard(found: Found) -> str:
    """Why the operator does not compute what was found or does not pay, or ``""``."""
    gate, up = found["gate"], found["up"]
    shapes = [shape_of(n) for n in (gate, up, found.last)]
    if not same_shape(shapes[0], shapes[1]) or not same_shape(shapes[0], shapes[2]):
        return f"gate is {_sizes(gate)} and up {_sizes(up)}"
    if traced(gate).dtype != traced(up).dtype:
        return f"gate is {traced(gate).dtype} and up {traced(up).dtype}"
    if widens(found, gate) or not traced(gate).dtype.is_floating_point:
        return f"the product of {traced(gate).dtype} stays {found.dtype}"
    for node in (gate, up):
        part = part_of(node)
        if part is not None and (part.is_half(EVEN) or part.is_half(ODD)):
            return f"{node.name} is every other entry of a row"
        if loop := _loop(node):
            return f"{loop.name} ({name_of(loop)}) is made in a loop, which fuses with the product"
    return ""


def _sizes(node: fx.Node) -> str:
    return "x".join(map(str, shape_of(node)))


def _loop(node: fx.Node) -> fx.Node | None:
    """The elementwise node that a tensor is a view or a conversion of, for one reader alone."""
    while cast_of(node) is not None or name_of(node) in _VIEWS:
        node = loosely(node.args[0])
    return node if name_of(node) in _LOOPS and len(node.users) == 1 else None


def _write(graph: fx.Graph, found: Found, activation: str) -> Written:
    """The operator, of two tensors or of one."""
    gate, up, last = found["gate"], found["up"], found.last
    first, second = part_of(gate), part_of(up)
    if first and second and first.whole is second.whole:
        for one, other, gate_last in ((FIRST, SECOND, False), (SECOND, FIRST, True)):
            if first.is_half(one) and second.is_half(other):
                args = (first.whole, activation, gate_last)
                y = emit(graph, GATED_PACKED, args, like=last)
                said = f"{activation}, of two halves"
                return Written(said, {last: as_result(found, y)})
    y = emit(graph, GATED, (gate, up, activation), like=last)
    return Written(activation, {last: as_result(found, y)})


def _rule(name: str, activation: str, pattern: Pattern, why: str) -> Rule:
    return Rule(name, pattern, why, _guard, lambda graph, found: _write(graph, found, activation))


def _glu_guard(found: Found) -> str:
    rank = len(shape_of(found["packed"]))
    (node,) = (n for n in found.match.inner if n.target in _GLUS)
    dim = loosely(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1))
    return "" if dim % rank == rank - 1 else "its halves are not those of the last dimension"


def _glu_write(graph: fx.Graph, found: Found) -> Written:
    y = emit(graph, GATED_PACKED, (found["packed"], "sigmoid", True), like=found.last)
    return Written("sigmoid, of two halves", {found.last: as_result(found, y)})


_EXTRA = "input alpha inplace negative_slope beta threshold".split()
_UNKNOWN = Call(_OTHERS, "input", tuple((name, _ANY) for name in _EXTRA))
_RULES = (
    _rule(
        "SwiGLU",
        "silu",
        _times_up(call(_SILUS, "input inplace", input=_GATE, inplace=_OFF)),
        "Llama, and whatever takes its activation from a table by name",
    ),
    _rule("SwiGLU, written out", "silu", _times_up(_GATE, _sigmoid(_GATE)), "x * sigmoid(x)"),
    _rule("GeGLU", "gelu", _times_up(_gelu(Maybe(Literal("none")))), "torch's own"),
    _rule(
        "GeGLU, written out",
        "gelu",
        _times_up(_GATE, _HALF, Sum(_ONE, _ERF)),
        "before torch had it",
    ),
    _rule("GeGLU by tanh", "gelu_tanh", _times_up(_gelu(Literal("tanh"))), "Gemma"),
    _rule(
        "GeGLU by tanh, written out",
        "gelu_tanh",
        _times_up(_GATE, _HALF, Sum(_ONE, _tanh(_INNER))),
        "T5 and GPT-2",
    ),
    _rule(
        "GeGLU by sigmoid",
        "quick_gelu",
        _times_up(_GATE, _sigmoid(Product((Number(1.702), _GATE)))),
        "CLIP, and GPT-OSS with 1 added to up",
    ),
    _rule("squared ReGLU", "relu_squared", _times_up(squared(_RELU)), "Primer's activation"),
    _rule("ReGLU", "relu", _times_up(_RELU), "Shazeer's"),
    Rule(
        "GLU",
        call(_GLUS, "input dim", input=Value("packed"), dim=_ANY),
        "torch's own",
        _glu_guard,
        _glu_write,
    ),
    _rule("gate", "sigmoid", _times_up(_sigmoid(_GATE)), "attention's output in Qwen3-Next"),
    Rule(
        "a gate",
        Product((_UNKNOWN, _UP)),
        "its activation is none of the operator's",
    ),
)
_ANCHORS = _SILUS | _GELUS | _SIGMOIDS | _RELUS | _ERFS | _GLUS | _OTHERS

_FAMILY = Family(
    "fuse_gates", _RULES, lambda node: node.target in _ANCHORS, steps=POWERS | SQUARES
)


class FuseGates(FusePass):
    """``silu(gate) * up`` and its kin -> ``gated(gate, up)``."""

    name = "fuse_gates"
    family = _FAMILY
