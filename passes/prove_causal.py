"""Find out what a mask says, and say it without one.

Compiled models carry a mask that their library makes from positions alone: each query sees the
keys up to its own. Where nothing that it is made of is an input, the mask is a constant, and is
computed while compiling. If it is causal, or hides nothing, attention is told so, and the mask
goes. A window goes on the CPU, where an operator reads no more than that; elsewhere it stays, as
documents do, one mask for all layers, for no argument tells attention of either. In any case heads
of keys and values that were repeated for groups of queries are read as they are, where the kernels
of the device do that.

Pays: always. The mask is not held, half of the products are not computed, or all but a window's,
kernels without a mask are free to run, and keys and values are held once for a group.
Exact up to the order of sums.

Does not: where the mask depends on an input, such as one that tells padding, or on sizes that
are not numbers; nor with dropout on the CPU, where a causal mask would only be made again.

Source: memopt's own.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.emit import shape_of, traced
from memopt.graph import source_line
from memopt.passes.attentions import ATTEND, Attention, reads_groups
from memopt.passes.constant_masks import MOST, computed, reason_against_constant
from memopt.passes.mask_forms import CAUSAL, WHOLE, WINDOW, Form, form_of
from memopt.passes.spanned_calls import reads_window, windowed
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind


@dataclass(frozen=True)
class ProveCausal:
    """``sdpa(q, repeat(k), repeat(v), tril)`` -> ``sdpa(q, k, v, is_causal, enable_gqa)``.

    Attributes:
        most: numbers that a value may have to be computed while compiling.
    """

    name: ClassVar[str] = "prove_causal"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    most: int = MOST

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        forms: dict[fx.Node, Form] = {}
        for node in graph.find_nodes(op="call_function", target=ATTEND):
            attention = Attention.of(node)
            mask = attention.arguments["attn_mask"]
            if not isinstance(mask, fx.Node) or attention.arguments["is_causal"]:
                continue
            form = proven_form(graph, attention, forms, self.most)
            if form.name == WINDOW and reads_window(attention, form):
                text = f"its mask is {form.text}: it goes, and no more are read"
                ctx.remark(self.name, RemarkKind.APPLIED, text, node.name, source_line(node))
                with graph.inserting_before(node):
                    node.replace_all_uses_with(windowed(graph, attention, form.width))
                graph.erase_node(node)
                rewrites += 1
                continue
            goes = form.name == WHOLE or (form.name == CAUSAL and not _by_steps(attention))
            shares = _shares(attention, masked=not goes)
            text = f"its mask is {form.text}: it goes" if goes else f"its mask stays: {form.text}"
            if form.name == CAUSAL and not goes:
                text += ", and no kernel drops probabilities on a CPU: each layer would make one"
            if shares and not goes:
                text += "; keys and values are read once for a group of queries"
            kind = RemarkKind.APPLIED if goes or shares else RemarkKind.MISSED
            ctx.remark(self.name, kind, text, node.name, source_line(node))
            if goes or shares:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_retold(attention, form, goes, shares))
                graph.erase_node(node)
                rewrites += 1
        return rewrites


def proven_form(
    graph: fx.Graph,
    attention: Attention,
    known: dict[fx.Node, Form] | None = None,
    most: int = MOST,
) -> Form:
    """What the mask of a call is proven to show; without a name where nothing is proven.

    Args:
        graph: the graph.
        attention: a call with a mask.
        known: forms of masks that were computed before, which is added to.
        most: numbers that a value may have to be computed while compiling.
    """
    known = {} if known is None else known
    mask = attention.arguments["attn_mask"]
    if reason := reason_against_constant(mask, attention.node, most):
        return Form("", reason)
    if mask not in known:
        value = computed(graph, mask)
        known[mask] = Form("", value) if isinstance(value, str) else form_of(value)
    return known[mask]


def _by_steps(attention: Attention) -> bool:
    """Whether it runs as products and a softmax, which make a causal mask for themselves."""
    on_cpu = traced(attention.key).device.type == "cpu"
    return on_cpu and bool(attention.arguments["dropout_p"])


def _retold(attention: Attention, form: Form, goes: bool, shares: bool) -> fx.Node:
    """The same numbers, with the mask or without it; the graph stands before the attention."""
    arguments = dict(attention.arguments)
    if goes:
        arguments |= {"attn_mask": None, "is_causal": form.name == CAUSAL}
    if shares:
        arguments |= {"key": attention.key, "value": attention.value, "enable_gqa": True}
    triple = [arguments.pop(name) for name in ("query", "key", "value")]
    made = attention.node.graph.call_function(ATTEND, tuple(triple), arguments)
    made.meta.update(attention.node.meta)
    return made


def _shares(attention: Attention, *, masked: bool) -> bool:
    """Whether heads of keys were repeated, and kernels read one for several of queries."""
    if attention.groups == 1 or attention.arguments["enable_gqa"]:
        return False
    if shape_of(attention.node)[2] == 1:
        return False  # one query: its group is packed
    if attention.reason_to_repeat():
        return False
    widths = [shape_of(n)[-1] for n in (attention.key, attention.value)]
    return reads_groups(traced(attention.key), widths, masked=masked)
