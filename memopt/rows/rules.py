"""Which operators a fused region computes lane by lane, and how Triton spells each of them.

Numbers are held in float32 where a tensor has a lower precision, and rounded where it is written:
a conversion to a lower precision inside a region changes nothing, as in Inductor's loops.
Divisions and square roots are the exactly rounded ones, as in eager code: quantisation shows it.
Sines and cosines are left out: for large numbers libdevice reads a table, entry by entry, through
a loop that spills however many registers are free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from memopt.graph import aten, packet_name, prims
from memopt.rows.body import LOW_PRECISION
from memopt.rows.index import UnfusableError

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.float32, *LOW_PRECISION, *_INTEGERS)

Kind = Literal["result", "bits", "float", "promoted"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator is computed.

    Attributes:
        text: Triton's expression of the operands.
        kind: what operands are converted to first: the result's dtype, of numbers or of any bits,
            float32, or the dtype that PyTorch promotes them to.
        count: how many operands it takes.
    """

    text: str
    kind: Kind
    count: int


_MOST = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_LEAST = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_SQRT = "tl.sqrt_rn({0})"
_RSQRT = "tl.div_rn(1.0, tl.sqrt_rn({0}))"
# Adding and taking away 1.5 * 2**23 leaves no digit behind the point, ties to even. From 2**22 on
# it is not exact, and from 2**23 on there are none.
_WHOLE = "tl.where(tl.abs({0}) < 4194304.0, ({0} + 12582912.0) - 12582912.0, {0})"

_FLOAT = {
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "erf": "tl.erf({0})",
    "tanh": "libdevice.tanh({0})",
    "sigmoid": "tl.sigmoid({0})",
    "silu": "{0} * tl.sigmoid({0})",
    "sqrt": _SQRT,
    "rsqrt": _RSQRT,
    "reciprocal": "tl.div_rn(1.0, {0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
}
_UNARY = {"neg": "-{0}", "abs": "tl.abs({0})"}
_BINARY = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "maximum": _MOST,
    "clamp_min": _MOST,
    "minimum": _LEAST,
    "clamp_max": _LEAST,
}
_BITS = {
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "bitwise_left_shift": "{0} << {1}",
    "__lshift__": "{0} << {1}",
    "bitwise_right_shift": "{0} >> {1}",
    "__rshift__": "{0} >> {1}",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

RULES: Mapping[str, Rule] = {
    **{f"aten.{name}": Rule(text, "float", 1) for name, text in _FLOAT.items()},
    **{f"aten.{name}": Rule(text, "result", 1) for name, text in _UNARY.items()},
    **{f"aten.{name}": Rule(text, "result", 2) for name, text in _BINARY.items()},
    **{
        f"aten.{name}": Rule(f"{{0}} {sign} {{1}}", "promoted", 2)
        for name, sign in _COMPARISONS.items()
    },
    **{f"aten.{name}": Rule(text, "bits", 2) for name, text in _BITS.items()},
    "aten.bitwise_not": Rule("~{0}", "bits", 1),
    "aten.clone": Rule("{0}", "bits", 1),
    "aten.div": Rule("tl.div_rn({0}, {1})", "float", 2),
    "aten.relu": Rule("tl.where({0} <= 0, 0.0, {0})", "float", 1),
    "aten.logical_not": Rule("{0} == 0", "promoted", 1),
}
_POWERS = {
    1: "{0}",
    2: "{0} * {0}",
    3: "{0} * {0} * {0}",
    0.5: _SQRT,
    -0.5: _RSQRT,
    -1: "tl.div_rn(1.0, {0})",
}
_CONVERSIONS = (prims.convert_element_type.default, aten._to_copy.default)


def is_conversion(node: fx.Node) -> bool:
    """Whether the node changes the dtype and nothing else."""
    if node.target not in _CONVERSIONS:
        return False
    value, source = node.meta["val"], node.all_input_nodes[0].meta["val"]
    told = {"dtype": value.dtype, "layout": source.layout, "device": source.device}
    return all(name in told and told[name] == given for name, given in node.kwargs.items())


def rule_of(node: fx.Node) -> tuple[Rule, tuple[Any, ...]]:
    """How the node is computed, and from which nodes and numbers.

    Raises:
        UnfusableError: there is no rule for it.
    """
    name, args = packet_name(node.target), node.args
    if name == "aten.pow" and len(args) == 2 and args[1] in _POWERS:
        return Rule(_POWERS[args[1]], "float", 1), args[:1]  # type: ignore[index]
    if name == "aten.where" and len(args) == 3:
        return Rule("tl.where({0}, {1}, {2})", "bits", 3), args
    if name == "aten.clamp" and not node.kwargs:
        return _clamp(args)
    if name == "aten.round" and len(args) == 1 and not node.kwargs:
        return Rule(_WHOLE, "float", 1), args
    rule = RULES.get(name)
    if rule is None or len(args) != rule.count or not _plain(node):
        raise UnfusableError(f"{name} is not computed in fused regions")
    return rule, args


def _clamp(args: tuple[Any, ...]) -> tuple[Rule, tuple[Any, ...]]:
    x, least, most = (*args, None)[:3]
    if least is None:
        return Rule(_LEAST, "result", 2), (x, most)
    if most is None:
        return Rule(_MOST, "result", 2), (x, least)
    return Rule(_LEAST.format(_MOST, "{2}"), "result", 3), (x, least, most)


def _plain(node: fx.Node) -> bool:
    """Whether keywords change nothing: a layout that the region writes anyway."""
    return set(node.kwargs) <= {"memory_format"}
