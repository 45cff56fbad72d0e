"""Calls of attention that can have spans: causal self-attention, and what is put in their place.

A mask that hides padding besides is taken at its word: the tokens that it shows move to the front,
where causality hides the others from them, and back.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memopt.attention.layers import LayerSpans
from memopt.attention.rules import FULL, Rule
from memopt.emit import emit, extent, same_shape, shape_of, traced
from memopt.kernels.banded_attention import ATTENTION, WIDEST
from memopt.passes.attentions import HEADS, TOKENS, Attention
from memopt.passes.causal_masks import Causal
from memopt.passes.mask_forms import Form
from memopt.passes.steps import name_of

# From how many queries on a window is faster than a mask on the CPU, however wide it is: 1024 take
# 0.4 to 0.9 of the time, and 2048 0.25 to 0.7, with 64 and with 32 entries a head.
_LEAST_WINDOWED = 1024
_SHOWN_FIRST = {"dim": TOKENS, "descending": True, "stable": True}


def reason_against(attention: Attention) -> str:
    """Why a call is not known to be causal self-attention, or ``""``."""
    arguments = attention.arguments
    query, value = arguments["query"], attention.value
    if reason := _reason_of_heads(attention):
        return reason
    if arguments["dropout_p"] != 0.0:
        return "some of it may be dropped at random"
    if not isinstance(arguments["scale"], int | float | None):
        return "its scale is not a number"
    mask = arguments["attn_mask"]
    if mask is not None and _causal(attention) is None:
        return "its mask is not known to be causal"
    if max(shape_of(query)[3], shape_of(value)[3]) > WIDEST:
        return f"its heads have more than {WIDEST} entries"
    if reason := attention.reason_to_repeat():
        return reason
    lengths = [shape_of(n)[TOKENS : TOKENS + 1] for n in (query, attention.key, value)]
    if arguments["is_causal"] or mask is not None:
        return "" if same_shape(lengths[0], lengths[1]) else "it has fewer queries than keys"
    if lengths[0] == (1,) and _ends_in_new(attention.key) and _ends_in_new(value):
        return ""
    return "it is not causal"


def reads_window(attention: Attention, form: Form) -> bool:
    """Whether an operator that reads a window of keys takes the place of a call with its mask.

    Args:
        attention: the call.
        form: of its mask.
    """
    given, key = attention.arguments, traced(attention.key)
    shape = shape_of(given["query"])
    if not form.is_causal or key.device.type != "cpu" or given["dropout_p"] != 0.0:
        return False
    if _reason_of_heads(attention) or not all(isinstance(n, int) for n in shape):
        return False
    if shape[TOKENS] < _LEAST_WINDOWED or max(shape[3], shape_of(attention.value)[3]) > WIDEST:
        return False
    is_number = isinstance(given["scale"], int | float | None)
    return is_number and not attention.reason_to_repeat()


def _reason_of_heads(attention: Attention) -> str:
    """Why heads of queries do not read a head of keys each, as many to each; or ``""``."""
    shapes = [shape_of(n) for n in (attention.arguments["query"], attention.key, attention.value)]
    if any(len(shape) != 4 for shape in shapes):
        return "its queries, keys and values are not all of four dimensions"
    queries, keys, values = heads = [shape[HEADS] for shape in shapes]
    if not all(isinstance(n, int) for n in heads):
        return "its heads are not a number"
    if keys != values or not keys or queries % keys:
        return f"{queries} heads of queries read {keys} of keys and {values} of values"
    return ""


def windowed(graph: fx.Graph, attention: Attention, width: int) -> fx.Node:
    """The call with a window for its mask; the graph is positioned before it.

    Args:
        graph: which gets new nodes.
        attention: the call.
        width: keys that a query sees, its own included.
    """
    heads = shape_of(attention.key)[HEADS]
    inputs = attention.arguments["query"], attention.key, attention.value
    arguments = (*inputs, [width] * heads, [0] * heads, scale_of(attention))
    mixed = emit(graph, ATTENTION, arguments, like=attention.node)
    return emit(graph, operator.getitem, (mixed, 0), like=attention.node)


def _causal(attention: Attention) -> Causal | None:
    """What the call's mask is known to be."""
    mask = attention.arguments["attn_mask"]
    return Causal.of(mask, attention.node) if isinstance(mask, fx.Node) else None


