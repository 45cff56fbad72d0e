"""Find out what a mask says, and say it without one.

Compiled models carry a mask that their library makes from positions alone: each query sees the
keys up to its own. Where nothing that it is made of is an input, the mask is a constant, and is
computed while compiling. If it is causal, or hides nothing, attention is told so, and the mask
goes; heads of keys and values that were repeated for groups of queries are then read as they are,
where the kernels of the device do that.

Pays: always. The mask is not held, half of the products are not
computed, kernels without a mask are free to run, and keys and values are held once for a group.
Exact up to the order of sums.

Does not: where the mask depends on an input, such as one that tells padding, or on sizes that
are not numbers.

Source: memopt's own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from memopt._torch import disable_modes
from memopt.emit import shape_of, traced
from memopt.graph import source_line
from memopt.passes.attentions import ATTEND, Attention
from memopt.passes.heads import overwriter, transformed
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_CPU = torch.device("cpu")
_FLASH_WIDTH = 256  # heads that flash kernels take
_DEVICE = re.compile(r"(cuda|cpu|xpu|mps|mtia|hpu|privateuseone)(:\d+)?")


@dataclass(frozen=True)
class ProveCausal:
    """``sdpa(q, repeat(k), repeat(v), tril)`` -> ``sdpa(q, k, v, is_causal, enable_gqa)``.

    Attributes:
        most: numbers that a value may have to be computed while compiling.
    """

    name: ClassVar[str] = "prove_causal"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    most: int = 2**29

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        rewrites = 0
        verdicts: dict[fx.Node, str] = {}
        for node in graph.find_nodes(op="call_function", target=ATTEND):
            attention = Attention.of(node)
            mask = attention.arguments["attn_mask"]
            if not isinstance(mask, fx.Node) or attention.arguments["is_causal"]:
                continue
            cone = _cone(mask)
            verdict = self._reason_against(cone, node)
            if not verdict:
                if mask not in verdicts:
                    verdicts[mask] = _says(graph, cone, mask)
                verdict = verdicts[mask]
            is_proven = verdict in ("causal", "whole")
            text = f"its mask is {verdict}: it goes" if is_proven else f"its mask stays: {verdict}"
            kind = RemarkKind.APPLIED if is_proven else RemarkKind.MISSED
            ctx.remark(self.name, kind, text, node.name, source_line(node))
            if is_proven:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_without_mask(graph, attention, verdict))
                graph.erase_node(node)
                rewrites += 1
        return rewrites

    def _reason_against(self, cone: set[fx.Node], attention: fx.Node) -> str:
        """Why what a mask is made of is no constant, or not to be computed; or ``""``."""
        if given := next((n for n in cone if n.op not in ("call_function", "call_method")), None):
            return f"it is made of {given.name}, which is no constant"
        for node in cone:
            if any(not isinstance(n, int) for n in shape_of(node)):
                return "its size is not a number"
            if shape_of(node) and traced(node).numel() > self.most:
                return f"{node.name} has {traced(node).numel()} numbers"
        first = min(cone)
        if transformed(first, attention):
            return "a transform of functions is open"
        writer = overwriter(cone, first, attention, besides=cone)
        return f"{writer.name} writes to what it is made of" if writer else ""


def _cone(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found, todo = {node}, [node]
    while todo:
        sources = set(todo.pop().all_input_nodes) - found
        found |= sources
        todo += sources
    return found


def _says(graph: fx.Graph, cone: set[fx.Node], mask: fx.Node) -> str:
    """What a mask shows: ``"causal"``, ``"whole"``, or why it is not known to be either."""
    before = torch.get_rng_state()
    try:
        computed = _computed(graph, cone, mask)
        if not torch.equal(torch.get_rng_state(), before):
            return "it is drawn at random"
    finally:
        torch.set_rng_state(before)
    return "it was not computed in its dtype" if computed is None else _shows(computed)


def _computed(graph: fx.Graph, cone: set[fx.Node], mask: fx.Node) -> Tensor | None:
    """A value that depends on no input, on the CPU; None where a dtype is not the traced one."""
    order = [node for node in graph.nodes if node in cone]
    last = {source: node for node in order for source in node.all_input_nodes}
    made: dict[fx.Node, Any] = {}

    def here(argument: Any) -> Any:
        is_name = isinstance(argument, str) and _DEVICE.fullmatch(argument)
        return _CPU if is_name or isinstance(argument, torch.device) else argument

    with disable_modes(), torch.no_grad():
        for node in order:
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            args, kwargs = fx.node.map_aggregate((args, kwargs), here)
            target: Callable[..., Any] | str = node.target
            if target == "cuda":
                made[node] = args[0]
            elif isinstance(target, str):
                made[node] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                made[node] = target(*args, **kwargs)
            if getattr(made[node], "dtype", None) != getattr(traced(node), "dtype", None):
                return None  # as under autocast
            for source in node.all_input_nodes:
                if last[source] is node:
                    del made[source]
    result = made[mask]
    return result if isinstance(result, Tensor) else None


def _shows(mask: Tensor) -> str:
    """What a mask of ``(..., queries, keys)`` shows: where it is true, or adds zero."""
    if mask.dtype == torch.bool:
        shown, hidden = mask, ~mask
    else:
        shown, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    if bool(shown.all()):
        return "whole"
    if mask.shape[-1] != mask.shape[-2]:
        return "it has another number of queries than of keys"
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if bool((shown == causal).all()) and bool((hidden == ~causal).all()):
        return "causal"
    return "it is not causal"


def _without_mask(graph: fx.Graph, attention: Attention, verdict: str) -> fx.Node:
    """The same numbers; the graph is positioned before the attention."""
    arguments = attention.arguments
    key, value, grouped = arguments["key"], arguments["value"], arguments["enable_gqa"]
    if attention.groups > 1 and not grouped and _reads_groups(attention):
        key, value, grouped = attention.key, attention.value, True
    options = {
        "dropout_p": arguments["dropout_p"],
        "is_causal": verdict == "causal",
        "scale": arguments["scale"],
        "enable_gqa": grouped,
    }
    made = graph.call_function(ATTEND, (arguments["query"], key, value), options)
    made.meta.update(attention.node.meta)
    return made


def _reads_groups(attention: Attention) -> bool:
    """Whether kernels read one head of keys for several of queries; the rest expands them."""
    value = traced(attention.key)
    widths = {shape_of(n)[-1] for n in (attention.key, attention.value)}
    if attention.reason_to_repeat() or len(widths) > 1:
        return False
    if value.device.type == "cpu":
        return True
    return value.dtype in (torch.float16, torch.bfloat16) and max(widths) <= _FLASH_WIDTH
