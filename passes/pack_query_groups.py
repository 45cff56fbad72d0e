"""Attend with every group of queries to its one head of keys, not to copies of that head.

In grouped-query attention several heads of queries read one head of keys and values. Where a mask
is given, libraries repeat keys and values for as many heads as there are queries, and copy them:
for one token all of a cache, in every layer. The queries of a group are put behind one another
instead, as rows of one head. A mask of one row is the same for all of them.

Pays: where there is one query per head, as in decoding: the copies, and reading them. Exact up
to the order of sums. Does not: where there are more queries, whose mask would be repeated.

Source: grouped queries are of Ainslie et al. (2023), arXiv:2305.13245; that their rows are
packed in decoding, of FlashInfer: Ye et al. (2025), arXiv:2501.01005.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.emit import emit, extent, shape_of
from memopt.graph import source_line
from memopt.passes.attentions import ATTEND, HEADS, Attention
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


@dataclass(frozen=True)
class PackQueryGroups:
    """``sdpa(q, repeat(k), repeat(v), mask)`` -> ``sdpa(q.reshape(B, Hkv, G, D), k, v, mask)``."""

    name: ClassVar[str] = "pack_query_groups"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        for node in graph.find_nodes(op="call_function", target=ATTEND):
            attention = Attention.of(node)
            if attention.groups == 1 or attention.arguments["is_causal"]:
                continue
            text = f"{attention.groups} heads of queries read one of keys and values, not a copy"
            reason = _reason_against(attention)
            if reason:
                text = f"keys and values are repeated for groups of queries: {reason}"
            else:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_packed(graph, attention))
                graph.erase_node(node)
            kind = RemarkKind.MISSED if reason else RemarkKind.APPLIED
            ctx.remark(self.name, kind, text, node.name, source_line(node))
            rewrites += not reason
        return rewrites


def _reason_against(attention: Attention) -> str:
    """Why it is left as it is; empty where it is not."""
    query, mask = (attention.arguments[name] for name in ("query", "attn_mask"))
    if shape_of(query)[2] != 1:
        return f"there are {shape_of(query)[2]} queries for each head"
    if attention.arguments["dropout_p"]:
        return "some of it is dropped at random"
    if mask is not None and shape_of(mask)[-2:-1] not in ((), (1,)):
        return "its mask has rows"
    if mask is not None and len(shape_of(mask)) > 2 and shape_of(mask)[-3] != 1:
        return "its mask is one for each head"
    return attention.reason_to_repeat()


def _packed(graph: fx.Graph, attention: Attention) -> fx.Node:
    """The same numbers; the graph is positioned before the attention."""
    node, query = attention.node, attention.arguments["query"]
    batch, heads = extent(graph, query, 0), shape_of(attention.key)[HEADS]
    shape = (batch, heads, attention.groups, shape_of(query)[-1])
    rows = emit(graph, "reshape", (query, *shape), like=node)
    options = {name: attention.arguments[name] for name in ("attn_mask", "scale")}
    mixed = emit(graph, ATTEND, (rows, attention.key, attention.value), options, like=node)
    shape = (batch, heads * attention.groups, 1, shape_of(attention.value)[-1])
    return emit(graph, "reshape", (mixed, *shape), like=node)
