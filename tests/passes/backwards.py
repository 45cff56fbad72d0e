"""Graphs that are a backward and nothing else, for passes that look at backwards alone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx


def traced(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    """The graph of a backward: its first argument is what comes in."""
    gm = make_fx(function, tracing_mode="fake")(*arguments)
    incoming = next(iter(gm.graph.nodes))
    incoming.target = incoming.name = "tangents_1"
    gm.recompile()
    return gm