def padding_of(attention: Attention) -> fx.Node | None:
    """The part of the call's mask that hides keys from all queries."""
    causal = _causal(attention)
    return causal.padding if causal else None


def _ends_in_new(node: fx.Node) -> bool:
    """Whether keys or values are those of a cache with one new token behind them."""
    if name_of(node) not in ("cat", "concat", "concatenate"):
        return False
    given: Any = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    parts: Any = given.get("tensors") or ()
    if given.get("dim", 0) not in (TOKENS, TOKENS - 4) or len(parts) < 2:
        return False
    return shape_of(parts[-1])[TOKENS : TOKENS + 1] == (1,)


def scale_of(attention: Attention) -> float:
    """The scale of a call's scores."""
    scale = attention.arguments["scale"]
    width: Any = shape_of(attention.arguments["query"])[-1]
    return float(scale if scale is not None else width**-0.5)


def banded(graph: fx.Graph, attention: Attention, layer: LayerSpans, sinks: int) -> fx.Node:
    """The call with spans; the graph is positioned before it.

    Args:
        graph: which gets new nodes.
        attention: the call.
        layer: what the plan says of it.
        sinks: first tokens that every query sees.
    """
    node = attention.node
    heads, n = shape_of(attention.key)[HEADS], shape_of(attention.key)[TOKENS]
    spans: dict[Rule, Any] = dict.fromkeys(layer.rules, 0)
    for rule in spans:
        if rule == FULL or (isinstance(n, int) and rule.span(n) >= n):
            continue
        size = extent(graph, attention.key, TOKENS)
        span = rule.span(size if isinstance(size, int) else _Size(graph, size))
        spans[rule] = span.node if isinstance(span, _Size) else span
    each = heads // layer.heads
    table = [spans[rule] for rule in layer.rules for _ in range(each)]
    inputs = [attention.arguments["query"], attention.key, attention.value]
    order, back = _orders(graph, attention)
    inputs = [_moved(graph, x, order, node) for x in inputs]
    arguments = (*inputs, table, [sinks] * heads, scale_of(attention))
    mixed = emit(graph, ATTENTION, arguments, like=node)
    return _moved(graph, emit(graph, operator.getitem, (mixed, 0), like=node), back, node)


def _orders(graph: fx.Graph, attention: Attention) -> Sequence[fx.Node | None]:
    """Where each token comes from if those that are shown move to the front, and if they return.

    Both are `(B, 1, N, 1)`, or None where nothing is hidden.
    """
    padding, like = padding_of(attention), attention.node
    if padding is None:
        return None, None
    shown = emit(graph, "transpose", (padding, TOKENS, 3), like=like)
    order = emit(graph, torch.argsort, (shown,), _SHOWN_FIRST, like=like)
    return order, emit(graph, torch.argsort, (order, TOKENS), like=like)


def _moved(graph: fx.Graph, x: fx.Node, order: fx.Node | None, like: fx.Node) -> fx.Node:
    """The tokens of `(B, H, N, D)` in another order."""
    if order is None:
        return x
    batch, heads, _, width = (extent(graph, x, dim) for dim in range(4))
    index = emit(graph, "expand", (order, batch, heads, -1, width), like=like)
    return emit(graph, torch.gather, (x, TOKENS, index), like=like)


class _Size:
    """A symbolic size, whose arithmetic makes nodes."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def __add__(self, other: int) -> "_Size":
        return self._made(operator.add, other)

    def __mul__(self, other: int) -> "_Size":
        return self._made(operator.mul, other)

    def __floordiv__(self, other: int) -> "_Size":
        return self._made(operator.floordiv, other)

    __radd__, __rmul__ = __add__, __mul__

    def _made(self, function: Any, other: int) -> "_Size":
        return _Size(self.graph, emit(self.graph, function, (self.node, other), like=self.node))
