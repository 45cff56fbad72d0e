"""Graphs of modules as Inductor would have them, cut into rows of maps, and their peaks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bench.meter import Meter
from memopt._torch import select_decomp_table
from memopt.passes import CUT_MAPS
from memopt.passes.map_moves import write_in_place


def traced(module: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Callable[[Tensor], Any]]:
    """The graph of a module as Inductor would have it, and what runs it."""
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def function(given: list[Tensor], x: Tensor) -> Any:
        named = dict(zip(values, given, strict=True))
        return torch.func.functional_call(module, named, (x,))

    own = [value.detach() for value in values.values()]
    trace = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())
    with torch.no_grad():
        gm = trace(own, x)
    gm.graph.eliminate_dead_code()

    def run(x: Tensor) -> Any:
        with torch.no_grad():
            return gm(own, x)

    return gm, run


def cut(gm: fx.GraphModule, pieces: int) -> int:
    """Cut all that can be; how many regions are."""
    names = CUT_MAPS(gm.graph, {})
    CUT_MAPS(gm.graph, dict.fromkeys(names, pieces))
    write_in_place(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return len(names)


def whole_numbers(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """With weights and inputs of which every sum is exact, in whatever order."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return module.eval(), torch.randint(-2, 3, x.shape).to(x.dtype)


def peak(run: Callable[[Tensor], Any], x: Tensor) -> int:
    with torch.no_grad():
        run(x)
        with Meter() as meter:
            result = run(x)
    del result
    return int(meter.peak_bytes)
