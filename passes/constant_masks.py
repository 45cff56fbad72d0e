"""Masks that depend on no input: why one is no constant, and what it is.

What is computed is computed while compiling, on the CPU, and drawn numbers do not count.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from memopt._torch import disable_modes
from memopt.emit import shape_of, traced
from memopt.passes.heads import overwriter, transformed

MOST = 2**29
"""Numbers that a value may have to be computed while compiling."""

_CPU = torch.device("cpu")
_DEVICE = re.compile(r"(cuda|cpu|xpu|mps|mtia|hpu|privateuseone)(:\d+)?")


def cone(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found, todo = {node}, [node]
    while todo:
        sources = set(todo.pop().all_input_nodes) - found
        found |= sources
        todo += sources
    return found


def reason_against_constant(mask: fx.Node, reader: fx.Node, most: int = MOST) -> str:
    """Why a mask is no constant where it is read, or not to be computed; or ``""``.

    Args:
        mask: the mask.
        reader: what reads it.
        most: numbers that a value may have.
    """
    sources = cone(mask)
    if given := next((n for n in sources if n.op not in ("call_function", "call_method")), None):
        return f"it is made of {given.name}, which is no constant"
    for node in sources:
        if any(not isinstance(n, int) for n in shape_of(node)):
            return "its size is not a number"
        if shape_of(node) and traced(node).numel() > most:
            return f"{node.name} has {traced(node).numel()} numbers"
    first = min(sources)
    if transformed(first, reader):
        return "a transform of functions is open"
    writer = overwriter(sources, first, reader, besides=sources)
    return f"{writer.name} writes to what it is made of" if writer else ""


def computed(graph: fx.Graph, mask: fx.Node) -> Tensor | str:
    """A constant mask's numbers, on the CPU; or why they are not known.

    Args:
        graph: the graph.
        mask: one that there is no `reason_against_constant`.
    """
    before = torch.get_rng_state()
    try:
        value = _run(graph, cone(mask), mask)
        if not torch.equal(torch.get_rng_state(), before):
            return "it is drawn at random"
    finally:
        torch.set_rng_state(before)
    return "it was not computed in its dtype" if value is None else value


def _run(graph: fx.Graph, sources: set[fx.Node], mask: fx.Node) -> Tensor | None:
    """The mask; None where a dtype is not the traced one."""
    order = [node for node in graph.nodes if node in sources]
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
