"""Attention as a Dynamo graph has it: a call, its arguments, and whose heads they have."""

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from memopt._torch import size_expr
from memopt.emit import same_shape, shape_of, traced
from memopt.passes.heads import loosely, overwriter, transformed
from memopt.passes.steps import name_of

ATTEND = F.scaled_dot_product_attention
HEADS, TOKENS = 1, 2  # the dimensions
_FLASH_WIDTH = 256  # heads that flash kernels take
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
        links: what repeats keys and values.
    """

    node: fx.Node
    arguments: Mapping[str, Any]
    key: fx.Node
    value: fx.Node
    groups: int = 1
    links: tuple[fx.Node, ...] = ()

    @classmethod
    def of(cls, node: fx.Node) -> "Attention":
        """What a call computes."""
        arguments: dict[str, Any] = dict(_DEFAULTS)
        arguments.update(zip(_ARGUMENTS, node.args, strict=False))
        arguments.update(node.kwargs)
        query, *given = (arguments[name] for name in _ARGUMENTS[:3])
        whole = cls(node, arguments, *given)
        paths = [_to_the_source(n) for n in given]
        if not all(paths):
            if any(paths) or not arguments["enable_gqa"]:
                return whole
            paths = [[n] for n in given]
        key, value = (path[-1] for path in paths)
        if len(shape_of(query)) != 4:
            return whole
        heads = [shape_of(n)[HEADS] for n in (query, key, value)]
        if not all(isinstance(n, int) for n in heads) or heads[1] != heads[2]:
            return whole
        groups, rest = divmod(heads[0], heads[1])
        links = tuple(link for path in paths for link in path[:-1])
        return whole if rest else cls(node, arguments, key, value, groups, links)

    def reason_to_repeat(self) -> str:
        """Why keys and values may not be read as they were before; empty where they may."""
        query = self.arguments["query"]
        tensors = (query, self.key, self.value, self.node)
        if len({traced(n).dtype for n in tensors}) > 1:
            return "queries, keys and values have several dtypes"
        if not all(same_shape(shape_of(query)[:1], shape_of(n)[:1]) for n in tensors):
            return "queries are of another batch"
        for link in self.links:
            if traced(self.key).requires_grad > traced(link).requires_grad:
                return f"{link.name} stops the gradient"
        first = min((*self.links, self.node))
        if transformed(first, self.node):
            return "a transform of functions is open"
        writer = overwriter({self.key, self.value, *self.links}, first, self.node)
        return f"{writer.name} overwrites them, or what they are copies of" if writer else ""


def is_written_out(node: fx.Node) -> bool:
    """Whether the model has an attention in steps, of which a pass made this node, and no call."""
    source = node.meta.get("source_fn_stack") or [(node.name, ATTEND)]
    return source[-1][1] is not ATTEND


def _to_the_source(node: fx.Node) -> list[fx.Node]:
    """From keys or values to what they were before each head was repeated; empty if they were not.

    Each but the last is computed from the one behind it.
    """
    arguments, named = loosely(node.args), dict(node.kwargs)
    if name_of(node) == "repeat_interleave":
        positional = dict(zip(("input", "repeats", "dim"), arguments, strict=False))
        source, repeats, dim = ((positional | named).get(n) for n in ("input", "repeats", "dim"))
        if not isinstance(source, fx.Node) or not isinstance(repeats, int):
            return []
        return [node, source] if dim in (HEADS, HEADS - 4) and _repeats(source, node) else []
    if named or not arguments:
        return []
    if name_of(node) == "contiguous":
        path = _to_the_source(arguments[0])
        return path and [node, *path]
    expanded = arguments[0]
    if name_of(node) not in ("reshape", "view", "flatten") or not isinstance(expanded, fx.Node):
        return []
    if name_of(expanded) not in ("expand", "broadcast_to") or len(shape_of(expanded)) != 5:
        return []
    single: Any = expanded.args[0] if expanded.args else None
    source = single.args[0] if isinstance(single, fx.Node) and single.args else None
    if not isinstance(source, fx.Node) or not _adds_a_dimension(single):
        return []
    before, after = shape_of(source), shape_of(expanded)
    alike = same_shape(before, (*after[:2], *after[3:])) and _repeats(source, node)
    return [node, expanded, single, source] if alike else []


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


def reads_groups(key: torch.Tensor, widths: Collection[Any], *, masked: bool) -> bool:
    """Whether kernels of the device read one head of keys for several of queries.

    Args:
        key: the keys.
        widths: of keys and of values.
        masked: whether there is a mask, which such kernels of a GPU do not take.
    """
    if len({size_expr(n) for n in widths}) > 1 or key.device.type == "cpu":
        return len({size_expr(n) for n in widths}) == 1
    halves = key.dtype in (torch.float16, torch.bfloat16)
    return halves and max(widths) <= _FLASH_WIDTH and not masked


def reason_to_write_out(query: torch.Tensor, widths: Collection[Any]) -> str:
    """Why no kernel takes a query and values, so that all probabilities are held; or ``""``.

    Args:
        query: the queries.
        widths: of keys and of values.
    """
    if query.device.type == "cpu":
        one = len({size_expr(n) for n in widths}) == 1
        return "" if one else "values have another width than keys"
    return f"{query.dtype} has no kernel" if query.dtype == torch.float64 else ""
