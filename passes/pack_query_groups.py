"""Attend with every group of queries to its one head of keys, not to copies of that head.

In grouped-query attention several heads of queries read one head of keys and values. Where a mask
is given, libraries expand keys and values to as many heads as there are queries, and copy them:
for one token all of a cache, in every layer. The queries of a group are put behind one another
instead, as rows of one head. A mask of one row is the same for all of them.

Pays: where there is one query per head, as in decoding: the copies, and reading them. Exact up
to the order of sums. Does not: where there are more queries, whose mask would be repeated.

Source: grouped queries are of Ainslie et al. (2023), arXiv:2305.13245; that their rows are
packed in decoding, of FlashInfer: Ye et al. (2025), arXiv:2501.01005.
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx

from memopt.emit import emit, extent, same_shape, shape_of, traced
from memopt.graph import source_line
from memopt.passes.heads import loosely, overwriter
from memopt.passes.steps import name_of
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_HEADS = 1  # the dimension


@dataclass(frozen=True)
class PackQueryGroups:
    """``sdpa(q, repeat(k), repeat(v), mask)`` -> ``sdpa(q.reshape(B, Hkv, G, D), k, v, mask)``."""

    name: ClassVar[str] = "pack_query_groups"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        for node in graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
            found = _Attention.of(node)
            if found is None:
                continue
            reason = found.reason_against()
            if not reason:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(found.packed(graph))
                graph.erase_node(node)
            kind = RemarkKind.MISSED if reason else RemarkKind.APPLIED
            text = f"{found.groups} heads of queries read one of keys and values, not a copy of it"
            if reason:
                text = f"keys and values are expanded for groups of queries: {reason}"
            ctx.remark(self.name, kind, text, node.name, source_line(node))
            rewrites += not reason
        return rewrites


@dataclass(frozen=True)
class _Attention:
    """One attention whose queries come in groups.

    Attributes:
        node: the attention.
        arguments: its own, by name.
        key: before it was expanded.
        value: the same.
        groups: heads of queries for one of keys.
    """

    node: fx.Node
    arguments: dict[str, Any]
    key: fx.Node
    value: fx.Node
    groups: int

    @classmethod
    def of(cls, node: fx.Node) -> "_Attention | None":
        """What a node computes, if it is that."""
        arguments: dict[str, Any] = dict(_DEFAULTS)
        arguments.update(zip(_ARGUMENTS, node.args, strict=False))
        arguments.update(node.kwargs)
        query, key, value = (arguments[name] for name in _ARGUMENTS[:3])
        sources = _before_expansion(key), _before_expansion(value)
        if sources != (None, None):
            key, value = sources
        elif not arguments["enable_gqa"]:
            return None
        if key is None or value is None or len(shape_of(query)) != 4:
            return None
        heads = [shape_of(n)[_HEADS] for n in (query, key, value)]
        if not all(isinstance(n, int) for n in heads) or heads[1] != heads[2]:
            return None
        if heads[0] == heads[1] or heads[0] % heads[1]:
            return None
        return cls(node, arguments, key, value, heads[0] // heads[1])

    def reason_against(self) -> str:
        """Why it is left as it is; empty where it is not."""
        query, mask = self.arguments["query"], self.arguments["attn_mask"]
        if shape_of(query)[2] != 1:
            return f"there are {shape_of(query)[2]} queries for each head"
        if self.arguments["is_causal"] or self.arguments["dropout_p"]:
            return "it is causal, or drops some"
        if mask is not None and shape_of(mask)[-2:-1] not in ((), (1,)):
            return "its mask has rows"
        if mask is not None and len(shape_of(mask)) > 2 and shape_of(mask)[-3] != 1:
            return "its mask is one for each head"
        copies = self.arguments["key"], self.arguments["value"]
        if writer := overwriter({self.key, self.value}, min(copies), self.node):
            return f"{writer.name} overwrites what they are expanded from"
        return ""

    def packed(self, graph: fx.Graph) -> fx.Node:
        """The same numbers; the graph is positioned before the attention."""
        query = self.arguments["query"]
        batch = extent(graph, query, 0)
        heads, width = shape_of(self.key)[_HEADS], shape_of(query)[-1]
        rows = emit(graph, "reshape", (query, batch, heads, self.groups, width), like=self.node)
        options = {n: self.arguments[n] for n in ("attn_mask", "scale")}
        mixed = emit(
            graph,
            F.scaled_dot_product_attention,
            (rows, self.key, self.value),
            options,
            like=self.node,
        )
        shape = (batch, heads * self.groups, 1, shape_of(self.value)[-1])
        return emit(graph, "reshape", (mixed, *shape), like=self.node)


def _before_expansion(node: fx.Node) -> fx.Node | None:
    """Keys or values before each head was repeated for its group; None where none was."""
    arguments = loosely(node.args)
    if name_of(node) == "repeat_interleave":
        source = arguments[0]
        dim = node.kwargs.get("dim", arguments[2] if len(arguments) > 2 else None)
        return source if dim in (_HEADS, _HEADS - 4) and _repeats(source, node) else None
    if name_of(node) not in ("reshape", "view", "flatten", "contiguous"):
        return None
    if name_of(node) == "contiguous":
        return _before_expansion(arguments[0])
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
    return (
        isinstance(index, tuple)
        and index[:3] == (whole, whole, None)
        and set(map(repr, index[3:])) <= {repr(whole), repr(Ellipsis)}
    )


def _repeats(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node has a whole number of each head of another one, and is else as large."""
    before, after = shape_of(source), shape_of(node)
    if len(before) != 4 or len(after) != 4 or traced(source).dtype != traced(node).dtype:
        return False
    return same_shape((before[0], *before[2:]), (after[0], *after[2:]))
