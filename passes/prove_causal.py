"""Find out what a mask says, and say it without one.

Compiled models carry a mask that their library makes from positions alone: each query sees the
keys up to its own. Where nothing that it is made of is an input, the mask is a constant, and is
computed while compiling. If it is causal, or hides nothing, attention is told so, and the mask
goes; heads of keys and values that were repeated for groups of queries are then read as they are,
where the kernels of the device do that.

Runs where the options name it. Pays: always. The mask is not held, half of the products are not
computed, kernels without a mask are free to run, and keys and values are held once for a group.
Exact up to the order of sums.

Does not: where the mask depends on an input, such as one that tells padding, or on sizes that
are not numbers.

Source: memopt's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from memopt._torch import disable_modes
from memopt.emit import emit, shape_of, traced
from memopt.graph import source_line
from memopt.passes.attentions import ATTEND, Attention
from memopt.passes.heads import overwriter
from memopt.passes.steps import name_of
from memopt.pipeline import PassContext
from memopt.remarks import RemarkKind

_CPU = torch.device("cpu")
_FLASH_WIDTH = 256  # heads that flash kernels take
_RANDOM = ("rand", "dropout", "bernoulli", "normal", "uniform", "multinomial")


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
        if not ctx.config.enabled(self.name, default=False):
            return 0
        rewrites = 0
        verdicts: dict[fx.Node, str] = {}
        for node in graph.find_nodes(op="call_function", target=ATTEND):
            attention = Attention.of(node)
            mask = attention.arguments["attn_mask"]
            if not isinstance(mask, fx.Node) or attention.arguments["is_causal"]:
                continue
            if mask not in verdicts:
                verdicts[mask] = self._verdict(graph, mask, node)
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

    def _verdict(self, graph: fx.Graph, mask: fx.Node, attention: fx.Node) -> str:
        """``"causal"``, ``"whole"``, or why it is not known to be either."""
        cone = _cone(mask)
        if given := next((n for n in cone if n.op not in ("call_function", "call_method")), None):
            return f"it is made of {given.name}, which is no constant"
        if drawn := next((n for n in cone if any(r in name_of(n) for r in _RANDOM)), None):
            return f"{drawn.name} is drawn at random"
        for node in cone:
            if any(not isinstance(n, int) for n in shape_of(node)):
                return "its size is not a number"
            if shape_of(node) and traced(node).numel() > self.most:
                return f"{node.name} has {traced(node).numel()} numbers"
        if not cone or traced(mask) is None:
            return "nothing is known of it"
        if writer := overwriter(cone, min(cone), attention, besides=cone):
            return f"{writer.name} writes to what it is made of"
        return _says(_computed(graph, cone, mask))


def _cone(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found, todo = {node}, [node]
    while todo:
        sources = set(todo.pop().all_input_nodes) - found
        found |= sources
        todo += sources
    return found


def _computed(graph: fx.Graph, cone: set[fx.Node], mask: fx.Node) -> Tensor:
    """A value that depends on no input, on the CPU; what nothing reads any more is let go."""
    order = [node for node in graph.nodes if node in cone]
    last = {source: node for node in order for source in node.all_input_nodes}
    made: dict[fx.Node, Any] = {}

    def here(argument: Any) -> Any:
        return _CPU if isinstance(argument, torch.device) else argument

    with disable_modes(), torch.no_grad():
        for node in order:
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            args, kwargs = fx.node.map_aggregate((args, kwargs), here)
            target: Callable[..., Any] | str = node.target
            if isinstance(target, str):
                made[node] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                made[node] = target(*args, **kwargs)
            for source in node.all_input_nodes:
                if last[source] is node:
                    del made[source]
    result = made[mask]
    assert isinstance(result, Tensor)
    return result


def _says(mask: Tensor) -> str:
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
    return emit(graph, ATTEND, (arguments["query"], key, value), options, like=attention.node)


def _reads_groups(attention: Attention) -> bool:
    """Whether kernels read one head of keys for several of queries; the rest expands them."""
    value = traced(attention.key)
    widths = {shape_of(n)[-1] for n in (attention.key, attention.value)}
    if attention.overwriter is not None or len(widths) > 1:
        return False
    if value.device.type == "cpu":
        return True
    return value.dtype in (torch.float16, torch.bfloat16) and max(widths) <= _FLASH_WIDTH
