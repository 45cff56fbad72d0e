"""Attention as a Dynamo graph has it: a call, its arguments, and whose heads they have."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx

from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import loosely, overwriter
from memopt.passes.steps import name_of

ATTEND = F.scaled_dot_product_attention
HEADS = 1  # the dimension
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


@dataclass(frozen=True)
class Attention:
    """One call.

    Attributes:
        node: the call.
        arguments: all of them, by name.
        key: before its heads were repeated for groups of queries, where they were.
        value: the same.
        groups: how many heads of queries read one of keys; 1 where that is not known.
    """

    node: fx.Node
    arguments: Mapping[str, Any]
    key: fx.Node
    value: fx.Node
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> "Attention":
        """What a call computes."""
        arguments: dict[str, Any] = dict(_DEFAULTS)
        arguments.update(zip(_ARGUMENTS, node.args, strict=False))
        arguments.update(node.kwargs)
        query, key, value = (arguments[name] for name in _ARGUMENTS[:3])
        whole = cls(node, arguments, key, value, 1)
        before = _before_repetition(key), _before_repetition(value)
        if before[0] is not None and before[1] is not None:
            key, value = before
        elif before != (None, None) or not arguments["enable_gqa"]:
            return whole
        if len(shape_of(query)) != 4:
            return whole
        heads = [shape_of(n)[HEADS] for n in (query, key, value)]
        if not all(isinstance(n, int) for n in heads) or heads[1] != heads[2]:
            return whole
        return (
            whole
            if heads[0] % heads[1]
            else cls(node, arguments, key, value, heads[0] // heads[1])
        )

    @property
    def overwriter(self) -> fx.Node | None:
        """What overwrites keys or values after their heads were repeated, and before the call."""
        copies = self.arguments["key"], self.arguments["value"]
        return overwriter({self.key, self.value}, min(copies), self.node)


def _before_repetition(node: fx.Node) -> fx.Node | None:
    """Keys or values before each head was repeated for its group; None where none was."""
    arguments = loosely(node.args)
    if name_of(node) == "contiguous":
        return _before_repetition(arguments[0])
    if name_of(node) == "repeat_interleave":
        source = arguments[0]
        dim = node.kwargs.get("dim", arguments[2] if len(arguments) > 2 else None)
        return source if dim in (HEADS, HEADS - 4) and _repeats(source, node) else None
    if name_of(node) not in ("reshape", "view", "flatten"):
        return None
    expanded = arguments[0]
    if name_of(expanded) not in ("expand", "broadcast_to") or len(shape_of(expanded)) != 5:
        return None
    single = loosely(expanded.args)[0]
    source = loosely(single.args)[0] if single.args else None
    if not isinstance(source, fx.Node) or not _adds_a_dimension(single):
        return None
    before, after = shape_of(source), shape_of(expanded)
    kept = (*after[:2], *after[3:])
    return source if same_shape(before, kept) and _repeats(source, node) else None


def _adds_a_dimension(node: fx.Node) -> bool:
    """Whether a node puts a dimension of one behind that of the heads."""
    arguments = loosely(node.args)
    if name_of(node) == "unsqueeze":
        return arguments[1:] in ((2,), (-3,))
    index = arguments[1] if node.target is operator.getitem else ()
    whole = slice(None)
    if not isinstance(index, tuple) or index[:3] != (whole, whole, None):
        return False
    return all(i is Ellipsis or i == whole for i in index[3:])


def _repeats(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node has a whole number of each head of another one, and is else as large."""
    before, after = shape_of(source), shape_of(node)
    if len(before) != 4 or len(after) != 4 or traced(source).dtype != traced(node).dtype:
        return False
    return same_shape((before[0], *before[2:]), (after[0], *after[2:]))
